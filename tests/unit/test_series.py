"""A series of readings against a reference: held against a guest whose clock is known exactly."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from pvclock.meter.series import ENDS, Reanchor, Series
from tests.unit.drifting_guest import BOUND_NS, HZ, LOOK_TICKS, MUL, DriftingGuest, series_of

pytestmark = pytest.mark.row("E10")


def seconds_of(series: Series, guest: DriftingGuest, count: int) -> None:
    """Readings, a second apart."""
    for _ in range(count):
        series.take()
        guest.pass_s(1)


@pytest.mark.parametrize("seed", range(40))
def test_each_reading_is_true_within_its_bound(seed: int) -> None:
    """How far ahead the clock is, and each step, whatever the rates, the steps and the writes of its TSC are."""
    rng = random.Random(seed)  # noqa: S311  # no secret
    guest = DriftingGuest(rng.randint(-200_000, 200_000), rng.randrange(-(10**12), 10**12))
    series = series_of(guest)
    truth: list[Fraction] = []
    for _ in range(30):
        before = guest.ahead_ns()
        if rng.random() < 0.3:
            guest.step(rng.randint(-(10**9), 10**9), MUL + rng.choice([0, 0, rng.randint(-50_000, 50_000)]))
        if rng.random() < 0.2:
            guest.offset += rng.randint(-(10**9), 10**9)
        stepped_ns = guest.ahead_ns() - before
        series.take()
        truth.append(guest.ahead_ns())
        point, first = series.points[-1], series.points[0]
        slack_ns = 2 + 3 * LOOK_TICKS * Fraction(1, 2) * Fraction(1, 1000)  # floors; the rate since the reading
        assert abs(Fraction(point.ahead_ns) - (truth[-1] - truth[0])) <= point.bound_ns + first.bound_ns + slack_ns
        if len(series.points) > 1:
            assert abs(point.step_ns - stepped_ns) <= point.step_bound_ns + 2
        guest.pass_s(Fraction(rng.randint(1, 1000), 1000))


def test_the_bound_of_a_reading() -> None:
    """The sample's, the floor of a reading, and what is not known of its instant."""
    for bound_ticks, bound_ns in ((0, BOUND_NS + 1), (100, BOUND_NS + 51)):
        guest = DriftingGuest(bound_ticks=bound_ticks)
        series = series_of(guest)
        series.take()
        assert series.points[0] == (0.0, 0.0, bound_ns, 0, 1.0)


def test_the_bound_of_a_step_between_two_rates() -> None:
    """A line of another rate may have begun at any time since the page before; one of the same is exact."""
    guest = DriftingGuest()
    series = series_of(guest)
    series.take()
    guest.pass_s(1)
    guest.step(0, MUL + 2**12)
    series.take()
    point = series.points[-1]
    assert point.step_bound_ns == pytest.approx(1 + 2**12 / 2**32 * HZ, rel=1e-3)
    guest.step(70, MUL + 2**12)
    series.take()
    assert series.points[-1][3:] == (70, 1.0)


def test_a_step_is_counted_once() -> None:
    """Also one that comes between a reading and the look at its page: the reading is taken again."""
    guest = DriftingGuest()
    series = series_of(guest)
    series.take()

    def step_once() -> None:
        guest.between = int
        guest.step(500)

    guest.between = step_once
    series.take()
    series.take()
    assert series.steps_ns == [0, 500, 0]


def test_a_step_against_a_page_that_is_given() -> None:
    """What came before that page is left out."""
    guest = DriftingGuest()
    series = series_of(guest)
    series.take()
    guest.step(500)
    before = series.page()
    guest.step(20)
    series.take(before)
    assert series.steps_ns == [0, 20]


def test_a_write_of_the_tsc_is_a_step() -> None:
    """Its page stays, and its clock does not; where a reading's instant is not known to the tick, it is no step."""
    for bound_ticks, step_ns in ((0, 1000), (1, 0)):
        guest = DriftingGuest(bound_ticks=bound_ticks)
        series = series_of(guest)
        series.take()
        guest.offset += 2000
        series.take()
        assert series.steps_ns == [0, step_ns]


def test_the_rate_is_by_the_medians_of_both_ends() -> None:
    """Within its bound, which shrinks as the series grows; and what is before it has settled does not count."""
    guest = DriftingGuest(ppb=1000)
    series = series_of(guest, settle_s=5)
    guest.step(0)
    seconds_of(series, guest, 5)
    guest.step(10**6)
    rates = [series.rate]
    seconds_of(series, guest, 2 * ENDS + 30)
    rates.append(series.rate)
    none, rate = rates
    assert none is None
    assert rate is not None
    assert rate.ppb == pytest.approx(-1000, abs=1)
    assert len(series.settled) == 2 * ENDS + 30
    assert rate.bound_ppb == pytest.approx(2 * (BOUND_NS + 1) / 40, rel=0.01)


def test_a_short_series_has_a_rate() -> None:
    """Of as many readings at either end as do not overlap; one alone has none."""
    guest = DriftingGuest(ppb=1000)
    series = series_of(guest)
    rates = []
    for _ in range(2):
        seconds_of(series, guest, 1)
        rates.append(series.rate)
    none, rate = rates
    assert none is None
    assert rate is not None
    assert rate.ppb == pytest.approx(-1000, abs=rate.bound_ppb)
    assert rate.bound_ppb == pytest.approx(2 * (BOUND_NS + 1), rel=0.01)


def test_a_reanchors_step_is_what_the_guest_sees() -> None:
    """Against the page of before it, by its name."""
    guest = DriftingGuest()
    series = series_of(guest)
    series.take()
    guest.step(30)
    series.reanchor(Reanchor("another line", lambda: guest.step(-7)))
    assert series.reanchors == {"another line": -7}
