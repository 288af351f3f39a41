"""Samples of host TSC against a reference clock, each right within a bound, and the rate that they give.

A `Sampler` picks good samples from any source.  A `Baseline` is the set of straight lines through all samples of a run,
within their bounds, so the error bound of its rate shrinks as the run grows.  This module reads no clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import inf
from typing import Final, NamedTuple, TypeAlias

from pvclock.errors import RangeError, WrongType
from pvclock.quantities import shown
from pvclock.readings import Sample

__all__ = ["Baseline", "Point", "Rate", "Sampler", "SampleSource"]

SampleSource: TypeAlias = Callable[[], Sample]

BOUNDS_KEPT: Final = 16
POINTS_KEPT: Final = 64
NS_MAX: Final = 1 << 63

LEAST_BOUND_NS: Final = 0.5
"""Least bound assumed of a sample: even an exact source gives whole ns."""


class Sampler:
    """Takes samples from `source` and drops those that are much worse than usual.

    A sample is bad if its bound exceeds `tolerance` times the median of the last 16; up to `tries` are taken to get a
    good one.  Errors of the source pass through; RangeError for a sample without a finite bound.
    """

    def __init__(self, source: SampleSource, *, tries: int = 4, tolerance: float = 3.0) -> None:
        if tries < 1 or tolerance < 1:
            raise RangeError(f"Sampler(tries={tries}, tolerance={tolerance}); both are 1 or more")
        self.dropped = 0
        """Number of bad samples."""
        self._source = source
        self._tries = tries
        self._tolerance = tolerance
        self._bounds: deque[float] = deque(maxlen=BOUNDS_KEPT)

    def sample(self) -> Sample:
        """The first good sample, or the best of those tried."""
        best = self._taken()
        for _ in range(self._tries - 1):
            if best.bound_ns <= self._tolerance * max(self._median_ns, LEAST_BOUND_NS):
                return best
            self.dropped += 1
            best = min(best, self._taken(), key=lambda it: it.bound_ns)
        return best

    @property
    def _median_ns(self) -> float:
        """The lower median; statistics.median() would bring in decimal and random."""
        return sorted(self._bounds)[(len(self._bounds) - 1) // 2]

    def _taken(self) -> Sample:
        sample = self._source()
        if not isinstance(sample, Sample):
            raise WrongType("a source's sample", sample, "a Sample(tsc, ns, bound_ns)")
        if not (0 <= sample.bound_ns < inf and abs(sample.ns) < NS_MAX):
            raise RangeError(
                f"a sample of {shown(sample.ns)} ns, within {shown(sample.bound_ns)}: its bound must be finite and at "
                f"least 0 ns, and its ns within 2^63"
            )
        self._bounds.append(sample.bound_ns)
        return sample


class Rate(NamedTuple):
    """A relative rate, and how far the true one can be from it; 1e-9 is one ppb."""

    value: float
    bound: float


class Point(NamedTuple):
    """A sample against nominal time: at nominal_ns the reference was low_ns to high_ns ahead."""

    nominal_ns: float
    low_ns: float
    high_ns: float


class Baseline:
    """The straight lines, deviation over nominal time, that pass all of a run's points within their bounds.

    Lines steeper than `steepest` (a relative rate) are excluded.  A point that fits no line is not admitted, so the
    rate is right within its bound as long as the points are within theirs and the true rate is constant.  It keeps at
    most 64 points: older ones are thinned out, but still bound the rate.
    """

    def __init__(self, steepest: float = 1.0) -> None:
        self.points: list[Point] = []
        self._least, self._most = -steepest, steepest

    def copy(self) -> Baseline:
        """A copy in the same state."""
        copied = Baseline.__new__(Baseline)  # copy.copy() takes three times as long, and each tick makes copies
        vars(copied).update(vars(self), points=self.points.copy())
        return copied

    @property
    def rate(self) -> Rate:
        """The middle of the possible rates."""
        return Rate((self._most + self._least) / 2, (self._most - self._least) / 2)

    def admit(self, point: Point) -> bool:
        """Add `point`, later than all others, if it fits a line; else return False and change nothing."""
        if self.points and point.nominal_ns <= self.points[-1].nominal_ns:
            return False
        least, most = self._rates_with(point)
        if least > most:
            return False
        self._least, self._most = least, most
        self.points.append(point)
        if len(self.points) > POINTS_KEPT:
            del self.points[1 : POINTS_KEPT // 2 : 2]
        return True

    def extend_back(self, earlier: list[Point]) -> None:
        """Prepend points of `earlier`, which all precede this run, from the newest back until one fits no line."""
        for point in reversed(earlier):
            least, most = self._rates_with(point)
            if least > most:
                break
            self._least, self._most = least, most
            self.points.insert(0, point)

    def deviation_at(self, nominal_ns: float, rate: float) -> tuple[float, float]:
        """(value, bound) of the deviation at nominal_ns, in ns.

        value: the middle of the possible lines of slope `rate`.  bound: distance to the farthest line of any possible
        rate.
        """
        spans = [nominal_ns - begin_ns for begin_ns, _, _ in self.points]
        lows, highs = [point.low_ns for point in self.points], [point.high_ns for point in self.points]
        value = (_highest(lows, rate, spans) + _lowest(highs, rate, spans)) / 2
        return value, max(_lowest(highs, self._most, spans) - value, value - _highest(lows, self._least, spans))

    def _rates_with(self, point: Point) -> tuple[float, float]:
        """Least and greatest rate of the lines through `point` as well; least > most if there is no such line."""
        at_ns, low_ns, high_ns = point
        least = [(low_ns - high) / (at_ns - other_ns) for other_ns, _, high in self.points]
        most = [(high_ns - low) / (at_ns - other_ns) for other_ns, low, _ in self.points]
        if self.points and at_ns < self.points[0].nominal_ns:
            least, most = most, least  # the line goes from `point` to the others
        return max([self._least, *least]), min([self._most, *most])


def _highest(ends: list[float], rate: float, spans: list[float]) -> float:
    return max([end + rate * span for end, span in zip(ends, spans, strict=True)])


def _lowest(ends: list[float], rate: float, spans: list[float]) -> float:
    return min([end + rate * span for end, span in zip(ends, spans, strict=True)])
