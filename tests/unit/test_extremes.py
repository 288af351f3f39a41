"""What a clock accepts it can run with and be saved with for ever: frequencies, dilations, far ends, many vCPUs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from fractions import Fraction
from types import FrameType
from typing import Final

import pytest

from pvclock import ConfigError, GuestClock, GuestMemory, HostTsc, RangeError, SimulatedBackend, WrongType
from pvclock.clock.timekeeper import VCPUS_MAX
from pvclock.state.clock_state import from_json, to_json
from pvclock.timekeeping.catchup import CatchUpTable, Slew
from tests.unit.clocks import NS_PER_S, SYSTEM_TIME, a_clock, guest_ns

EVERYTHING: Final[list[Callable[[GuestClock], object]]] = [
    lambda clock: clock.slew(10**12, 10**7),
    lambda clock: clock.write_msr(0, SYSTEM_TIME, 0x2001),
    lambda clock: clock.refresh(),
    lambda clock: clock.tick(),
    lambda clock: clock.pause(),
    lambda clock: clock.resume("advance"),
    lambda clock: clock.write_msr(0, 0x3B, 5),
    lambda clock: clock.follow("raw", max_ppm=100_000),
    lambda clock: clock.tick(),
    lambda clock: clock.pause(),
    lambda clock: clock.resume(Slew(10**7)),
    lambda clock: clock.refresh(),
]


def use(clock: GuestClock, backend: SimulatedBackend) -> None:
    """Do all there is with it, some s apart, and save it each time; its guest reads on, and its state's time."""
    last_ns = 0
    for operation in EVERYTHING:
        backend.advance(ns=3 * NS_PER_S)
        operation(clock)
        state = clock.save()
        assert from_json(to_json(state)) == state
        if clock.page(0) is None or clock.is_paused or backend.tsc_hz > 10**18:  # a TSC that wraps within 3 s
            continue
        now_ns = guest_ns(backend, clock.memory)
        assert now_ns >= last_ns
        assert abs(now_ns - state.timeline.guest_ns) <= 500  # 0.47 ppb of a slew by 10^12 ns
        last_ns = now_ns


@pytest.mark.row("E9", "E13")
@pytest.mark.parametrize("hz", [1, 2, 3, 4, 5, 6, 7, 10, 1000, 10**12, 2**64 - 1])
def test_a_frequency_is_refused_or_serves_for_everything(hz: int) -> None:
    """TSCs of a few Hz, with slews at the utmost rate: an error of ours when the clock is made, or none at all."""
    backend = SimulatedBackend(hz, tsc=2**64 - 3)
    try:
        clock = GuestClock(GuestMemory(bytearray(1 << 16)), backend=backend)
    except RangeError:
        assert hz < 100
        return
    use(clock, backend)


@pytest.mark.row("E9", "E13")
@pytest.mark.parametrize(
    ("numerator", "denominator"),
    [(3**900, 2**1427), (5**400, 2**929), (3**1400, 2**2219), (1, 2**64), (2**64, 3), (10**400, 1)],
)
def test_a_dilation_in_terms_of_more_than_64_bits_is_refused(numerator: int, denominator: int) -> None:
    """At once, with the clock as it was; a state that holds such a one is as good as any that can be read."""
    clock, backend, memory = a_clock(2_596_132_000)
    backend.advance(ns=1_234_567)
    line, image = clock.line, memory.read(0, 1 << 16)
    with pytest.raises(RangeError):
        clock.dilate(numerator, denominator)
    assert (clock.line, memory.read(0, 1 << 16)) == (line, image)
    state = clock.save()
    assert from_json(to_json(state)) == state
    assert state.timeline.dilation == 1


@pytest.mark.row("E9", "E13")
def test_dilations_of_long_terms_one_after_another_can_be_saved() -> None:
    """The most that is accepted, over and over, with slews between: states stay within what a file holds."""
    clock, backend, memory = a_clock(2_596_132_000)
    for at in range(100):
        clock.dilate(2**64 - 1 - 2 * at, 2**64 - 59 - at)
        backend.advance(ns=1_234_567 + at)
        clock.slew(2**40 + at, 10**7 - at)
        backend.advance(ns=7_654_321)
        clock.refresh()
        state = clock.save()
        assert from_json(to_json(state)) == state
        assert abs(guest_ns(backend, memory) - state.timeline.guest_ns) <= 10


@pytest.mark.row("E9", "E11")
def test_a_clock_past_2_64_ns_can_be_used_and_saved() -> None:
    """Guest time is modulo 2^64 in its page and in its state, and goes on through every operation."""
    clock, backend, memory = a_clock(2_596_132_000)
    clock.skip(2**64 - NS_PER_S)
    backend.advance(ns=3 * NS_PER_S)
    clock.refresh()
    assert clock.now() == 2 * NS_PER_S
    assert abs(guest_ns(backend, memory) - 2 * NS_PER_S) <= 2
    state = clock.save()
    assert state.timeline.guest_ns == 2 * NS_PER_S
    assert from_json(to_json(state)) == state
    use(clock, backend)
    clock.pause()
    last_ns = guest_ns(backend, memory)
    restored = GuestClock.restore(clock.save(), memory, backend=backend)
    assert abs(restored.now() - last_ns) <= 500
    restored.resume("freeze")
    assert 0 <= guest_ns(backend, memory) - last_ns <= 500  # what the page lost in the slews is there again


@pytest.mark.row("E9", "E13")
@pytest.mark.parametrize("ns", [2**64, 2**64 - NS_PER_S + 1, 10**40])
def test_no_step_goes_beyond_2_64_ns(ns: int) -> None:
    """skip() and offset() that would are RangeErrors, at guest time 1 s."""
    clock, backend, _ = a_clock(2_596_132_000)
    backend.advance(ns=NS_PER_S)
    for operation in (clock.skip, clock.offset, clock.slew):
        if operation == clock.slew and ns < 2**64:
            continue
        with pytest.raises(RangeError):
            operation(ns)
    assert clock.now() == NS_PER_S


@pytest.mark.row("E9", "E13")
@pytest.mark.parametrize(
    "periods", [(), ((0, 0),), ((0, 10**12),), ((0, -5),), ((0, 1.5),)], ids=["none", "0", "10^12", "-5", "1.5"]
)
def test_a_catch_up_table_is_refused_or_serves(periods: tuple[tuple[int, int], ...]) -> None:
    """A table that is none is an error of ours when it is made or used, and the clock can still be resumed."""
    clock, backend, _ = a_clock(2_000_000_000)
    backend.advance(ns=NS_PER_S)
    clock.pause()
    backend.advance(ns=NS_PER_S)
    with pytest.raises((RangeError, ConfigError, WrongType)):
        clock.resume(CatchUpTable(periods, 0, 10**12))
    assert clock.is_paused
    clock.resume("freeze")
    for _ in range(3):
        backend.advance(ns=NS_PER_S)
        clock.refresh()
    assert clock.now() == 4 * NS_PER_S


# Many vCPUs


@pytest.mark.row("E9", "P-25")
@pytest.mark.parametrize("vcpus", [0, -1, VCPUS_MAX + 1, 2**31, 10**30])
def test_more_vcpus_than_can_be_saved_are_refused(vcpus: int) -> None:
    """1 to 4,096: a ConfigError else, before anything is allocated for them."""
    with pytest.raises(ConfigError, match=r"vCPUs; choose 1 to 4096"):
        GuestClock(GuestMemory(bytearray(1 << 16)), vcpus, backend=SimulatedBackend(10**9))


def calls_to_make(vcpus: int) -> int:
    """How many Python functions are called to make a clock of so many vCPUs, for each of which it has a page."""
    count = 0

    def counted(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    memory, backend = GuestMemory(bytearray(1 << 20)), SimulatedBackend(10**9)
    before = sys.getprofile()
    sys.setprofile(counted)
    try:
        GuestClock(memory, vcpus, backend=backend)
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.row("E9", "P-25")
def test_making_4096_vcpus_takes_linear_time() -> None:
    """Sixteen times the vCPUs are at most sixteen times the calls; and the clock can be saved."""
    assert calls_to_make(4096) <= 16 * calls_to_make(256)
    clock = GuestClock(GuestMemory(bytearray(1 << 16)), 4096, backend=SimulatedBackend(10**9, HostTsc(5)))
    clock.pause()
    state = clock.save()
    assert from_json(to_json(state)) == state
    assert state.timeline.guest_ns == Fraction(0)
