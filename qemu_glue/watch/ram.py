"""How the RAM of a QEMU's guest is read: in its process where that is permitted, else by its monitor."""

from __future__ import annotations

from contextlib import ExitStack
from enum import StrEnum

from pvclock.errors import MemoryNotReadable, VmNotObservable
from pvclock.host.process import Process
from pvclock.host.vmm_process import VmmProcess
from pvclock.meter.watch.process_ram import ProcessRam
from pvclock.meter.watch.ram_blocks import RamBlock, blocks_of
from pvclock.meter.watch.ram_means import open_ram
from pvclock.meter.watch.shared_ram import SharedRam, open_pieces
from pvclock.meter.watch.vm import GuestRam
from qemu_glue.watch.monitor_ram import MonitorRam
from qemu_glue.watch.mtree import host_address, read_ram_ranges
from qemu_glue.watch.session import Session

__all__ = ["Means", "open_guest_ram"]


class Means(StrEnum):
    """A way to read a guest's RAM."""

    SHARED = "shared"
    PROCESS = "process"
    PMEMSAVE = "pmemsave"


def open_guest_ram(
    resources: ExitStack, session: Session | None, vmm: VmmProcess | VmNotObservable, means: Means | None
) -> GuestRam:
    """The guest's RAM by `means`; by the best that works, if None.  `resources` releases it.

    vmm: QEMU's process, or why it cannot be looked at.  MemoryNotReadable; errors of a session.
    """
    if means is Means.PMEMSAVE:
        return _by_monitor(resources, session)
    try:
        return _in_process(session, vmm, means)
    except MemoryNotReadable as obstacle:
        if means is not None or session is None:
            raise
        try:
            return _by_monitor(resources, session)
        except MemoryNotReadable as another:
            raise MemoryNotReadable(None, f"{obstacle}; and by QMP: {another}") from None


def _in_process(session: Session | None, vmm: VmmProcess | VmNotObservable, means: Means | None) -> GuestRam:
    if isinstance(vmm, VmNotObservable):
        raise MemoryNotReadable(vmm.pid, vmm.why)
    blocks = blocks_of(vmm.process) if session is None else _blocks(session)
    ram = _opened(vmm.process, blocks, means)
    for found in ram.ranges()[:1]:
        ram.read(found.gpa, 1)  # to look at a process is one permission, to read its memory another
    return ram


def _opened(process: Process, blocks: list[RamBlock], means: Means | None) -> GuestRam:
    match means:
        case Means.SHARED:
            pieces = open_pieces(process, blocks)
            if not pieces:
                raise MemoryNotReadable(process.pid, "none of it is in a file that can be shared")
            return SharedRam(process, pieces)
        case Means.PROCESS:
            return ProcessRam(process, blocks)
    return open_ram(process, blocks)


def _by_monitor(resources: ExitStack, session: Session | None) -> GuestRam:
    if session is None:
        raise MemoryNotReadable(None, "there is no monitor to read it by")
    ram = MonitorRam(session)
    resources.callback(ram.close)
    return ram


def _blocks(session: Session) -> list[RamBlock]:
    return [RamBlock(at.gpa, at.length, host_address(session, at.gpa)) for at in read_ram_ranges(session)]
