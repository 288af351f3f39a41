"""A process that runs a KVM guest, as /proc shows it: which VM, how many vCPUs."""

from __future__ import annotations

import re
from contextlib import ExitStack
from types import TracebackType
from typing import Final, NamedTuple, Self

from pvclock.errors import VmNotObservable
from pvclock.host.process import Process

__all__ = ["VmmProcess", "open_vmm"]

VM: Final = "anon_inode:kvm-vm"
VCPU: Final = re.compile(r"anon_inode:kvm-vcpu:(\d+)")


class VmmProcess(NamedTuple):
    """A process with one KVM VM in it; a context manager that lets go of it.

    vm_fd: the number of the VM's descriptor there.  vcpu_ids: KVM's numbers of its vCPUs in order (for QEMU their APIC
    ids, which may have gaps); the vCPU of index i has the i-th.  A vCPU that QEMU has unplugged still counts.
    """

    process: Process
    vm_fd: int
    vcpu_ids: tuple[int, ...]

    @property
    def vcpus(self) -> int:
        """How many there are."""
        return len(self.vcpu_ids)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.process.close()


def open_vmm(pid: int) -> VmmProcess:
    """The process `pid`, which runs a KVM guest.

    VmNotObservable, which says what helps, if it does not, if there is no such process or one may not look at it, or if
    it has several VMs: nothing tells which vCPUs and which memory are whose.  VmEnded if it ends meanwhile.
    """
    with ExitStack() as resources:
        process = resources.enter_context(Process(pid))
        descriptors = process.descriptors()
        vm_fds = [number for number, what in descriptors.items() if what == VM]
        vcpu_ids = {int(match[1]) for what in descriptors.values() if (match := VCPU.fullmatch(what))}
        if (why := _why_none(process, vm_fds, vcpu_ids)) is not None:
            raise VmNotObservable(pid, why)
        resources.pop_all()
    return VmmProcess(process, vm_fds[0], tuple(sorted(vcpu_ids)))


def _why_none(process: Process, vm_fds: list[int], vcpu_ids: set[int]) -> str | None:
    """Why this is no process with one running VM; None if it is."""
    if not vm_fds:
        return f"{process.name} runs no KVM guest here; a QEMU without KVM (-accel tcg) has no kvmclock either"
    if len(vm_fds) > 1:
        fds = ", ".join(map(str, vm_fds))
        return f"{process.name} has {len(vm_fds)} VMs (descriptors {fds}); only a process with one can be watched"
    return None if vcpu_ids else f"the VM of {process.name} has no vCPUs yet; try again once it runs"
