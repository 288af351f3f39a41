"""A VM that is watched: what a watch asks of it, whatever VMM runs it and however its memory is reached.

Implementations: qemu_glue.watch (QEMU by its monitor, by its process, by libvirt).  Nothing here writes to the guest.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from enum import StrEnum
from types import TracebackType
from typing import Final, NamedTuple, Protocol, Self

from pvclock.errors import PvclockError
from pvclock.quantities import Gpa

__all__ = ["GuestRam", "RamRange", "VmEvent", "VmEventKind", "WatchedVm", "paused_after", "wait_for_end"]

END_CHECK_S: Final = 0.01


class VmEventKind(StrEnum):
    """What a VMM says that it did to its guest; QEMU's names."""

    STOP = "stop"
    RESUME = "resume"
    RESET = "reset"
    MIGRATION = "migration"
    """A migration or a snapshot was begun, ended or failed."""
    SHUTDOWN = "shutdown"


class VmEvent(NamedTuple):
    """An event as the VMM told it.  utc_ns: by its own stamp, which for QEMU is a whole us of CLOCK_REALTIME."""

    kind: VmEventKind
    utc_ns: int


class RamRange(NamedTuple):
    """A piece of guest RAM."""

    gpa: Gpa
    length: int


class GuestRam(Protocol):
    """A guest's memory, read from outside while the guest runs.  MemoryNotReadable where that does not work.

    means: how, for people: "process_vm_readv", "shared memory", "QMP pmemsave".
    chunk_bytes, pause_s: how much of it to read at once, and how long to leave the VMM alone then, in a search.
    """

    means: str
    chunk_bytes: int
    pause_s: float

    def ranges(self) -> list[RamRange]:
        """The RAM that holds something, in order of addresses: what was never written is left out where that is known.

        No reading of these makes the host allocate memory for the guest.
        """

    def read(self, gpa: Gpa, length: int) -> bytes:
        """`length` bytes from `gpa`, within one range."""

    def read_many(self, addresses: Sequence[Gpa], length: int) -> list[bytes]:
        """`length` bytes from each address, in order, as nearly at once as this means can."""


class WatchedVm(Protocol):
    """A running VM; a context manager that lets go of it, and leaves it running.

    name: for people.  vcpus: how many it has.  tsc_hz: its guest's TSC frequency; None if the VMM does not tell.
    is_paused: was it stopped when it was opened?  None if the VMM does not tell.
    why_no_offsets, why_no_events: why tsc_offsets() or take_events() have nothing; None if they have.
    """

    name: str
    vcpus: int
    tsc_hz: int | None
    is_paused: bool | None
    ram: GuestRam
    why_no_offsets: str | None
    why_no_events: str | None

    def tsc_offsets(self) -> tuple[int | None, ...]:
        """Each vCPU's TSC offset as it is now: guest TSC less host TSC, in ticks; None where it cannot be read."""

    def take_events(self) -> list[VmEvent]:
        """What the VMM told since the last call, oldest first."""

    def check_running(self) -> None:
        """An error that says so, if the VM has ended."""

    def __enter__(self) -> Self:
        """The VM."""

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let go of it."""


def wait_for_end(vm: WatchedVm, limit_s: float) -> PvclockError | None:
    """The error by which a VM that gave no answer tells that it has ended; None if it runs all the while.

    limit_s: how long it may take: a VMM that ends hangs up before its process is gone.  It is asked once after that,
    too, however late this thread gets a CPU.
    """
    end_s = time.monotonic() + limit_s
    is_over = False
    while not is_over:
        is_over = time.monotonic() >= end_s
        try:
            vm.check_running()
        except PvclockError as end:
            return end
        time.sleep(END_CHECK_S)
    return None


def paused_after(events: Iterable[VmEvent], is_paused: bool | None) -> bool | None:
    """Is the guest stopped after these, if it was or was not before?  None as long as its VMM does not tell."""
    for event in events:
        if event.kind in {VmEventKind.STOP, VmEventKind.RESUME}:
            is_paused = event.kind is VmEventKind.STOP
    return is_paused
