"""Finds the kernel that the lab boots: the caller's, one from the cache, an installed one, or a download."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, NamedTuple

from pvclock.errors import LabError
from pvclock.lab.download import download_kernel

__all__ = ["Kernel", "cache_folder", "find_kernel", "identify", "require_kernel"]

MAGIC_AT, MAGIC = 0x202, b"HdrS"
"""Linux's x86 boot protocol, Documentation/arch/x86/boot.rst: the header's magic number."""
VERSION_POINTER_AT = 0x20E
"""There too: 16 bits, the version string's place in the file less 0x200."""
VERSION_LENGTH_MAX = 256

NEEDED_MODULES = (
    "arch/x86/kvm/kvm-amd.ko",
    "drivers/crypto/ccp/ccp.ko",  # kvm-amd needs it
    "drivers/char/virtio_console.ko",
    "fs/9p/9p.ko",
    "fs/overlayfs/overlay.ko",
)

ELSEWHERE: Final = (
    "set XDG_CACHE_HOME to a folder that can be written (105 MB), or name a kernel that has its modules: --kernel PATH"
)


class Kernel(NamedTuple):
    """A bootable image, its release ("6.1.0-50-amd64", as uname -r says) and its whole version string."""

    image: Path
    release: str
    version: str


def cache_folder() -> Path:
    """The folder for downloads: $XDG_CACHE_HOME/pvclock, or ~/.cache/pvclock; LabError without a home folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pvclock"
    except RuntimeError:
        raise LabError(f"no home folder to keep a kernel in; {ELSEWHERE}") from None


def find_kernel(wanted: str | None, tell: Callable[[str], None]) -> Kernel:
    """Find the kernel `wanted` (a path or a release; None: any suitable one), or download it, which `tell` reports."""
    if wanted and ("/" in wanted or Path(wanted).is_file()):
        return _with_modules(identify(Path(wanted)))
    kernels = cache_folder() / "kernels"
    if known := _known(wanted, kernels):
        return known
    _check_writable(kernels)
    return _with_modules(identify(download_kernel(wanted, kernels, tell)))


def require_kernel() -> None:
    """LabError if there is neither a suitable kernel here nor a folder to keep a downloaded one in."""
    kernels = cache_folder() / "kernels"
    if _known(None, kernels) is None:
        _check_writable(kernels)


def _known(wanted: str | None, kernels: Path) -> Kernel | None:
    cached = kernels.glob("*/boot") if os.access(kernels, os.R_OK | os.X_OK) else ()
    for places in (cached, [Path("/boot")]):
        if known := _newest(image for boot in places for image in boot.glob(f"vmlinuz-{wanted or '*'}")):
            return known
    return None


def _check_writable(folder: Path) -> None:
    """LabError unless `folder` can be written, or made."""
    there = next(above for above in (folder, *folder.parents) if os.access(above, os.F_OK))
    if not os.access(there, os.W_OK | os.X_OK):
        raise LabError(f"cannot keep a kernel in {folder}: {there} cannot be written; {ELSEWHERE}")


def identify(image: Path) -> Kernel:
    """Read a kernel image's version from its header; LabError if the file is not a bootable x86 kernel."""
    try:
        with image.open("rb") as file:
            header = file.read(1 << 16)
    except OSError as error:
        raise LabError(f"{image}: {error.strerror}") from error
    if header[MAGIC_AT : MAGIC_AT + len(MAGIC)] != MAGIC:
        raise LabError(f"{image} is not a kernel: an x86 bzImage has {MAGIC.decode()!r} at {MAGIC_AT:#x}")
    start = int.from_bytes(header[VERSION_POINTER_AT : VERSION_POINTER_AT + 2], "little") + 0x200
    version = header[start : start + VERSION_LENGTH_MAX].partition(b"\0")[0].decode("ascii", "replace")
    if not version:
        raise LabError(f"{image} is a kernel without a version string, so its modules cannot be found")
    return Kernel(image.resolve(), version.split()[0], version)


def _newest(images: Iterable[Path]) -> Kernel | None:
    readable = (image for image in images if os.access(image, os.R_OK))
    newest_first = sorted(readable, key=lambda image: image.stat().st_mtime, reverse=True)
    return next((kernel for kernel in map(identify, newest_first) if not _lacking(kernel)), None)


def _with_modules(kernel: Kernel) -> Kernel:
    if lacking := _lacking(kernel):
        raise LabError(
            f"{kernel.image}: {lacking} for {kernel.release}; the lab looks for lib/modules/{kernel.release} in the "
            "folders above the image, with the modules of Debian's linux-image-amd64 (its cloud flavour lacks 9p)"
        )
    return kernel


def _lacking(kernel: Kernel) -> str | None:
    folder = _modules(kernel)
    if folder is None:
        return "no modules"
    lacking = [name for name in NEEDED_MODULES if not any(folder.glob(f"kernel/{name}*"))]
    return f"no {', '.join(lacking)}" if lacking else None


def _modules(kernel: Kernel) -> Path | None:
    folders = (above / "lib" / "modules" / kernel.release for above in kernel.image.parents)
    return next((folder for folder in folders if folder.is_dir()), None)
