"""How a machine's guest time is moved: by the engine with TSC offsets, by its page alone, or with the kernel's clock.

Which of them a machine can have, or why none.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Final, Protocol

from pvclock.clock.guest_clock import GuestClock
from pvclock.errors import MissingCapability, RangeError, StateError, TscOffsetNotHonoured
from pvclock.host.execution_time import ExecutionTimeBackend
from pvclock.host.linux import host_clocksource
from pvclock.kvm import Kvm, Vcpu, Vm
from pvclock.kvm.tsc_offset import TscOffsets, tsc_offsets_here
from pvclock.machine.bus import Bus
from pvclock.machine.clock_service import ClockService
from pvclock.quantities import NS_PER_S
from pvclock.timekeeping.travel import ClockReading, MeasuredOffset, move_kernel_clock

__all__ = ["EngineTime", "GuestTime", "KernelTime", "PageTime", "check_timers", "guest_time"]

CLOCK_REALTIME: Final = 1 << 2
CLOCK_HOST_TSC: Final = 1 << 3
"""KVM_CLOCK_REALTIME and KVM_CLOCK_HOST_TSC."""

TIMER_PORTS: Final = {0x40: "a PIT", 0x41: "a PIT", 0x42: "a PIT", 0x70: "an RTC", 0x71: "an RTC"}
HPET: Final = 0xFED00000


class GuestTime(Protocol):
    """A guest's time, and what moves it forward.  For vCPUs that are out of the guest."""

    moves_tscs: bool
    """Do the vCPUs' TSCs move with it?"""

    def now_ns(self) -> int:
        """Guest time, as ClockService.now_ns()."""

    def ticks_until(self, guest_ns: int) -> int:
        """From now to that guest time, at the present rate; negative if that is over."""

    def ticks_until_timer(self) -> int | None:
        """From now to the next timer of the guest's clock interface, which the VMM serves; None without one."""

    def move(self, ticks: int, why: str) -> None:
        """Put it forward.  StateError while it stands still, by a pause that came meanwhile."""


class EngineTime:
    """The engine's clock, with the vCPUs' TSCs.  service: for after roll_back() its clock is another."""

    moves_tscs = True

    def __init__(self, service: ClockService) -> None:
        self._service = service

    @property
    def clock(self) -> GuestClock:
        """The machine's, as it is now."""
        clock = self._service.clock
        assert clock is not None  # noqa: S101  # for type checkers
        return clock

    def now_ns(self) -> int:
        """See GuestTime."""
        return self._service.now_ns()

    def ticks_until(self, guest_ns: int) -> int:
        """See GuestTime."""
        clock = self.clock
        return _ticks(guest_ns - clock.now(), clock.backend.tsc_hz, clock.rate)

    def ticks_until_timer(self) -> int | None:
        """See GuestTime."""
        clock = self.clock
        host_ns = clock.timers.host_ns_left() if clock.timers.exist else None
        return None if host_ns is None else -(-host_ns * clock.backend.tsc_hz // NS_PER_S)

    def move(self, ticks: int, why: str) -> None:
        """See GuestTime."""
        self.clock.travel(ticks, why)


class PageTime:
    """The engine's clock without TSCs, on a host that moves none: its page goes forward by a skip."""

    moves_tscs = False

    def __init__(self, service: ClockService) -> None:
        self._engine = EngineTime(service)
        self.now_ns, self.ticks_until = self._engine.now_ns, self._engine.ticks_until
        self.ticks_until_timer = self._engine.ticks_until_timer
        """See GuestTime."""

    def move(self, ticks: int, _why: str) -> None:
        """See GuestTime."""
        clock = self._engine.clock
        if clock.is_paused:
            raise StateError("travel", "guest time stands still", "resume() it first")
        clock.skip(-(-ticks * NS_PER_S * clock.rate // clock.backend.tsc_hz))


class KernelTime:
    """The kernel's clock, and the vCPUs' TSCs that follow it; KernelClockWrites of a machine."""

    moves_tscs = True

    def __init__(self, vm: Vm, vcpus: list[Vcpu]) -> None:
        self._vm, self._vcpus, self._tsc_hz = vm, vcpus, vcpus[0].get_tsc_khz() * 1000
        self._measured = MeasuredOffset(self._tsc_hz)

    def now_ns(self) -> int:
        """See GuestTime."""
        return self._vm.get_clock()["clock"]

    def ticks_until(self, guest_ns: int) -> int:
        """See GuestTime."""
        return _ticks(guest_ns - self.now_ns(), self._tsc_hz, Fraction(1))

    def ticks_until_timer(self) -> int | None:
        """See GuestTime: the kernel's clock has none."""
        return None

    def move(self, ticks: int, _why: str) -> None:
        """See GuestTime.  MissingCapability if the kernel's master clock is off by now."""
        move_kernel_clock(ticks, self, self._measured, self._tsc_hz)

    def get_clock(self) -> ClockReading:
        """See KernelClockWrites."""
        found = self._vm.get_clock()
        if not found["flags"] & CLOCK_HOST_TSC:
            raise no_master_clock()
        return ClockReading(found["clock"], found["realtime"], found["host_tsc"])

    def set_clock(self, clock_ns: int, realtime_ns: int) -> None:
        """See KernelClockWrites."""
        self._vm.set_clock(clock_ns, CLOCK_REALTIME, realtime_ns)

    def tsc_offsets(self) -> list[int]:
        """See KernelClockWrites."""
        return [vcpu.get_tsc_offset() for vcpu in self._vcpus]

    def set_tsc_offset(self, vcpu: int, offset: int) -> None:
        """See KernelClockWrites."""
        self._vcpus[vcpu].set_tsc_offset(offset)


def guest_time(kvm: Kvm, vm: Vm, vcpus: list[Vcpu], service: ClockService, *, needs_tsc: bool) -> GuestTime:
    """What moves the time of that machine's guest, whose vCPUs are out of it; the error says why nothing can.

    needs_tsc: the guest lives by its TSC and deadlines of it, as a kernel does.
    """
    offsets = tsc_offsets_here(kvm, vcpus[0])
    if service.clock is None:
        if offsets is TscOffsets.STEERED or host_clocksource() != "tsc":
            raise no_master_clock()
        if offsets is not TscOffsets.HONOURED:
            raise TscOffsetNotHonoured(0, NO_TRAVEL)
        return KernelTime(vm, vcpus)
    if isinstance(service.clock.backend, ExecutionTimeBackend):
        raise StateError(
            "time_travel",
            "the clock counts only what the guest executes",
            "leave out: backend; a guest that is idle has no time to skip there",
        )
    if offsets is not TscOffsets.IGNORED:
        return EngineTime(service)
    if needs_tsc:
        raise TscOffsetNotHonoured(0, NO_TRAVEL)
    return PageTime(service)


def check_timers(bus: Bus) -> None:
    """StateError if a device is where a PC has timers, and does not say that it lives in guest time.

    One that does has an attribute `in_guest_time` that is True: its next interrupt is among the VMM's events.
    """
    found = [(bus.device_at_port(port), name) for port, name in TIMER_PORTS.items()]
    for device, name in (*found, (bus.device_at(HPET), "an HPET")):
        if device is not None and getattr(device, "in_guest_time", False) is not True:
            raise StateError(
                "time_travel",
                f"{device.name} is where a PC has {name}, and its time is not the guest's",
                "take it off the bus, or have it live in guest time and say so: in_guest_time = True",
            )


NO_TRAVEL: Final = "time travel moves the TSC, and the timers of the guest's kernel are deadlines of it"


def no_master_clock() -> MissingCapability:
    """The kernel's clock cannot be set to an instant without one."""
    return MissingCapability(
        "a master clock (the host's clocksource is not tsc)",
        'for time travel on the kernel\'s clock: use clock="engine", or a host on clocksource tsc',
    )


def _ticks(ns: int, tsc_hz: int, rate: Fraction) -> int:
    if not rate:
        raise RangeError("guest time stands still")
    return -(-ns * tsc_hz // (NS_PER_S * rate))
