"""Fewer points and marks that show the same: no extreme is lost, no gap is closed, no band is narrowed."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

from pvclock.meter.report.model import MARKS_MAX, POINTS_MAX, Line, Mark, Standing

__all__ = ["KINDS_MAX", "thinned", "thinned_marks"]

POINTS_A_BUCKET: Final = 4
"""The first, the last, the least and the greatest."""
KINDS_MAX: Final = 8
"""Kinds of marks that one can tell apart; the rarest ones beyond are one kind."""
OTHER: Final = "other"


class Bucket(NamedTuple):
    """A line's points from index `begin` until before `end`, which are drawn at about one place."""

    begin: int
    end: int


def thinned(line: Line, points_max: int = POINTS_MAX, *, is_log: bool = False) -> Line:
    """Return a line of no more than so many points (8 at least) that looks the same.

    Of each bucket, an equal part of the x axis, the first and last point and those of the least and greatest y are
    kept.  Two points that have NaN between them still have.  The band of a kept point is that of its whole bucket.
    is_log: the x axis is logarithmic, so points that are not right of 0 are left out.
    """
    line = _placeable(line, is_log=is_log)
    if len(line.x) <= points_max:
        return line
    buckets_wanted = points_max // POINTS_A_BUCKET
    kept, low, high = _kept(line, buckets_wanted)
    while len(kept) > points_max and buckets_wanted > 1:  # gaps took more points than buckets have on their own
        buckets_wanted = buckets_wanted * 2 // 3
        kept, low, high = _kept(line, buckets_wanted)
    x, y = [line.x[it] for it in kept], [line.y[it] for it in kept]
    return line._replace(x=x, y=y, low=low, high=high, of=line.of or len(line.x))


def _placeable(line: Line, *, is_log: bool) -> Line:
    """Return a line without the points that are nowhere along x."""
    least = 0.0 if is_log else -math.inf
    if math.isfinite(sum(line.x)) and (not len(line.x) or line.x[0] > least):
        return line
    kept = [index for index, x in enumerate(line.x) if math.isfinite(x) and x > least]
    x, y, low, high = (
        [column[it] for it in kept] if len(column) else () for column in (line.x, line.y, line.low, line.high)
    )
    return line._replace(x=x, y=y, low=low, high=high)


def _kept(line: Line, buckets_wanted: int) -> tuple[list[int], list[float], list[float]]:
    """Return which points of a line are kept, with the band of each."""
    kept: list[int] = []
    low: list[float] = []
    high: list[float] = []
    for bucket in _buckets(line.x, buckets_wanted):
        indexes = _kept_of(line.y, bucket)
        kept += indexes
        if len(line.low):
            least = _extreme(min, line.low[bucket.begin : bucket.end])
            most = _extreme(max, line.high[bucket.begin : bucket.end])
            low += [math.nan if math.isnan(line.low[it]) else least for it in indexes]
            high += [math.nan if math.isnan(line.high[it]) else most for it in indexes]
    return kept, low, high


def _buckets(x: Sequence[float], wanted: int) -> Iterator[Bucket]:
    """Give the points by equal parts of the x axis, those parts left out that have none."""
    begin, count = 0, len(x)
    first, last = x[0], x[-1]
    while begin < count:
        part = min(int((x[begin] / wanted - first / wanted) / ((last - first) / wanted or 1.0) * wanted), wanted - 1)
        limit = first + (last - first) * ((part + 1) / wanted)
        after = max(bisect_left(x, limit, begin, count), bisect_right(x, x[begin], begin, count))
        end = count if part == wanted - 1 else after
        yield Bucket(begin, end)
        begin = end


def _kept_of(y: Sequence[float], bucket: Bucket) -> list[int]:
    """Return the indexes that are kept of a bucket, rising."""
    begin, end = bucket
    if end - begin <= POINTS_A_BUCKET:
        return list(range(begin, end))
    part = y[begin:end]
    if not math.isnan(sum(part)):
        return sorted({begin, end - 1, begin + part.index(min(part)), begin + part.index(max(part))})
    known = [it for it in part if not math.isnan(it)]
    extremes = {begin + part.index(min(known)), begin + part.index(max(known))} if known else set()
    return _with_gaps(y, sorted({begin, end - 1} | extremes))


def _with_gaps(y: Sequence[float], kept: list[int]) -> list[int]:
    """Add to kept points one that is NaN wherever the line is broken between two of them."""
    gaps = [_gap_between(y, before, after) for before, after in pairwise(kept)]
    return sorted([*kept, *(it for it in gaps if it is not None)])


def _gap_between(y: Sequence[float], before: int, after: int) -> int | None:
    """The first point that is NaN between two of a line that are not; None, if there is none."""
    if math.isnan(y[before]) or math.isnan(y[after]) or not math.isnan(sum(y[before:after])):
        return None
    return next((it for it in range(before, after) if math.isnan(y[it])), None)


def _extreme(choose: Callable[[Iterable[float]], float], values: Sequence[float]) -> float:
    """The least or greatest number of these; NaN, if none is one."""
    if not math.isnan(sum(values)):
        return choose(values)
    known = [it for it in values if not math.isnan(it)]
    return choose(known) if known else math.nan


def thinned_marks(marks: Sequence[Mark], marks_max: int = MARKS_MAX) -> tuple[Mark, ...]:
    """Return no more than so many marks, by x: of each kind the bad ones first, then the greatest.

    A mark that is kept stands for those of its kind that were left out from there to the next one.
    """
    marks = _of_few_kinds([it for it in marks if math.isfinite(it.x)])
    kinds: dict[str, list[Mark]] = {}
    for mark in sorted(marks, key=lambda it: it.x):
        kinds.setdefault(mark.kind, []).append(mark)
    shares = _shares([len(it) for it in kinds.values()], marks_max)
    kept = [mark for each, share in zip(kinds.values(), shares, strict=True) for mark in _greatest(each, share)]
    return tuple(sorted(kept, key=lambda it: it.x))


def _of_few_kinds(marks: Sequence[Mark]) -> list[Mark]:
    """Return marks of KINDS_MAX kinds at most: what is of the rarest kinds has its kind in its text."""
    counts: dict[str, int] = {}
    for mark in marks:
        counts[mark.kind] = counts.get(mark.kind, 0) + mark.stands_for
    if len(counts) <= KINDS_MAX:
        return list(marks)
    own = set(sorted(counts, key=lambda it: -counts[it])[: KINDS_MAX - 1])
    return [it if it.kind in own else it._replace(kind=OTHER, text=f"{it.kind}: {it.text}") for it in marks]


def _shares(counts: Sequence[int], limit: int) -> list[int]:
    """Return how many of each there may be: all of what is rare, and equal parts of the rest for the others."""
    shares = [0] * len(counts)
    by_count = sorted(range(len(counts)), key=counts.__getitem__)
    for place, which in enumerate(by_count):
        shares[which] = min(counts[which], limit // (len(counts) - place))
        limit -= shares[which]
    return shares


def _greatest(marks: list[Mark], share: int) -> list[Mark]:
    """Return the greatest of marks that are sorted by x, each standing for those after it that are left out."""
    if len(marks) <= share:
        return marks
    chosen = sorted(heapq.nlargest(share, range(len(marks)), key=lambda it: _weight(marks[it])))
    ends = [*chosen[1:], len(marks)]
    begins = [0, *chosen[1:]]  # what is before the first one that is kept is of its share, too
    return [
        marks[it]._replace(stands_for=sum(each.stands_for for each in marks[begin:end]))
        for it, begin, end in zip(chosen, begins, ends, strict=True)
    ]


def _weight(mark: Mark) -> tuple[bool, float]:
    return mark.standing == Standing.BAD, 0.0 if math.isnan(mark.size) else abs(mark.size)
