"""Timers that a dilated clock drives."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock import GuestNs
from pvclock.timekeeping.timers import Firing, Timers
from tests.unit.clocks import a_clock


@pytest.mark.row("E12")
@given(rates=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8))
def test_timers_follow_dilation(rates: list[tuple[int, int]]) -> None:
    """However the clock is dilated on the way, a timer fires at the host's poll at which guest time has reached it."""
    clock, backend, _ = a_clock(10**9)
    timers, firings = Timers(clock.now()), list[Firing]()
    timers.add(GuestNs(10**6), firings.append, period_ns=10**6)
    for numerator, denominator in rates:
        clock.dilate(numerator, denominator)
        for _ in range(10):
            backend.advance(ns=300_000)
            timers.advance(clock.now())
            assert sum(firing.periods for firing in firings) == timers.now // 10**6
    guest_ns = sum((3 * 10**6 * Fraction(*rate) for rate in rates), Fraction(0))
    assert abs(timers.now - guest_ns) <= 2 * len(rates)
