"""Bad input to what a VMM does to time: an error that says what is wrong, and nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock import GuestClock, RangeError, StateError, StateFileError
from tests.unit.clocks import NS_PER_S, a_clock, page_of

HZ = 2_596_132_000

WRONG: dict[str, Callable[[GuestClock], object]] = {
    "skip back": lambda clock: clock.skip(-1),
    "skip beyond the end": lambda clock: clock.skip(2**64),
    "skip nearly to the end, and on": lambda clock: clock.skip(2**64 - 10**9),
    "offset beyond the end": lambda clock: clock.offset(2**64),
    "offset back": lambda clock: clock.offset(-1),
    "slew beyond the end": lambda clock: clock.slew(2**64),
    "slew at no rate": lambda clock: clock.slew(1, 0),
    "dilate to a standstill": lambda clock: clock.dilate(0),
    "dilate backwards": lambda clock: clock.dilate(1, -1),
    "dilate beyond any page": lambda clock: clock.dilate(2**80),
    "dilate below any page": lambda clock: clock.dilate(1, 2**80),
    "run for nothing": lambda clock: clock.run_for(0),
    "run what runs": lambda clock: clock.run_for(1),
    "resume what runs": lambda clock: clock.resume(),
    "follow what is none": lambda clock: clock.follow("tai"),
    "follow at no rate": lambda clock: clock.follow("raw", max_ppm=0),
}


@pytest.mark.row("E1", "E12", "P-09", "P-10", "P-14")
@pytest.mark.parametrize("name", list(WRONG))
def test_wrong_values_change_nothing(name: str) -> None:
    """Each is refused with what was wrong; timeline, page, events and policy are as they were, and time goes on."""
    clock, backend, _ = a_clock(HZ)
    backend.advance(ns=3 * NS_PER_S)
    clock.refresh()
    before = clock.line, clock.pace, page_of(clock), clock.events.last, clock.policy, clock.skew_ns, clock.reference
    with pytest.raises((RangeError, StateError, ValueError)):
        WRONG[name](clock)
    assert (
        clock.line,
        clock.pace,
        page_of(clock),
        clock.events.last,
        clock.policy,
        clock.skew_ns,
        clock.reference,
    ) == before
    backend.advance(ns=NS_PER_S)
    clock.refresh()
    assert clock.at(backend.tsc) == 4 * NS_PER_S


@pytest.mark.row("E1", "E13")
@pytest.mark.parametrize("operation", ["skip", "offset"])
def test_parts_of_a_ns_are_refused(operation: str) -> None:
    """A step is of whole ns: a float is a TypeError, with nothing changed."""
    clock, _, _ = a_clock(HZ)
    with pytest.raises(TypeError, match="float"):
        getattr(clock, operation)(1.5)
    assert clock.events.last == 0


@pytest.mark.row("E2", "E12", "P-14")
@given(
    dilation=st.tuples(st.integers(1, 2**70), st.integers(1, 2**70)),
    hz=st.sampled_from([1000, 999_999_937, HZ, 2**40]),
    target_ns=st.integers(-(10**12), 10**12),
    max_ppm=st.sampled_from([1, 500, 999_999]),
)
def test_whatever_dilation_is_taken_can_be_slewed(
    dilation: tuple[int, int], hz: int, target_ns: int, max_ppm: int
) -> None:
    """A dilation is refused, or every slew and correction on top of it works, with terms of any length."""
    clock, backend, _ = a_clock(hz)
    try:
        clock.dilate(*dilation)
    except RangeError:
        assert clock.dilation == 1
        return
    clock.follow("raw", max_ppm=100_000)
    clock.slew(target_ns, max_ppm)
    for _ in range(4):
        clock.tick()
        backend.advance(ns=NS_PER_S)
        backend.ref_ns += 10**8  # type: ignore[assignment]  # a RefNs and an int
    assert clock.pace > 0
    assert clock.dilation == Fraction(*dilation)


@pytest.mark.row("E1")
def test_a_state_with_a_dilation_that_no_page_shows() -> None:
    """Restoring it is a StateFileError that names the field."""
    clock, backend, memory = a_clock(HZ)
    clock.pause()
    state = clock.save()
    broken = state._replace(timeline=state.timeline._replace(dilation=Fraction(1, 2**90)))
    with pytest.raises(StateFileError, match=r"timeline\.dilation"):
        GuestClock.restore(broken, memory, backend=backend)
