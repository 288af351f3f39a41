"""The readings of a clock against a reference: held against a guest whose clock is known exactly."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from pvclock.meter.drift.readings import ENDS, ClockReadings, Reanchor
from tests.unit.drifting_guest import BOUND_NS, HZ, LOOK_TICKS, MUL, DriftingGuest, readings_of

pytestmark = pytest.mark.row("E10")


def seconds_of(readings: ClockReadings, guest: DriftingGuest, count: int) -> None:
    """Readings, a second apart."""
    for _ in range(count):
        readings.take()
        guest.pass_s(1)


@pytest.mark.parametrize("seed", range(40))
def test_each_reading_is_true_within_its_bound(seed: int) -> None:
    """How far ahead the clock is, and each step, whatever the rates, the steps and the writes of its TSC are."""
    rng = random.Random(seed)  # noqa: S311  # no secret
    guest = DriftingGuest(rng.randint(-200_000, 200_000), rng.randrange(-(10**12), 10**12))
    readings = readings_of(guest)
    truth: list[Fraction] = []
    for _ in range(30):
        before = guest.ahead_ns()
        if rng.random() < 0.3:
            guest.step(rng.randint(-(10**9), 10**9), MUL + rng.choice([0, 0, rng.randint(-50_000, 50_000)]))
        if rng.random() < 0.2:
            guest.offset += rng.randint(-(10**9), 10**9)
        stepped_ns = guest.ahead_ns() - before
        readings.take()
        truth.append(guest.ahead_ns())
        point, first = readings.points[-1], readings.points[0]
        slack_ns = 2 + 3 * LOOK_TICKS * Fraction(1, 2) * Fraction(1, 1000)  # floors; the rate since the reading
        assert abs(Fraction(point.ahead_ns) - (truth[-1] - truth[0])) <= point.bound_ns + first.bound_ns + slack_ns
        if len(readings.points) > 1:
            assert abs(point.step_ns - stepped_ns) <= point.step_bound_ns + 2
        guest.pass_s(Fraction(rng.randint(1, 1000), 1000))


def test_the_bound_of_a_reading() -> None:
    """The sample's, the floor of a reading, and what is not known of its instant."""
    for bound_ticks, bound_ns in ((0, BOUND_NS + 1), (100, BOUND_NS + 51)):
        guest = DriftingGuest(bound_ticks=bound_ticks)
        readings = readings_of(guest)
        readings.take()
        assert readings.points[0] == (0.0, 0.0, bound_ns, 0, 1.0, False)


def test_the_bound_of_a_step_between_two_rates() -> None:
    """A line of another rate may have begun at any time since the page before; one of the same is exact."""
    guest = DriftingGuest()
    readings = readings_of(guest)
    readings.take()
    guest.pass_s(1)
    guest.step(0, MUL + 2**12)
    readings.take()
    point = readings.points[-1]
    assert point.step_bound_ns == pytest.approx(1 + 2**12 / 2**32 * HZ, rel=1e-3)
    guest.step(70, MUL + 2**12)
    readings.take()
    assert readings.points[-1][3:5] == (70, 1.0)


def test_a_step_is_counted_once() -> None:
    """Also one that comes between a reading and the look at its page: the reading is taken again."""
    guest = DriftingGuest()
    readings = readings_of(guest)
    readings.take()

    def step_once() -> None:
        guest.between = int
        guest.step(500)

    guest.between = step_once
    readings.take()
    readings.take()
    assert readings.steps_ns == [0, 500, 0]


def test_a_step_against_a_page_that_is_given() -> None:
    """What came before that page is left out."""
    guest = DriftingGuest()
    readings = readings_of(guest)
    readings.take()
    guest.step(500)
    before = readings.page()
    guest.step(20)
    readings.take(before)
    assert readings.steps_ns == [0, 20]


def test_a_write_of_the_tsc_is_a_step() -> None:
    """Its page stays, and its clock does not; where a reading's instant is not known to the tick, it is no step."""
    for bound_ticks, step_ns in ((0, 1000), (1, 0)):
        guest = DriftingGuest(bound_ticks=bound_ticks)
        readings = readings_of(guest)
        readings.take()
        guest.offset += 2000
        readings.take()
        assert readings.steps_ns == [0, step_ns]


def test_the_rate_is_by_the_medians_of_both_ends() -> None:
    """Within its bound, which shrinks as readings come; and what is before it has settled does not count."""
    guest = DriftingGuest(ppb=1000)
    readings = readings_of(guest, settle_s=5)
    guest.step(0)
    seconds_of(readings, guest, 5)
    guest.step(10**6)
    rates = [readings.rate]
    seconds_of(readings, guest, 2 * ENDS + 30)
    rates.append(readings.rate)
    none, rate = rates
    assert none is None
    assert rate is not None
    assert rate.ppb == pytest.approx(-1000, abs=1)
    assert len(readings.settled) == 2 * ENDS + 30
    assert rate.bound_ppb == pytest.approx(2 * (BOUND_NS + 1) / 40, rel=0.01)


def test_a_rate_leaves_steps_out() -> None:
    """A pause of a minute, wherever it was; what it leaves open is in the bound."""
    for place in (2, 12, 17):
        guest = DriftingGuest(ppb=1000)
        readings = readings_of(guest)
        seconds_of(readings, guest, place)
        guest.step(-65_932_000_001)
        seconds_of(readings, guest, 2 * ENDS - place)
        assert [point.step_ns for point in readings.sure_steps] == [-65_932_000_001]
        assert readings.rate is not None
        assert readings.rate.ppb == pytest.approx(-1000, abs=1)
        assert readings.rate.bound_ppb == pytest.approx((2 * (BOUND_NS + 1) + 1) / ENDS, rel=0.01)


def test_a_step_before_the_first_reading_is_no_part_of_the_rate() -> None:
    """It is told, and no reading differs from another by it: not even as far as it is uncertain."""
    guest = DriftingGuest()
    readings = readings_of(guest)
    guest.pass_s(1)
    guest.step(10**9, MUL + 2**12)
    seconds_of(readings, guest, 2)
    assert len(readings.sure_steps) == 1
    assert readings.sure_steps[0].step_bound_ns > 1000
    assert readings.rate is not None
    assert readings.rate.bound_ppb < 2 * (BOUND_NS + 2)


def test_steps_count_as_readings_do() -> None:
    """Those of before the clock had settled are left out."""
    guest = DriftingGuest()
    readings = readings_of(guest, settle_s=3)
    guest.step(700)
    seconds_of(readings, guest, 4)
    guest.step(40)
    seconds_of(readings, guest, 4)
    assert [point.step_ns for point in readings.points if point.has_stepped] == [700, 40]
    assert [point.step_ns for point in readings.sure_steps] == [max(readings.steps_ns)] == [40]


def test_a_reading_that_is_late_is_as_true_as_others() -> None:
    """10 ms may pass between the samples around it, at the first one too, and the reference be far from nominal."""
    for late in range(3):
        guest = DriftingGuest(ppb=20_000)
        readings = readings_of(guest)
        truth: list[Fraction] = []
        for place in range(3):
            if place == late:
                guest.pass_before_reading(0.01)
            readings.take()
            truth.append(guest.ahead_ns())
            guest.pass_s(1)
        for point, ahead_ns in zip(readings.points, truth, strict=True):
            assert abs(Fraction(point.ahead_ns) - (ahead_ns - truth[0])) <= point.bound_ns + readings.points[0].bound_ns


def test_a_guest_without_a_cpu_is_waited_for() -> None:
    """Its newest reading is of before: the reference is known between two samples only."""
    guest = DriftingGuest(ppb=20_000)
    readings = readings_of(guest)
    stale = [guest.reading(), guest.reading()]
    read = guest.reading
    guest.pass_s(0.5)
    guest.reading = lambda: stale.pop() if stale else read()  # type: ignore[method-assign]
    readings.take()
    assert (stale, readings.points[0].bound_ns) == ([], BOUND_NS + 1)


def test_a_stale_reading_has_the_bound_that_it_deserves(monkeypatch: pytest.MonkeyPatch) -> None:
    """If there is no other, the reference of then is that of now by a rate that two near samples hardly tell."""
    monkeypatch.setattr("pvclock.meter.drift.readings.FRESH_TRIES", 2)
    guest = DriftingGuest()
    readings = readings_of(guest)
    stale = guest.reading()
    guest.pass_s(0.01)
    guest.reading = lambda: stale  # type: ignore[method-assign]
    readings.take()
    assert readings.points[0].bound_ns > 1000 * BOUND_NS


def test_no_rate_against_a_reference_that_was_set() -> None:
    """Between two readings, or between the samples around one; and a second later all are right again."""
    guest = DriftingGuest()
    readings = readings_of(guest)
    seconds_of(readings, guest, 3)
    guest.between = lambda: set_back(guest)
    seconds_of(readings, guest, 3)
    assert readings.rate is None
    assert readings.why_no_rate == "the reference was set meanwhile, by -10.000 000 s"
    for place, point in enumerate(readings.points):
        assert abs(point.ahead_ns - 10**10 * (place >= 3)) <= 2 * point.bound_ns


def set_back(guest: DriftingGuest) -> None:
    """Set the reference back by 10 s, once."""
    guest.between = int
    guest.set_ns -= 10**10


def test_the_reference_may_be_set_to_where_no_time_passed() -> None:
    """Also then there is no rate, and nothing is divided by 0."""
    guest = DriftingGuest()
    readings = readings_of(guest)
    readings.take()
    guest.pass_s(1)
    guest.set_ns = -(10**9)
    readings.take()
    assert readings.rate is None


def test_a_stopped_guest_has_no_rate() -> None:
    """Its page would go on as it does: nobody reads it.  One that ran at some readings has one."""
    guest = DriftingGuest()
    readings = readings_of(guest)
    guest.is_stopped = True
    seconds_of(readings, guest, 5)
    assert readings.why_no_rate == "the guest was stopped all the while"
    known = [(readings.rate is not None, readings.stopped_readings)]
    for is_stopped in (False, None):
        guest.is_stopped = is_stopped
        readings.take()
        known.append((readings.rate is not None, readings.stopped_readings))
    assert known == [(False, 5), (True, 5), (True, None)]


def test_a_short_series_has_a_rate() -> None:
    """Of as many readings at either end as do not overlap; one alone has none."""
    guest = DriftingGuest(ppb=1000)
    readings = readings_of(guest)
    rates = []
    for _ in range(2):
        seconds_of(readings, guest, 1)
        rates.append(readings.rate)
    none, rate = rates
    assert none is None
    assert rate is not None
    assert rate.ppb == pytest.approx(-1000, abs=rate.bound_ppb)
    assert rate.bound_ppb == pytest.approx(2 * (BOUND_NS + 1), rel=0.01)


def test_a_reanchors_step_is_what_the_guest_sees() -> None:
    """Against the page of before it, by its name."""
    guest = DriftingGuest()
    readings = readings_of(guest)
    readings.take()
    guest.step(30)
    readings.reanchor(Reanchor("another line", lambda: guest.step(-7)))
    assert readings.reanchors == {"another line": -7}
