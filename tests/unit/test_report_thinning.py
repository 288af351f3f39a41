"""Fewer points and marks that show the same, beside a slow look at every point."""

import math
import random
from array import array
from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvclock.meter.report.model import Line, Mark, Standing
from pvclock.meter.report.thinning import KINDS_MAX, thinned, thinned_marks

pytestmark = pytest.mark.row("E10")

LIMITS = st.integers(8, 30)


SPECIAL = (math.nan, math.nan, math.inf, -math.inf, 0.0)


@st.composite
def lines(draw: st.DrawFn) -> Line:
    """Lines with gaps, points at one x, infinities and bands."""
    count, share = draw(st.integers(0, 90)), draw(st.sampled_from([0.0, 0.02, 0.2, 0.7]))
    chance = random.Random(draw(st.integers(0, 1 << 32)))  # noqa: S311 - a thousand floats drawn singly take long
    x = list(accumulate(chance.choice([0.0, 1e-3, 1.0, 1.0, 1.0, 100.0]) for _ in range(count)))
    y = [chance.choice(SPECIAL) if chance.random() < share else chance.uniform(-1e6, 1e6) for _ in x]
    low, high = ([it + sign * chance.uniform(0, 1e3) for it in y] for sign in (-1, 1))
    return Line("it", x, y, low, high)


def known(values: list[float]) -> list[float]:
    """Return the values that are numbers."""
    return [it for it in values if not math.isnan(it)]


def indexes_of(line: Line, thin: Line) -> list[int]:
    """Return which of a line's points are left, each x and y found from where the one before was."""
    indexes, begin = [], 0
    for x, y in zip(thin.x, thin.y, strict=True):
        begin = next(it for it in range(begin, len(line.x)) if line.x[it] == x and repr(line.y[it]) == repr(y)) + 1
        indexes.append(begin - 1)
    return indexes


@settings(max_examples=200)
@given(lines(), LIMITS)
def test_a_thinned_line_is_of_the_points_and_has_the_extremes(line: Line, limit: int) -> None:
    """It has points of the line only, in order, with the first, the last, the least and the greatest."""
    thin = thinned(line, limit)
    indexes = indexes_of(line, thin)
    assert indexes == sorted(set(indexes))
    assert len(indexes) <= limit
    assert len(thin.x) == len(thin.y) == len(thin.low) == len(thin.high) == len(indexes)
    if line.x:
        assert (thin.x[0], thin.x[-1]) == (line.x[0], line.x[-1])
    if numbers := known(list(line.y)):
        assert (min(known(list(thin.y))), max(known(list(thin.y)))) == (min(numbers), max(numbers))
    assert thin.of == (len(line.x) if len(indexes) < len(line.x) else 0)


@settings(max_examples=200)
@given(lines(), LIMITS)
def test_gaps_stay_gaps(line: Line, limit: int) -> None:
    """Two points between which the line was broken are not joined, and two that were joined are not broken."""
    thin = thinned(line, limit)
    indexes = indexes_of(line, thin)
    bridged = [
        (before, after)
        for before, after in pairwise(indexes)
        if not math.isnan(line.y[before]) and not math.isnan(line.y[after])
        if any(math.isnan(it) for it in line.y[before:after])
    ]
    assert bridged == []
    assert {it for it in indexes if math.isnan(line.y[it])} <= {it for it, y in enumerate(line.y) if math.isnan(y)}


@settings(max_examples=200)
@given(lines(), LIMITS)
def test_a_thinned_band_covers_the_band(line: Line, limit: int) -> None:
    """At each point's x the band between the two points that are left on its sides is as wide as the point's own."""
    thin = thinned(line, limit)
    uncovered = [
        (x, low, high)
        for x, low, high in zip(line.x, line.low, line.high, strict=True)
        if not math.isnan(low) and not is_covered(thin, x, low, high)
    ]
    assert uncovered == []


def is_covered(thin: Line, x: float, low: float, high: float) -> bool:
    """Whether a band reaches from low to high at some place beside x: slow, and without a word about buckets."""
    before = [it for it in range(len(thin.x)) if thin.x[it] <= x]
    after = [it for it in range(len(thin.x)) if thin.x[it] >= x]
    beside = {
        *[it for it in before if thin.x[it] == thin.x[before[-1]]],
        *[it for it in after if thin.x[it] == thin.x[after[0]]],
    }
    lows = known([thin.low[it] for it in beside])
    highs = known([thin.high[it] for it in beside])
    return not lows or (min(lows) <= low and high <= max(highs))


@settings(max_examples=200)
@given(lines(), LIMITS)
def test_a_band_covers_between_all_neighbours(line: Line, limit: int) -> None:
    """A line without gaps: at each of its points, the straight band between the neighbours that are left covers it."""
    whole = [it for it, y in enumerate(line.y) if math.isfinite(y)]
    x, y, low, high = ([column[it] for it in whole] for column in (line.x, line.y, line.low, line.high))
    line = Line("it", x, y, low, high)
    thin = thinned(line, limit)
    indexes = indexes_of(line, thin)
    for (place, before), after in zip(enumerate(indexes[:-1]), indexes[1:], strict=True):
        for it in range(before, after + 1):
            width = line.x[after] - line.x[before]
            part = (line.x[it] - line.x[before]) / width if width else 0.5
            least = thin.low[place] + part * (thin.low[place + 1] - thin.low[place])
            most = thin.high[place] + part * (thin.high[place + 1] - thin.high[place])
            assert least <= line.low[it] + 1e-6 or after == before + 1
            assert most >= line.high[it] - 1e-6 or after == before + 1
    assert len(thin.x) == len(indexes)


@settings(max_examples=100)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=100), LIMITS)
def test_how_many_points_are_left(y: list[float], limit: int) -> None:
    """No more than asked for; and a line of no more is as it was."""
    line = Line("it", [float(it) for it in range(len(y))], y)
    thin = thinned(line, limit)
    assert len(thin.x) <= limit
    assert (thin == line) == (len(y) <= limit)


def test_a_line_full_of_gaps() -> None:
    """Where every other point is unknown there are still no more points than asked for."""
    y = [math.nan if it % 2 else float(it % 17) for it in range(1000)]
    thin = thinned(Line("it", [float(it) for it in range(1000)], y), 40)
    assert len(thin.x) <= 40
    assert any(math.isnan(it) for it in thin.y)


def test_each_place_keeps_its_extremes() -> None:
    """A peak of one point is kept wherever it is, in a line of a million."""
    x = array("d", range(1_000_000))
    y = array("d", bytes(8 * len(x)))
    peaks = {7: 5.0, 333_333: -9.0, 333_340: 4.0, 999_001: 1.0}
    for where, peak in peaks.items():
        y[where] = peak
    thin = thinned(Line("it", x, y, y, y), 400)
    drawn = dict(zip(thin.x, thin.y, strict=True))
    assert peaks.items() <= drawn.items()
    assert 100 <= len(thin.x) <= 400
    assert thin.of == 1_000_000


def test_points_that_are_sparse_are_kept_beside_a_crowd() -> None:
    """Buckets are parts of the axis: a crowd at one place takes no room from the others."""
    x = [it / 1e6 for it in range(10_000)] + [float(it) for it in range(1, 51)]
    thin = thinned(Line("it", x, [float(it % 7) for it in range(len(x))]), 400)
    assert set(range(1, 51)) <= set(thin.x)


def test_points_that_are_nowhere() -> None:
    """A point whose x is no number is left out, with its band; points at one x alone are no error."""
    line = thinned(Line("it", [0.0, math.nan, 2.0], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [5.0, 6.0, 7.0]))
    assert (line.x, line.y, line.high) == ([0.0, 2.0], [1.0, 3.0], [5.0, 7.0])
    assert len(thinned(Line("it", [4.0] * 99, [float(it) for it in range(99)]), 8).x) <= 8


@st.composite
def marks(draw: st.DrawFn) -> list[Mark]:
    """Marks of a few kinds, some bad, in any order."""
    standings = st.sampled_from([Standing.BAD, Standing.PLAIN])
    numbers = st.tuples(st.floats(0, 100), st.sampled_from("abc"), standings, st.floats(-9, 9), st.integers(1, 3))
    found = draw(st.lists(numbers, max_size=80))
    return [Mark(x, kind, "", standing, size=size, stands_for=count) for x, kind, standing, size, count in found]


@settings(max_examples=100)
@given(marks(), st.integers(3, 30))
def test_marks_that_are_left_stand_for_all(given_marks: list[Mark], limit: int) -> None:
    """No more than asked for, by x; those of each kind stand for as many as there were; the greatest are left."""
    kept = thinned_marks(given_marks, limit)
    assert len(kept) <= limit or len(kept) == len(given_marks)
    assert [it.x for it in kept] == sorted(it.x for it in kept)
    for kind in "abc":
        before, after = ([it for it in each if it.kind == kind] for each in (given_marks, kept))
        assert sum(it.stands_for for it in after) == sum(it.stands_for for it in before)
        weights = sorted(((it.standing == Standing.BAD, abs(it.size)) for it in before), reverse=True)
        assert (
            sorted(((it.standing == Standing.BAD, abs(it.size)) for it in after), reverse=True) == weights[: len(after)]
        )
    assert len(kept) >= min(limit, len(given_marks)) - 2


def test_rare_kinds_are_kept_whole() -> None:
    """A kind of few marks loses none to one of many."""
    many = [Mark(float(it), "step", "", size=float(it % 10)) for it in range(10_000)]
    kept = thinned_marks([*many, *(Mark(it + 0.5, "pause", "") for it in range(20))], 100)
    assert sum(it.kind == "pause" for it in kept) == 20
    assert sum(it.kind == "step" for it in kept) == 80


def test_marks_of_many_kinds() -> None:
    """The kinds with the fewest marks, beyond those that can be told apart, are one, and their marks tell which."""
    kept = thinned_marks([Mark(float(it), f"kind {it % 20}", "what") for it in range(95)])
    assert len({it.kind for it in kept}) == KINDS_MAX
    assert {it.text for it in kept if it.kind == "other"} == {f"kind {it}: what" for it in range(7, 20)}


@pytest.mark.parametrize("x", [math.nan, math.inf, -math.inf])
def test_marks_that_are_nowhere(x: float) -> None:
    """A mark whose x is no number is left out; a size that is none is no size."""
    assert thinned_marks([Mark(x, "step", "")]) == ()
    assert [it.size for it in thinned_marks([Mark(0.0, "a", "", size=math.nan), Mark(1.0, "a", "", size=1.0)], 1)] == [
        1.0
    ]
