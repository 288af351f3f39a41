"""A discipline in simulated time: how well it follows, and what it makes of every fault of its reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvclock import RangeError
from pvclock.quantities import HostTsc
from pvclock.readings import Sample
from pvclock.timekeeping.discipline import Discipline, SteeringState
from tests.unit.simulated_reference import HZ, SimulatedReference, Tick, follow

PPB = 1e-9
PPM = 1e-6
DAY_S = 86_400.0
YEAR_S = 365.25 * DAY_S
HOUR_NS = 3600 * 1e9


def drift_ppb(ticks: list[Tick]) -> float:
    """How much the clock's rate differed from its reference's, from the first of these ticks to the last."""
    return (ticks[-1].lag_ns - ticks[0].lag_ns) / (ticks[-1].s - ticks[0].s)


def corrections_within(ticks: list[Tick], max_ppm: float) -> bool:
    """Was no correction ever more than that?"""
    return all(abs(tick.steering.frequency_adjustment) <= Fraction(max_ppm) / 10**6 for tick in ticks)


def settled_at(ticks: list[Tick], bound_ns: float) -> float:
    """From when on (s) the clock is within bound_ns of its reference to the end."""
    return next((tick.s for tick in reversed(ticks) if abs(tick.lag_ns) > bound_ns), 0.0)


@pytest.mark.row("E11", "E3")
@pytest.mark.parametrize("ppb", [66.8, -66.8, 31, -100_000, 0])
@pytest.mark.parametrize("seed", range(4))
def test_a_steady_reference_is_followed_to_a_tenth_of_a_ppb(ppb: float, seed: int) -> None:
    """In 10 minutes of one tick a second, readings 20 ns off: within 0.1 ppb, the bounds true, few turns."""
    ticks = list(follow(SimulatedReference(lambda _: ppb * PPB, seed=seed), 600))
    first_ns = 21  # the first reading was taken as right
    late = [tick for tick in ticks if tick.s > 60]
    assert abs(drift_ppb(late)) < 0.1
    assert max(abs(tick.lag_ns) for tick in late) < 25
    assert all(abs(tick.steering.rate.value - ppb * PPB) <= tick.steering.rate.bound for tick in ticks[1:])
    assert all(abs(tick.steering.error_ns - tick.lag_ns) <= tick.steering.bound_ns + first_ns for tick in ticks[1:])
    assert late[-1].steering.rate.bound < 0.1 * PPB
    assert {tick.steering.state for tick in late} <= {SteeringState.LOCKED, SteeringState.SLEWING}
    assert len({tick.steering.frequency_adjustment for tick in ticks}) < 60


@pytest.mark.row("E11", "E9")
@pytest.mark.parametrize("span_s", [30 * DAY_S, pytest.param(YEAR_S, marks=pytest.mark.long)], ids=["month", "year"])
def test_noise_temperature_and_outliers(span_s: float) -> None:
    """A tick every 2 minutes, the rate swinging by 50 ppb a day, 1 % of readings wrong: always within 10 us."""
    reference = SimulatedReference(lambda s: 50 * PPB * math.sin(s / DAY_S * 2 * math.pi), noise_ns=200, outliers=0.01)
    worst, states = 0.0, set()
    for tick in follow(reference, span_s, interval_s=120):
        assert abs(tick.steering.frequency_adjustment) <= Fraction(500, 10**6)
        states.add(tick.steering.state)
        if tick.s > 1200:
            worst = max(worst, abs(tick.lag_ns))
    assert worst < 10_000
    assert states == set(SteeringState) - {SteeringState.PANIC}  # it has no threshold


def stepped(at_s: float, step_ns: float) -> Callable[[float, float], float]:
    """A reference that is set, once."""
    return lambda s, ns: ns + step_ns * (s >= at_s)


@pytest.mark.row("E2", "E11")
@pytest.mark.parametrize("step_ns", [1e9, -1e9, 20e6, -20e6, 5000])
def test_a_step_becomes_a_slew(step_ns: float) -> None:
    """A reference set by up to 1 s: the clock gets there at 500 ppm, and is done within 40 s of the shortest time."""
    shortest_s = abs(step_ns) / (500 * PPM * 1e9)
    ticks = list(follow(SimulatedReference(lambda _: 66.8 * PPB, fault=stepped(100, step_ns)), 100 + shortest_s + 200))
    assert corrections_within(ticks, 500)
    assert settled_at(ticks, 25) < 100 + shortest_s + 40
    assert max(abs(tick.lag_ns) for tick in ticks) < abs(step_ns) + 1000  # it overshoots by nothing


@pytest.mark.row("E2", "E11")
@pytest.mark.parametrize("step_ns", [HOUR_NS, pytest.param(-HOUR_NS, marks=pytest.mark.long)])
def test_a_step_of_an_hour_takes_its_time(step_ns: float) -> None:
    """A reference set by an hour: 83 days at 500 ppm and a few ticks, and never a rate beyond that."""
    reference = SimulatedReference(fault=stepped(1000, step_ns), noise_ns=100)
    ticks = list(follow(reference, 90 * DAY_S, interval_s=256))
    assert corrections_within(ticks, 500)
    assert settled_at(ticks, 200) == pytest.approx(1000 + HOUR_NS / (500 * PPM * 1e9), rel=0.002)


@pytest.mark.row("E11")
@pytest.mark.parametrize("kind", ["stops", "runs backwards", "is frozen now and then", "says anything"])
def test_a_reference_that_makes_no_sense_is_not_followed(kind: str) -> None:
    """While it stops, runs backwards or says anything the clock keeps its rate; then it goes there by a slew."""
    noise = iter(math.sin(n * n) * 1e9 for n in range(10**6))
    faults: dict[str, Callable[[float, float], float]] = {
        "stops": lambda s, ns: ns if s < 200 else 200e9 if s < 230 else ns - 30e9,
        "runs backwards": lambda s, ns: ns if s < 200 else 400e9 - ns if s < 230 else ns - 60e9,
        "is frozen now and then": lambda s, ns: ns - ns % 30e9 if 200 < s < 300 else ns,
        "says anything": lambda s, ns: ns + next(noise) if 200 < s < 300 else ns,
    }
    ticks = list(follow(SimulatedReference(lambda _: 31 * PPB, fault=faults[kind]), 600))
    lost = [tick for tick in ticks if tick.steering.state is SteeringState.HOLDOVER]
    assert len(lost) > 20
    assert all(abs(float(tick.steering.frequency_adjustment) - 31 * PPB) < 1 * PPB for tick in lost)
    assert corrections_within(ticks, 500)
    sane = [tick for tick in ticks if tick.s > 310]
    assert {tick.steering.state for tick in sane} <= {SteeringState.SLEWING, SteeringState.LOCKED}
    if kind in ("is frozen now and then", "says anything"):
        assert settled_at(ticks, 25) < 330


@pytest.mark.row("E11")
@pytest.mark.parametrize("ppm", [300, -300, 1])
def test_a_change_of_rate_is_found(ppm: float) -> None:
    """A reference slewed as NTP does it: seen at the third tick, worked off in 30 more, by no more than max_ppm."""
    reference = SimulatedReference(lambda s: ppm * PPM * (100 <= s < 200))
    ticks = list(follow(reference, 300))
    assert corrections_within(ticks, 500)
    turned = [tick for tick in ticks if abs(tick.lag_ns) > 25]
    assert turned
    assert max(abs(tick.lag_ns) for tick in turned) < 4.5 * abs(ppm) * PPM * 1e9
    assert not [tick for tick in turned if 130 < tick.s < 200 or tick.s > 230]


@pytest.mark.row("E11")
def test_a_lone_wrong_sample_changes_nothing() -> None:
    """One reading that is 1 s wrong, or three that contradict each other: the correction stays as it was."""
    wrong = {200: 1e9, 300: -5e8, 301: 5e8, 302: 7e8}
    reference = SimulatedReference(lambda _: 66.8 * PPB, fault=lambda s, ns: ns + wrong.get(int(s), 0))
    ticks = list(follow(reference, 400, interval_s=0.99))
    late = [tick for tick in ticks if tick.s > 190]
    assert max(abs(float(tick.steering.frequency_adjustment) - 66.8 * PPB) for tick in late) < 15 * PPB


@pytest.mark.row("E9", "E11")
@settings(max_examples=200, deadline=None)
@given(
    readings=st.lists(
        st.tuples(
            st.integers(0, 2**64 - 1) | st.integers(0, 10**10),
            st.integers(-(2**63), 2**63) | st.integers(-(10**6), 10**6),
            st.floats(0, 1e12) | st.sampled_from([0.0, 20.0]),
        ),
        max_size=40,
    ),
    max_ppm=st.sampled_from([1, 500, 100_000]),
)
def test_no_reading_takes_it_beyond_max_ppm(readings: list[tuple[int, int, float]], max_ppm: int) -> None:
    """Whatever TSC, reference and bound say, there is an answer, and the correction stays within its bound."""
    discipline = Discipline(HZ, max_ppm)
    tsc = ns = 0
    for ticks, extra_ns, bound_ns in readings:
        tsc = (tsc + ticks) % 2**64
        ns += ticks * 10**9 // HZ + extra_ns
        steering = discipline.steer(Sample(HostTsc(tsc), ns, bound_ns), Fraction(ns))
        assert abs(steering.frequency_adjustment) <= Fraction(max_ppm, 10**6)
        assert not math.isnan(steering.error_ns)


@pytest.mark.row("E11")
@pytest.mark.parametrize("back", [0, 49 * HZ - 1], ids=["to 0", "by one tick"])
def test_a_tsc_that_went_back_is_a_new_beginning(back: int) -> None:
    """After it the clock is taken as right again, at the rate that was known; a TSC that wraps is no such thing."""
    discipline = Discipline(HZ)
    for second in range(100):
        ns = second * (10**9 + 1000)
        steering = discipline.steer(Sample(HostTsc((second - 50) * HZ % 2**64), ns, 1.0), Fraction(ns))
    assert steering.state is SteeringState.LOCKED
    assert float(steering.frequency_adjustment) == pytest.approx(1 * PPM, abs=1 * PPB)
    steering = discipline.steer(Sample(HostTsc(back), 77, 1.0), Fraction(10**6))
    assert (steering.state, steering.error_ns) == (SteeringState.LEARNING, 0)
    assert float(steering.frequency_adjustment) == pytest.approx(1 * PPM, abs=1 * PPB)


@pytest.mark.row("E11", "E9")
@pytest.mark.parametrize("after", [3, 10**6, 2**63, 2**64 - 1])
def test_a_renumbered_tsc_changes_nothing(after: int) -> None:
    """A host TSC that steps between two samples, back through 0 too: all that follows is as without, to the tick."""
    plain, renumbered = Discipline(1000), Discipline(1000)  # a tick is a million ns
    for second in range(10):
        for discipline in (plain, renumbered):
            discipline.steer(Sample(HostTsc(second * 1000), second * 1_000_000_100, 5.0), Fraction(second * 10**9))
    before = 9007
    renumbered.renumber(HostTsc(before), HostTsc(after))
    for ticks in (0, 993, 1993):
        now, host_ns = HostTsc((after + ticks) % 2**64), Fraction((before + ticks) * 10**6)
        assert renumbered.coast(now, host_ns) == plain.coast(HostTsc(before + ticks), host_ns)
        ns = (before + ticks) * 1_000_000 + 5
        steered = renumbered.steer(Sample(now, ns, 5.0), host_ns)
        assert steered == plain.steer(Sample(HostTsc(before + ticks), ns, 5.0), host_ns)


@pytest.mark.row("E11", "E2")
@pytest.mark.parametrize("sign", [1, -1])
def test_by_default_500_ppm_are_reached_and_not_exceeded(sign: int) -> None:
    """A reference set by 1 s is followed at 500 ppm; one that runs 499.9 ppm off is trusted, one 500.1 ppm off not."""
    discipline, adjustments = Discipline(HZ), []
    for second in range(20):
        sample = Sample(HostTsc(second * HZ), (second + sign * (second > 9)) * 10**9, 20.0)
        adjustments.append(sign * discipline.steer(sample, Fraction(second * 10**9)).frequency_adjustment)
    assert 0 <= Fraction(500, 10**6) - max(adjustments) <= Fraction(1, 2**50)
    for off_ns, is_trusted in ((499_900, True), (500_100, False)):
        discipline = Discipline(HZ)
        for second in range(20):
            sample = Sample(HostTsc(second * HZ), second * (10**9 + sign * off_ns), 5.0)
            rate = discipline.steer(sample, Fraction(second * 10**9)).rate.value
        assert (abs(rate - sign * off_ns * PPB) < 1 * PPM) == is_trusted


@pytest.mark.row("E11")
@pytest.mark.parametrize(("kind", "wrong"), [("rate", 2), ("set", 3)])
def test_a_reference_that_was_set_must_say_so_once_more(kind: str, wrong: int) -> None:
    """A change of rate is followed at its third sample, a set of 20 ms at its fourth, however long all was well."""
    discipline, adjustments = Discipline(HZ), []
    for second in range(100 + wrong + 1):
        since = max(second - 99, 0)
        ns = second * 10**9 + (since * 300_000 if kind == "rate" else 20_000_000 * (since > 0))
        steering = discipline.steer(Sample(HostTsc(second * HZ), ns, 20.0), Fraction(second * 10**9))
        adjustments.append(abs(float(steering.frequency_adjustment)))
    assert max(adjustments[:-1]) < 1 * PPM
    assert adjustments[-1] > 250 * PPM


@pytest.mark.row("E11")
def test_an_exact_sample_is_taken_as_right_within_half_a_ns() -> None:
    """Even an exact source gives whole ns: two of its samples 1 s apart tell a rate within 1 ppb, and no better."""
    discipline = Discipline(HZ)
    for second in range(2):
        steering = discipline.steer(Sample(HostTsc(second * HZ), second * 10**9, 0.0), Fraction(second * 10**9))
    assert steering.rate.bound == pytest.approx(1 * PPB)
    assert steering.rate.value == 0


@pytest.mark.row("E11")
def test_two_looks_at_one_instant_are_one() -> None:
    """A tick that is repeated before any time has passed changes nothing."""
    discipline = Discipline(HZ)
    for second in range(10):
        sample = Sample(HostTsc(second * HZ), second * 1_000_000_100, 5.0)
        first = discipline.steer(sample, Fraction(second * 10**9))
        assert discipline.steer(sample, Fraction(second * 10**9)).frequency_adjustment == first.frequency_adjustment


@pytest.mark.row("E11")
@pytest.mark.parametrize("wrong", [1, 2, 3])
@pytest.mark.parametrize("ns", [1e9, -1e9])
def test_wrong_samples_at_the_beginning_are_forgiven(wrong: int, ns: float) -> None:
    """The first samples are off, each otherwise: the clock takes the first good ones as its beginning, and no slew."""
    reference = SimulatedReference(lambda _: 66.8 * PPB, fault=lambda s, now: now + ns * (s + 1) * (s < wrong - 0.5))
    ticks = list(follow(reference, 60))
    assert max(abs(float(tick.steering.frequency_adjustment)) for tick in ticks) < 1 * PPM
    assert ticks[-1].steering.state is SteeringState.LOCKED


@pytest.mark.row("E11", "E9")
def test_samples_that_floats_cannot_tell_apart() -> None:
    """After 36 years two samples a tick apart are one instant: no division by nothing, and a step is found."""
    discipline, far_s = Discipline(HZ), 2**60 // 10**9

    def steer(s: int, ticks: int, ns: int) -> float:
        steering = discipline.steer(Sample(HostTsc((s * HZ + ticks) % 2**64), ns, 20.0), Fraction(s * 10**9))
        assert abs(steering.frequency_adjustment) <= Fraction(500, 10**6)
        assert steering.bound_ns < 1000
        return steering.error_ns

    steer(0, 0, 0)
    steer(far_s, 0, far_s * 10**9)
    errors_ns = []
    for second in range(10):
        errors_ns.append(steer(far_s + second, 0, (far_s + second + 5 * (second > 2)) * 10**9))
        errors_ns.append(steer(far_s + second, 1, (far_s + second + 5 * (second > 2)) * 10**9))
    assert max(map(abs, errors_ns[:6])) < 100
    assert abs(errors_ns[-1] - 5 * 10**9) < 100


@pytest.mark.row("E13")
@pytest.mark.parametrize("max_ppm", [0, -1, 100_001, math.inf, math.nan])
def test_max_ppm_is_checked(max_ppm: float) -> None:
    """A bound that is none is an error that says what can be."""
    with pytest.raises(RangeError, match="above 0 and up to 100000"):
        Discipline(HZ, max_ppm)
