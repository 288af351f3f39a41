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

from pvclock.errors import RangeError
from pvclock.readings import Sample

__all__ = ["Baseline", "Point", "Rate", "Sampler", "SampleSource"]

SampleSource: TypeAlias = Callable[[], Sample]

BOUNDS_KEPT: Final = 16
POINTS_KEPT: Final = 64

LEAST_BOUND_NS: Final = 0.5
"""A source that claims to be exact gives whole ns all the same."""


class Sampler:
    """Samples from `source`, without those that are much worse than is usual for it.

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
        self._bounds.append(sample.bound_ns)
        return sample


class Rate(NamedTuple):
    """A relative rate and how far the true one can be from it; 1e-9 is a ppb."""

    value: float
    bound: float


class Point(NamedTuple):
    """A sample against nominal time: at nominal_ns the reference was ahead of it by deviation_ns, within bound_ns."""

    nominal_ns: float
    deviation_ns: float
    bound_ns: float


class Baseline:
    """The straight lines, deviation over nominal time, that pass all of a run's points within their bounds.

    Lines steeper than `steepest` (a relative rate) are not considered.  A point that no line allows is not admitted, so
    the rate is right within its bound as long as the points are within theirs and the true rate does not change.
    Bounded: of many points the older ones are thinned out; what they said of the rate is kept.
    """

    def __init__(self, steepest: float = 1.0) -> None:
        self.points: list[Point] = []
        self._least, self._most = -steepest, steepest

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

    def deviation_at(self, nominal_ns: float, rate: float) -> tuple[float, float]:
        """(value, bound) in ns where a line of that possible rate is: the middle of where it can be.

        The bound is on the true line, whose rate may be any other possible one.
        """
        low = least = -inf
        high = most = inf
        for point in self.points:
            span = nominal_ns - point.nominal_ns
            under, over = point.deviation_ns - point.bound_ns, point.deviation_ns + point.bound_ns
            low, high = max(low, under + rate * span), min(high, over + rate * span)
            least, most = max(least, under + self._least * span), min(most, over + self._most * span)
        value = (high + low) / 2
        return value, max(most - value, value - least)

    def extend_back(self, earlier: list[Point]) -> None:
        """Take as many of `earlier`, which ends before this begins, as a line allows, from the newest on."""
        for point in reversed(earlier):
            least, most = self._rates_with(point)
            if least > most:
                break
            self._least, self._most = least, most
            self.points.insert(0, point)

    def _rates_with(self, point: Point) -> tuple[float, float]:
        """The least and the greatest rate of lines that allow `point`, too; crossed if there are none."""
        least, most = self._least, self._most
        for other in self.points:
            span = point.nominal_ns - other.nominal_ns
            rate = (point.deviation_ns - other.deviation_ns) / span
            slack = (point.bound_ns + other.bound_ns) / abs(span)
            least, most = max(least, rate - slack), min(most, rate + slack)
        return least, most
