"""A VM of this process, as a watch sees it: a machine, or a clock and the memory that it publishes in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Self

from pvclock._memory import GuestMemory
from pvclock.clock.guest_clock import GuestClock
from pvclock.errors import MsrFault
from pvclock.machine import Machine
from pvclock.meter.watch.vm import GuestRam, RamRange, VmEvent, VmEventKind
from pvclock.providers.kvm.features import MSR_KVM_SYSTEM_TIME_NEW
from pvclock.quantities import Gpa, HostTsc, signed64
from pvclock.timekeeping.events import Event, EventKind

__all__ = ["LocalVm", "vm_of_clock", "vm_of_machine"]

ENABLED: Final = 1
"""Of the clock's MSR."""
KINDS: Final = {
    EventKind.PAUSE: VmEventKind.STOP,
    EventKind.RESUME: VmEventKind.RESUME,
    EventKind.RESET: VmEventKind.RESET,
}
KERNEL_OFFSETS: Final = "KVM lets nobody read the offset of a vCPU that runs"
KERNEL_EVENTS: Final = "the kernel's clock goes on while its machine is paused"


class LocalRam:
    """A GuestMemory as a watch's GuestRam."""

    means = "this process's memory"
    chunk_bytes = 8 << 20
    pause_s = 0.0

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory

    def ranges(self) -> list[RamRange]:
        """See GuestRam."""
        return [RamRange(Gpa(gpa), length) for gpa, length in sorted(self._memory.slots)]

    def read(self, gpa: Gpa, length: int) -> bytes:
        """See GuestRam; GuestAddressError for what is not in one slot."""
        return self._memory.read(gpa, length)

    def read_many(self, addresses: Sequence[Gpa], length: int) -> list[bytes]:
        """See GuestRam."""
        return [self._memory.read(gpa, length) for gpa in addresses]


class LocalVm:
    """A VM of this process, as a watch's WatchedVm.

    clock: the engine's as it is now, which tells TSC offsets and what happened; None for the kernel's.  pages: where
    each vCPU's page is now; None where there is none.
    """

    def __init__(
        self,
        name: str,
        memory: GuestMemory,
        vcpus: int,
        tsc_hz: int,
        clock: Callable[[], GuestClock | None],
        pages: Callable[[], list[Gpa | None]],
    ) -> None:
        self.name, self.vcpus = name, vcpus
        self.ram: GuestRam = LocalRam(memory)
        self.tsc_hz: int | None = tsc_hz
        self.pages = pages
        self._get_clock, self._clock = clock, clock()
        self.is_paused: bool | None = None if self._clock is None else self._clock.is_paused
        self.why_no_offsets = KERNEL_OFFSETS if self._clock is None else None
        self.why_no_events = KERNEL_EVENTS if self._clock is None else None
        self._last_event = 0 if self._clock is None else self._clock.events.last
        self._break_point: HostTsc | None = None

    def tsc_offsets(self) -> tuple[int | None, ...]:
        """See WatchedVm."""
        clock = self._get_clock()
        if clock is None:
            return (None,) * self.vcpus
        return tuple(signed64(clock.tsc(vcpu).offset) for vcpu in range(self.vcpus))

    def take_events(self) -> list[VmEvent]:
        """See WatchedVm: the clock's own, by their stamps."""
        clock = self._get_clock()
        if clock is None:
            return []
        if clock is not self._clock:  # the machine was rolled back, and this one has a log of its own
            self._clock, self._last_event = clock, 0
        batch = clock.events.read(self._last_event)
        self._last_event = batch.last
        breaks = [each.host_tsc for each in batch.events if each.rate_before != each.rate_after]
        self._break_point = breaks[-1] if breaks else self._break_point
        return [event for each in batch.events if (event := _vm_event(each)) is not None]

    def take_break_point(self) -> HostTsc | None:
        """When the last change of rate took effect that take_events() came across; None after that was asked."""
        at, self._break_point = self._break_point, None
        return at

    def check_running(self) -> None:
        """See WatchedVm: it is there as long as this process is."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """There is nothing to let go of."""


def vm_of_clock(clock: GuestClock) -> LocalVm:
    """The VM of a clock that a VMM of the caller's serves."""
    vcpus, tsc_hz = clock.vcpus, clock.backend.tsc_hz
    return LocalVm("a guest clock", clock.memory, vcpus, tsc_hz, lambda: clock, lambda: _pages_of_clock(clock))


def vm_of_machine(machine: Machine) -> LocalVm:
    """The VM of a machine, with the engine's clock or the kernel's."""
    with machine.runner.quiesce(None):  # KVM asks a vCPU that runs only once it leaves the guest
        tsc_hz = machine.vcpus[0].get_tsc_khz() * 1000
    vcpus = len(machine.vcpus)
    return LocalVm("a machine", machine.memory, vcpus, tsc_hz, lambda: machine.clock, lambda: _pages_of(machine))


# Inside


def _vm_event(event: Event) -> VmEvent | None:
    kind = KINDS.get(event.kind)
    return None if kind is None or event.real_ns is None else VmEvent(kind, event.real_ns)


def _pages_of(machine: Machine) -> list[Gpa | None]:
    if machine.clock is not None:
        return _pages_of_clock(machine.clock)
    with machine.runner.quiesce(None):
        return [_page_at(vcpu.get_msr(MSR_KVM_SYSTEM_TIME_NEW)) for vcpu in machine.vcpus]


def _pages_of_clock(clock: GuestClock) -> list[Gpa | None]:
    return [_page_of(clock, vcpu) for vcpu in range(clock.vcpus)]


def _page_of(clock: GuestClock, vcpu: int) -> Gpa | None:
    try:
        return _page_at(clock.read_msr(vcpu, MSR_KVM_SYSTEM_TIME_NEW))
    except MsrFault:  # its interface has no such page
        return None


def _page_at(msr: int) -> Gpa | None:
    return Gpa(msr & ~ENABLED) if msr & ENABLED else None
