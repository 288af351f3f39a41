"""The Allan deviation, against its definition in exact arithmetic and against noises of which it is known."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from itertools import accumulate

import pytest

from pvclock.meter.allan import allan_deviations, even_segments

pytestmark = pytest.mark.row("E10")

SEED = 17


def by_definition(x: list[Fraction], m: int, interval_s: Fraction) -> float:
    """Return the overlapping Allan deviation as textbooks have it: the root of half the mean square of differences."""
    tau_s = m * interval_s
    rates = [(x[i + m] - x[i]) / tau_s for i in range(len(x) - m)]
    squares = [(rates[i + m] - rates[i]) ** 2 for i in range(len(rates) - m)]
    return math.sqrt(sum(squares) / (2 * len(squares)))


def slope(phase: list[float]) -> float:
    """Return how the deviation goes with tau, as the exponent between a tau of 1 and one of 64 intervals."""
    found = allan_deviations([phase], 1.0)
    return math.log(found[6].ppb / found[0].ppb) / math.log(found[6].tau_s / found[0].tau_s)


def white(count: int) -> list[float]:
    """Return white noise."""
    source = random.Random(SEED)  # noqa: S311  # no secret
    return [source.gauss(0, 100) for _ in range(count)]


def test_it_is_the_definition() -> None:
    """At each tau the deviation is the textbook's, of exact phases of any size, to a float's rounding."""
    source = random.Random(SEED)  # noqa: S311  # no secret
    exact = [Fraction(source.randint(-(10**12), 10**12), 1024) for _ in range(200)]
    found = allan_deviations([[float(x) for x in exact]], 0.25)
    assert [each.tau_s for each in found] == [0.25, 0.5, 1, 2, 4, 8, 16]
    for m, each in zip((1, 2, 4, 8, 16, 32, 64), found, strict=True):
        assert each.ppb == pytest.approx(by_definition(exact, m, Fraction(1, 4)), rel=1e-12)
        assert each.terms == 200 - 2 * m


def test_a_constant_frequency_has_none() -> None:
    """A clock that is off by a constant rate, whatever it is, deviates by nothing."""
    found = allan_deviations([[1000 + 64.5 * second for second in range(100)]], 1.0)
    assert len(found) == 6
    assert [each.ppb for each in found] == [0] * 6


def test_a_constant_drift_rises_with_tau() -> None:
    """A rate that changes by d in a second deviates by d tau / sqrt 2."""
    found = allan_deviations([[3.0 * second**2 for second in range(100)]], 1.0)
    assert len(found) == 6
    for each in found:
        assert each.ppb == pytest.approx(6 * each.tau_s / math.sqrt(2), rel=1e-12)


def test_white_phase_noise() -> None:
    """Noise of the readings falls as 1 / tau, from sqrt 3 of its size at one interval."""
    found = allan_deviations([white(20_000)], 1.0)
    assert found[0].ppb == pytest.approx(math.sqrt(3) * 100, rel=0.03)
    assert slope(white(20_000)) == pytest.approx(-1, abs=0.05)


def test_white_frequency_noise() -> None:
    """Noise of the rate falls as 1 / sqrt tau, from its own size at one interval."""
    phase = list(accumulate(white(20_000)))
    assert allan_deviations([phase], 1.0)[0].ppb == pytest.approx(100, rel=0.03)
    assert slope(phase) == pytest.approx(-0.5, abs=0.05)


def test_a_random_walk_of_the_rate() -> None:
    """A rate that walks rises as sqrt tau."""
    assert slope(list(accumulate(accumulate(white(20_000))))) == pytest.approx(0.5, abs=0.1)


def test_the_confidence_is_of_the_number_of_samples() -> None:
    """The band is narrow where many differences were, and wide at the longest tau."""
    found = allan_deviations([white(3000)], 1.0)
    widths = [each.high_ppb / each.low_ppb for each in found]
    assert widths == sorted(widths)
    assert widths[0] < 1.1
    assert widths[-1] > 1.5
    assert all(each.low_ppb < each.ppb < each.high_ppb for each in found)


def test_the_truth_is_in_the_band_as_often_as_it_says() -> None:
    """Of white noise of the rate about 68 times in 100, at every tau."""
    source = random.Random(SEED)  # noqa: S311  # no secret
    within = [0] * 6
    for _ in range(150):
        phase = list(accumulate(source.gauss(0, 100) for _ in range(200)))
        for place, each in enumerate(allan_deviations([phase], 1.0)[:6]):
            within[place] += each.low_ppb <= 100 / math.sqrt(each.tau_s) <= each.high_ppb
    assert min(within) > 0.55 * 150
    assert max(within) < 0.85 * 150


def test_of_many_samples_some_are_left_out() -> None:
    """Of more than 100,000 differences every second, third, ... counts: the result is the same, nearly."""
    noise = white(250_000)
    found = allan_deviations([noise], 1.0)
    assert found[0].terms <= 125_000
    assert found[0].ppb == pytest.approx(math.sqrt(3) * 100, rel=0.02)


def test_of_many_short_segments_some_are_left_out() -> None:
    """Of segments with less differences than one in so many, each gives its first one."""
    noise = white(480_000)
    (found,) = allan_deviations([noise[place : place + 4] for place in range(0, 480_000, 4)], 1.0)
    assert found.terms == 120_000
    assert found.ppb == pytest.approx(math.sqrt(3) * 100, rel=0.02)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_of_too_few_nothing_is_said(count: int) -> None:
    """Of less than four readings, three rates, there is no deviation."""
    assert allan_deviations([[1.0] * count], 1.0) == []
    assert len(allan_deviations([[1.0] * 4], 1.0)) == 1


def test_no_difference_is_taken_across_segments() -> None:
    """Two segments of a constant rate, a second apart, deviate by nothing, and by much if they were one."""
    first, second = [5.0 * s for s in range(20)], [1e9 + 5.0 * s for s in range(20)]
    assert [each.ppb for each in allan_deviations([first, second], 1.0)] == [0, 0, 0]
    assert allan_deviations([first + second], 1.0)[0].ppb > 1e8


def test_segments_end_at_breaks_and_gaps() -> None:
    """A break, two missing readings and a reading at no whole interval each begin a new segment."""
    at_s = [0, 1, 2, 3, 6, 7, 8.5, 9.5]
    segments = even_segments(at_s, [10 * s for s in range(8)], 1.0, breaks={2})
    assert [list(segment) for segment in segments] == [[0, 10], [20, 30], [40, 50], [60, 70]]


def test_one_missing_reading_is_nan() -> None:
    """Whether it was not made or is unknown; two of them end the segment."""
    for at_s, ns in (([0, 1, 3, 4], [0, 10, 30, 40]), ([0, 1, 2, 3, 4], [0, 10, math.nan, 30, 40])):
        (segment,) = even_segments(at_s, ns, 1.0)
        assert list(segment) == pytest.approx([0, 10, math.nan, 30, 40], nan_ok=True)
    assert [list(it) for it in even_segments([0, 1, 2, 3], [0, math.nan, math.nan, 40], 1.0)] == [[0], [40]]


@pytest.mark.parametrize("part", [0.02, 0.1, 0.3])
def test_missing_readings_are_in_no_difference(part: float) -> None:
    """The deviation is the root mean square of those differences of which all three readings are known."""
    source = random.Random(SEED)  # noqa: S311  # no secret
    noise = white(3000)
    known = {0, 2999} | {place for place in range(3000) if source.random() >= part}
    segments = even_segments(range(3000), [noise[i] if i in known else math.nan for i in range(3000)], 1.0)
    begins = [place for place in range(3000) if place in known and not {place - 1, place - 2} & known]
    assert len(segments) == len(begins)
    belongs = [sum(begin <= place for begin in begins) for place in range(3000)]
    found = {each.tau_s: each for each in allan_deviations(segments, 1.0)}
    for m in (1, 2, 4, 8):
        triples = [(i, i + m, i + 2 * m) for i in range(3000 - 2 * m) if belongs[i] == belongs[i + 2 * m]]
        squares = [(noise[i] - 2 * noise[j] + noise[k]) ** 2 for i, j, k in triples if {i, j, k} <= known]
        assert found[m].terms == len(squares)
        assert found[m].ppb == pytest.approx(math.sqrt(sum(squares) / 2 / len(squares)) / m, rel=1e-12)


def test_where_every_second_reading_is_missing_tau_begins_at_two() -> None:
    """It is that of readings at twice the interval; half of them tell nothing of one interval."""
    noise = white(3000)
    halved = [noise[place] if place % 2 == 0 else math.nan for place in range(3000)]
    found = allan_deviations(even_segments(range(3000), halved, 1.0), 1.0)
    of_half = allan_deviations([noise[::2]], 2.0)
    assert [each.tau_s for each in found] == [each.tau_s for each in of_half]
    assert [each.ppb for each in found] == pytest.approx([each.ppb for each in of_half], rel=1e-12)


def test_missing_readings_and_those_left_out_are_at_different_places() -> None:
    """Of many differences one in two counts: not always that with a missing reading, nor never."""
    noise = [math.nan if place % 2 else ns for place, ns in enumerate(white(250_000))]
    found = allan_deviations([noise], 1.0)[0]
    assert found.tau_s == 2
    assert found.terms == pytest.approx(62_500, rel=0.01)
    assert found.ppb == pytest.approx(math.sqrt(3) * 100 / 2, rel=0.02)


def test_a_break_at_an_unknown_reading_counts() -> None:
    """What happened before a reading that is unknown happened before the next one that is known, too."""
    assert [list(it) for it in even_segments([0, 1, 2], [0, math.nan, 40], 1.0, breaks={1})] == [[0], [40]]


def test_readings_may_be_a_little_off_their_place() -> None:
    """A reading that came up to 0.4 of the interval late or early is moved to its place by the mean rate."""
    at_s = [0, 1.3, 2.1, 2.8, 4]
    (segment,) = even_segments(at_s, [50 * s for s in at_s], 1.0)
    assert list(segment) == pytest.approx([0, 50, 100, 150, 200], rel=1e-12)
    assert len(even_segments([0, 1.5, 3], [0, 1, 2], 1.0)) == 3


def test_late_readings_of_a_steady_clock_are_no_noise() -> None:
    """However late each reading of a clock of constant rate came, its deviation stays that of floats' rounding."""
    source = random.Random(SEED)  # noqa: S311  # no secret
    at_s = [second + source.uniform(-0.19, 0.19) for second in range(300)]
    found = allan_deviations(even_segments(at_s, [-51.4 * s for s in at_s], 1.0), 1.0)
    assert len(found) == 7
    assert max(each.ppb for each in found) < 1e-9
