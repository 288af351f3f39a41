"""The rates that the TSC-deadline timers of a guest can follow, by unbounded ints, and what a clock asks of its VMM."""

from __future__ import annotations

from fractions import Fraction
from typing import Final

import pytest

from pvclock import GuestClock, GuestMemory, RangeError, SimulatedBackend, WrongType
from pvclock._scale import ClockScale
from pvclock.machine.dilation_limits import SHOWN_KHZ_MAX, DilationLimits, uses_deadlines
from pvclock.timekeeping.events import EventKind
from tests import oracle

pytestmark = pytest.mark.row("E12")

HZ: Final = 2_596_132_000
LAPIC_BYTES: Final = 1024


def a_clock(hz: int = HZ) -> GuestClock:
    """The clock of a guest that is yet to boot."""
    clock = GuestClock(GuestMemory(bytearray(1 << 14)), 1, backend=SimulatedBackend(hz))
    clock.limit_dilation(DilationLimits([], clock.dilation))
    return clock


def fits(scale: ClockScale) -> bool:
    """Does Linux's tsc_khz * 125 of a page fit into 32 bits?"""
    return oracle.pvclock_tsc_khz(scale.mul, scale.shift) * 125 < 2**32


@pytest.mark.parametrize("hz", [1_000_000_000, 2_000_000_000, HZ, 3_700_000_123, 34_000_000_000])
def test_the_limit_is_where_linux_own_number_overflows(hz: int) -> None:
    """Around it each rate is admitted exactly if the number that the guest computes from its page fits; some do."""
    clock, admitted = a_clock(hz), []
    for khz in range(SHOWN_KHZ_MAX - 40, SHOWN_KHZ_MAX + 40):
        rate = Fraction(hz, 1000 * khz)
        try:
            clock.dilate(*rate.as_integer_ratio())
            admitted.append(True)
        except RangeError:
            clock.dilate(*rate.as_integer_ratio(), force=True)
            admitted.append(False)
        assert admitted[-1] == fits(clock.scale)
    assert set(admitted) == {True, False}


def test_a_refused_rate_changes_nothing_and_says_where_the_limit_is() -> None:
    """1/13 is within it at 2.6 GHz and 1/20 not: the error has both frequencies, and the rate that is still allowed."""
    clock = a_clock()
    clock.dilate(1, 13)
    before = clock.events.last
    with pytest.raises(RangeError, match=r"TSC of 519226\d\d kHz.*tsc_khz \* 125: up to 34359738 kHz.*1/13\.23"):
        clock.dilate(1, 20)
    assert (clock.dilation, clock.events.last) == (Fraction(1, 13), before)
    clock.dilate(1, 20, force=True)
    assert clock.dilation == Fraction(1, 20)
    assert clock.events.read(before).events[0].kind is EventKind.DILATE


def test_a_clock_alone_has_no_such_limit() -> None:
    """A library's clock knows nothing of its guest's timers: any rate that a page can show."""
    clock = GuestClock(GuestMemory(bytearray(1 << 14)), 1, backend=SimulatedBackend(HZ))
    clock.dilate(1, 1000)
    clock.dilate(1000)
    assert clock.dilation == 1000


def test_a_faster_clock_before_the_boot_has_no_limit() -> None:
    """It shows a slower TSC, whose frequency fits all the better; and any rate may follow it until the guest boots."""
    clock = a_clock()
    for rate in (100, 1, 13):
        clock.dilate(rate)
        assert clock.dilation == rate


@pytest.mark.parametrize("given", [5, "limit", object()])
def test_a_limit_is_an_object_that_admits(given: object) -> None:
    """Anything else is a WrongType, and the clock keeps the one that it has until None takes it away."""
    clock = a_clock()
    with pytest.raises(WrongType):
        clock.limit_dilation(given)  # type: ignore[arg-type]  # what a caller may do
    with pytest.raises(RangeError):
        clock.dilate(1, 1000)
    clock.limit_dilation(None)
    clock.dilate(1, 1000)
    assert clock.dilation == Fraction(1, 1000)


@pytest.mark.parametrize("given", [1, None, "yes"])
def test_force_is_a_flag(given: object) -> None:
    """Not a number, which a caller may have meant as a third term of the rate."""
    clock = a_clock()
    with pytest.raises(WrongType):
        clock.dilate(1, 2, force=given)  # type: ignore[arg-type]  # what a caller may do
    assert clock.dilation == 1


@pytest.mark.parametrize(("mode", "expected"), [(0, False), (1, False), (2, True), (3, False)])
@pytest.mark.parametrize("rest", [0, 0xEC, 1 << 16, 0xFFF9FFFF])
def test_the_timer_mode_is_two_bits_of_its_register(mode: int, expected: bool, rest: int) -> None:
    """Bits 17 and 18 at 0x320, whatever vector and mask are: 2 is TSC-deadline, 3 reserved."""
    lapic = bytearray(b"\xff" * LAPIC_BYTES)
    lapic[0x320:0x324] = (mode << 17 | rest).to_bytes(4, "little")
    assert uses_deadlines(bytes(lapic)) == expected
