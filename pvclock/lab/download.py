"""Downloads a Debian kernel into the cache: by apt, without root and without installing it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from pvclock.errors import LabError
from pvclock.lab.tools import find_program

__all__ = ["download_kernel"]

ANY = "linux-image-amd64"
"""The package that depends on the newest kernel of the release."""

MODULES = ("arch", "block", "crypto", "fs", "lib", "mm", "net", "virt")
DRIVERS = ("block", "char", "crypto", "firmware", "input", "vhost", "virt", "virtio")
"""Of 400 MB unpacked, the 95 MB that a virtual machine can use."""


def download_kernel(release: str | None, kernels: Path, tell: Callable[[str], None]) -> Path:
    """Put the kernel of `release` (None: the newest) into its own folder in the folder `kernels`; returns the image."""
    for program in ("apt-get", "apt-cache", "dpkg-deb", "tar"):
        if not find_program(program):
            raise LabError(f"no {program} to download a kernel with; name one with its modules: --kernel PATH")
    kernels.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=kernels) as partial:
        folder = Path(partial)
        package = _fetch(release, folder, tell)
        tell(f"unpacking {package.name}")
        tree = folder / "tree"
        _unpack(package, tree)
        image = next((tree / "boot").glob("vmlinuz-*"), None)
        if image is None:
            raise LabError(f"{package.name} has no kernel in it; name one with its modules: --kernel PATH")
        found = image.name.removeprefix("vmlinuz-")
        _run("depmod", "-b", str(tree), found)
        home = kernels / found
        if not home.exists():  # another lab may have been quicker
            tree.rename(home)
    return home / "boot" / image.name


def _fetch(release: str | None, folder: Path, tell: Callable[[str], None]) -> Path:
    try:
        return _fetch_by(_apt_options(), release, folder, tell)
    except LabError:
        tell("this system's package lists do not help; reading newer ones")
        private = folder / "apt"
        (private / "lists" / "partial").mkdir(parents=True)
        options = (*_apt_options(), "-o", f"Dir::State::lists={private}/lists", "-o", f"Dir::Cache={private}")
        _run("apt-get", *options, "-q", "update")
        return _fetch_by(options, release, folder, tell)


def _apt_options() -> tuple[str, ...]:
    # Run by root, apt downloads as its own user, which may not write here.
    return ("-o", "APT::Sandbox::User=root") if os.geteuid() == 0 else ()


def _fetch_by(options: tuple[str, ...], release: str | None, folder: Path, tell: Callable[[str], None]) -> Path:
    name = f"linux-image-{release}" if release else _newest_package(options)
    tell(f"downloading {name}, once, into {folder.parent}")
    quiet = () if sys.stderr.isatty() else ("-q",)
    try:
        _run("apt-get", *options, *quiet, "download", name, cwd=folder, show=sys.stderr.isatty())
    except LabError as why:
        raise LabError(f"cannot download {name}: {why}; name a kernel with its modules: --kernel PATH") from None
    return next(folder.glob("*.deb"))


def _newest_package(options: tuple[str, ...]) -> str:
    depends = _run("apt-cache", *options, "depends", ANY)
    found = re.search(r"Depends: (linux-image-\S+)", depends)
    if not found:
        raise LabError(f"{ANY} depends on no kernel{_reason(depends)}")
    return found[1]


def _unpack(package: Path, tree: Path) -> None:
    modules = (f"kernel/{name}/*" for name in (*MODULES, *(f"drivers/{name}" for name in DRIVERS)))
    # Newer packages have usr/lib/modules.
    members = ["./boot/vmlinuz-*", *(f"./*lib/modules/*/{name}" for name in ("modules.*", *modules))]
    tree.mkdir()
    archive = package.with_suffix(".tar")
    with archive.open("wb") as file:
        unpacked = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], stdout=file, check=False)
    if unpacked.returncode:
        raise LabError(f"dpkg-deb failed ({unpacked.returncode}) on {package}; is there room for 500 MB?")
    _run("tar", "-xf", str(archive), "-C", str(tree), "--no-same-owner", "--wildcards", *members)
    archive.unlink()
    if not (tree / "lib").exists():
        (tree / "lib").symlink_to("usr/lib")


def _run(program: str, *arguments: str, cwd: Path | None = None, show: bool = False) -> str:
    command = [find_program(program) or program, *arguments]
    done = subprocess.run(
        command,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno() if show else subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise LabError(f"{program} failed ({done.returncode}){_reason(done.stdout or '')}")
    return done.stdout or ""


def _reason(output: str) -> str:
    """The last line of a program's output, usually the reason of its failure."""
    lines = output.strip().splitlines()
    return f": {lines[-1].strip()}" if lines else ""
