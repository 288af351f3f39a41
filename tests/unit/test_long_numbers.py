"""Numbers of any length: whatever takes one says an error of ours, though Python prints no 5,000 digits."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest

from pvclock import GuestClock, GuestMemory, HypercallRegisters, PvclockError, SimulatedBackend
from pvclock.clock.event_log import EventLog
from pvclock.clock.ticker import Ticker
from pvclock.clock.wall_clock import WallClockBase
from pvclock.meter.stress import republish
from tests.unit.clocks import a_clock

HZ = 10**9
RAX = HypercallRegisters(1)

BOTH_SIGNS: dict[str, Callable[[GuestClock, int], object]] = {
    "dilate": lambda clock, number: clock.dilate(number),
    "slew": lambda clock, number: clock.slew(number),
    "slew at ppm": lambda clock, number: clock.slew(1, number),
    "skip": lambda clock, number: clock.skip(number),
    "offset": lambda clock, number: clock.offset(number),
    "republish": lambda clock, number: republish(clock, 1, [Fraction(number)]),
    "follow within ppm": lambda clock, number: clock.follow("raw", max_ppm=number),
    "follow with panic": lambda clock, number: clock.follow("raw", panic_ns=number),
    "wall clock": lambda clock, number: setattr(clock, "wall_clock", WallClockBase(number)),
    "fixed wall clock": lambda clock, number: setattr(clock, "wall_clock", WallClockBase(0, number)),
    "write to vCPU": lambda clock, number: clock.write_msr(number, 0x10, 1),
    "write the value": lambda clock, number: clock.write_msr(0, 0x10, number),
    "read of vCPU": lambda clock, number: clock.read_msr(number, 0x10),
    "host write to vCPU": lambda clock, number: clock.host_write_msr(number, 0x10, 1),
    "TSC of vCPU": lambda clock, number: clock.tsc(number),
    "pairing of vCPU": lambda clock, number: clock.pairing(number),
    "hypercall of vCPU": lambda clock, number: clock.hypercall(number, RAX),
    "hypercall with RAX": lambda clock, number: clock.hypercall(0, HypercallRegisters(number)),
    "hypercall in ring": lambda clock, number: clock.hypercall(0, RAX._replace(cpl=number)),
    "flush": lambda clock, number: clock.events.flush(number),
    "ticker": lambda clock, number: Ticker(clock, interval_s=number),
    "vCPUs": lambda clock, number: GuestClock(GuestMemory(), number, backend=clock.backend),
    "TSC frequency": lambda clock, number: GuestClock(GuestMemory(), backend=clock.backend, tsc_hz=number),
    "host's frequency": lambda _, number: SimulatedBackend(number),
}
NEGATIVE: dict[str, Callable[[GuestClock, int], object]] = {
    "dilate by": lambda clock, number: clock.dilate(1, number),
    "events since": lambda clock, number: clock.events.read(number),
    "capacity": lambda _, number: EventLog(number),
    "advance": lambda _, number: SimulatedBackend(HZ).advance(ns=number),
    "sleep": lambda _, number: SimulatedBackend(HZ).sleep(ns=number, tsc="stops"),
}


@pytest.mark.row("E13")
@pytest.mark.parametrize("number", [10**5000, -(10**5000), 1 << 2000, -1 << 2000], ids=lambda it: f"{it:#x}"[:9])
@pytest.mark.parametrize("name", [*BOTH_SIGNS, *NEGATIVE])
def test_a_number_of_any_length_is_refused(name: str, number: int) -> None:
    """Each parameter that takes a whole number refuses one that is far too long, and says so in a few words."""
    clock, _, _ = a_clock(HZ)
    operation = BOTH_SIGNS.get(name) or NEGATIVE[name]
    with pytest.raises(PvclockError) as caught:
        operation(clock, -abs(number) if name in NEGATIVE else number)
    assert clock.dilation == 1
    assert not clock.is_paused
    assert len(str(caught.value)) < 6000 if "write the value" in name or "RAX" in name else len(str(caught.value)) < 300


@pytest.mark.row("E13")
def test_a_run_of_any_length_is_refused() -> None:
    """run_for() of far too long a time, or of less than none, is refused, and time stands still."""
    clock, _, _ = a_clock(HZ)
    clock.pause()
    for number in (10**5000, -(10**5000)):
        with pytest.raises(PvclockError, match=r"run_for\(a number of 1"):
            clock.run_for(number)
    assert clock.is_paused


@pytest.mark.row("E13")
def test_a_rate_in_long_terms_is_that_rate() -> None:
    """A dilation whose terms are long and whose value is short is taken, and its event says so in words."""
    clock, _, _ = a_clock(HZ)
    clock.dilate(3 * 10**5000, 2 * 10**5000)
    assert clock.dilation == Fraction(3, 2)
    assert "a number of 16612 bits" in clock.events.read().events[-1].why
