"""What pairs of readings say: host TSC against a reference clock, each pair true within a bound.

A `Sampler` picks good samples from any source; a `Baseline` is the straight lines that all samples of a run allow, and
so a rate whose error bound shrinks as the run grows.  Nothing here reads a clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import inf
from statistics import median
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
"""A source that claims to be exact gives whole ns all the same."""


class Sampler:
    """Samples from `source`, without those that are much worse than is usual for it.

    Errors of the source come out, and RangeError for a sample without a bound.

    A sample is bad if its bound is more than `tolerance` times the median of the last ones; up to `tries` are taken
    until one is not.
    """

    def __init__(self, source: SampleSource, *, tries: int = 4, tolerance: float = 3.0) -> None:
        if tries < 1 or tolerance < 1:
            raise RangeError(f"Sampler(tries={tries}, tolerance={tolerance}); both are 1 or more")
        self.dropped = 0
        """How many bad samples were left out."""
        self._source = source
        self._tries = tries
        self._tolerance = tolerance
        self._bounds: deque[float] = deque(maxlen=BOUNDS_KEPT)

    def sample(self) -> Sample:
        """A sample: the first good one or, of those that were tried, the best."""
        best = self._taken()
        for _ in range(self._tries - 1):
            if best.bound_ns <= self._tolerance * max(median(self._bounds), LEAST_BOUND_NS):
                return best
            self.dropped += 1
            best = min(best, self._taken(), key=lambda it: it.bound_ns)
        return best

    def _taken(self) -> Sample:
        sample = self._source()
        if not isinstance(sample, Sample):
            raise WrongType("a source's sample", sample, "a Sample(tsc, ns, bound_ns)")
        if not (0 <= sample.bound_ns < inf and abs(sample.ns) < NS_MAX):
            raise RangeError(
                f"a sample of {shown(sample.ns)} ns, within {shown(sample.bound_ns)}: its bound must be ns from 0 on, "
                f"not infinite, and its ns within 2^63"
            )
        self._bounds.append(sample.bound_ns)
        return sample


class Rate(NamedTuple):
    """A relative rate and how far the true one can be from it; 1e-9 is a ppb."""

    value: float
    bound: float


class Point(NamedTuple):
    """A sample against nominal time: at nominal_ns the reference was ahead of it by low_ns to high_ns."""

    nominal_ns: float
    low_ns: float
    high_ns: float


class Baseline:
    """The straight lines, deviation over nominal time, that pass all of a run's points within their bounds.

    Lines steeper than `steepest` (a relative rate) are not considered.  A point that no line allows is not admitted, so
    the rate is right within its bound as long as the points are within theirs and the true rate does not change.
    Bounded: of many points the older ones are thinned out; what they said of the rate is kept.
    """

    def __init__(self, steepest: float = 1.0) -> None:
        self.points: list[Point] = []
        self._least, self._most = -steepest, steepest

    def copy(self) -> Baseline:
        """Another one in the same state."""
        copied = Baseline.__new__(Baseline)  # copy.copy() takes three times as long, and each tick makes copies
        vars(copied).update(vars(self), points=self.points.copy())
        return copied

    @property
    def rate(self) -> Rate:
        """The middle of the rates that are possible."""
        return Rate((self._most + self._least) / 2, (self._most - self._least) / 2)

    def admit(self, point: Point) -> bool:
        """Take `point`, which is later than all others, if a line allows it.  False, and nothing changed, if none."""
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
        """Take as many of `earlier`, which ends before this begins, as a line allows, from the newest on."""
        for point in reversed(earlier):
            least, most = self._rates_with(point)
            if least > most:
                break
            self._least, self._most = least, most
            self.points.insert(0, point)

    def deviation_at(self, nominal_ns: float, rate: float) -> tuple[float, float]:
        """(value, bound) in ns where a line of that possible rate is: the middle of where it can be.

        The bound is on the true line, whose rate may be any other possible one.
        """
        spans = [nominal_ns - begin_ns for begin_ns, _, _ in self.points]
        lows, highs = [point.low_ns for point in self.points], [point.high_ns for point in self.points]
        value = (_highest(lows, rate, spans) + _lowest(highs, rate, spans)) / 2
        return value, max(_lowest(highs, self._most, spans) - value, value - _highest(lows, self._least, spans))

    def _rates_with(self, point: Point) -> tuple[float, float]:
        """The least and the greatest rate of lines that allow `point`, too; crossed if there are none."""
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
