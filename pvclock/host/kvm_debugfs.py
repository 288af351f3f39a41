"""The TSC offsets of another process's vCPUs, which KVM shows in debugfs."""

from __future__ import annotations

import errno
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Final

from pvclock.host.vmm_process import VmmProcess

__all__ = ["DEBUGFS", "TscOffsetFiles"]

DEBUGFS: Final = Path("/sys/kernel/debug")
LOCKDOWN: Final = Path("/sys/kernel/security/lockdown")
VCPU: Final = re.compile(r"vcpu(\d+)")
OFFSET_TEXT_BYTES: Final = 32


class TscOffsetFiles:
    """The files vcpuN/tsc-offset of a VM's folder in debugfs.

    why: why they cannot be read, and what helps; None if they can.  N is KVM's number of a vCPU (for QEMU its APIC id),
    not its index: by number, the i-th file is that of vCPU i.
    """

    def __init__(self, vmm: VmmProcess, root: Path = DEBUGFS) -> None:
        self._files: list[Path] = []
        self._vcpus = vmm.vcpus
        self.why = self._find(vmm, root / "kvm")

    def read(self) -> tuple[int | None, ...]:
        """Each vCPU's guest TSC less host TSC, in ticks, signed, as KVM has it now; None where it cannot be read.

        Takes about 10 us a vCPU: these files are opened for each reading, since they cannot be rewound.  A KVM that
        does not honour offsets may show another than the guest has; `pvclock doctor` tells such a host.
        """
        return (*map(_offset, self._files), *[None] * (self._vcpus - len(self._files)))

    def _find(self, vmm: VmmProcess, kvm: Path) -> str | None:
        """Find the files; why that does not work, or None."""
        try:
            folder = _folder_of(vmm, kvm)
            if folder is None:
                names = f"{vmm.process.pid}-{vmm.vm_fd}"
                return f"{kvm} has no {names}: its VM was made by a thread that has ended, or in another PID namespace"
            files = [vcpu / "tsc-offset" for vcpu in _vcpu_folders(folder)][: self._vcpus]
            for file in files:
                _text(file)
        except OSError as error:
            return _why_not(error, kvm)
        self._files = files
        return None if files else f"this kernel's KVM shows no vCPUs in {folder}"


def _folder_of(vmm: VmmProcess, kvm: Path) -> Path | None:
    """The VM's folder, named by the thread that made the VM (in QEMU the first one) and by its descriptor."""
    there = {each.name: each for each in kvm.iterdir()}
    names = (f"{thread}-{vmm.vm_fd}" for thread in (vmm.process.pid, *vmm.process.threads()))
    return next((there[name] for name in names if name in there), None)


def _vcpu_folders(folder: Path) -> list[Path]:
    """The vCPUs' folders by KVM's number: "vcpu10" comes after "vcpu9"."""
    found = {int(match[1]): each for each in folder.iterdir() if (match := VCPU.fullmatch(each.name))}
    return [found[number] for number in sorted(found)]


def _offset(file: Path) -> int | None:
    try:
        return int(_text(file))
    except (OSError, ValueError):  # the VM has ended
        return None


def _text(file: Path) -> bytes:
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, OFFSET_TEXT_BYTES)
    finally:
        os.close(fd)


def _why_not(error: OSError, kvm: Path) -> str:
    match error:
        case OSError(errno=errno.EPERM):
            return f"{error.filename} may not be read: {_lockdown() or error.strerror}"
        case PermissionError():
            return f"{error.filename} may be read by root only"
        case FileNotFoundError() if not kvm.exists():
            return _why_no_kvm(kvm)
    return f"{error.filename}: {error.strerror}"


def _why_no_kvm(kvm: Path) -> str:
    with suppress(OSError):
        if any(kvm.parent.iterdir()):
            return f"debugfs of this kernel shows nothing of KVM: there is no {kvm}"
    return f"debugfs is not mounted; as root: mount -t debugfs none {kvm.parent}"


def _lockdown() -> str | None:
    """That the kernel is locked down, and how, if so."""
    with suppress(OSError):
        mode = LOCKDOWN.read_text(encoding="utf-8").partition("[")[2].partition("]")[0]
        return f"the kernel is locked down ({mode}, {LOCKDOWN})" if mode != "none" else None
    return None
