"""Allan deviation: how far a clock's rate, taken over a time tau, differs from that over the next tau.

Phase is what a clock is ahead of its reference, in ns, at an even interval.  A rate that is constant, whatever it is,
has a deviation of 0; white noise of the readings falls as 1/tau; a rate that wanders rises with tau.

A gap, a step or a pause is no noise: the samples on its two sides are separate segments, and no difference is taken
across.  A reading that came a little late or early is moved to its place by the mean rate of its segment.  A single
reading that is missing is nan, and no difference is taken with it; where two or more are missing the segment ends.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Collection, Iterator, Sequence
from typing import Final, NamedTuple

__all__ = ["Deviation", "allan_deviations", "even_segments"]

TERMS_MAX: Final = 100_000
"""Differences that are summed for a tau; of more, one in two, three, ... counts, which changes the result by
less than its confidence.
"""
GOLDEN: Final = (math.sqrt(5) - 1) / 2
"""Its multiples, less their whole part, fill 0 to 1 evenly and keep step with no period."""
OFF_MAX: Final = 0.4
"""A reading may be off its place by that part of the interval."""
SPAN_PARTS: Final = 3
"""The longest tau is that part of the longest segment: of less than three rates nothing can be said."""


class Deviation(NamedTuple):
    """The Allan deviation over tau_s, in ppb.

    low_ppb, high_ppb: where it is by the number of samples, 68 times in 100 if the rate's noise is white.  terms:
    differences that it is made of, which overlap.
    """

    tau_s: float
    ppb: float
    low_ppb: float
    high_ppb: float
    terms: int


def even_segments(
    at_s: Sequence[float], phase_ns: Sequence[float], interval_s: float, breaks: Collection[int] = ()
) -> list[array[float]]:
    """The phase at an even interval, cut where it is late by more than one reading, or at a break.

    Within a segment a reading that is missing, or unknown, is nan.

    breaks: places in at_s before which something happened that is no noise.
    """
    runs: list[_Run] = []
    last_s, is_cut = -math.inf, True
    for place, (now_s, now_ns) in enumerate(zip(at_s, phase_ns, strict=True)):
        is_cut = is_cut or place in breaks
        if math.isnan(now_ns):
            continue
        intervals = _intervals(now_s - last_s, interval_s)
        if is_cut or intervals not in {1, 2}:
            runs.append(_Run(array("d"), array("d"), array("q")))
        runs[-1].take(now_s, now_ns, intervals or 0)
        last_s, is_cut = now_s, False
    return [run.evenly(interval_s) for run in runs]


def allan_deviations(segments: Sequence[Sequence[float]], interval_s: float) -> list[Deviation]:
    """The overlapping Allan deviation at tau = 1, 2, 4, ... intervals, up to a third of the longest segment.

    For each tau of m intervals it is the root of half the mean of ((x[i + 2m] - 2 x[i + m] + x[i]) / tau)^2, over all
    i of all segments for which none of the three is nan; there is no deviation at a tau without any.
    """
    longest = max(map(len, segments), default=0)
    found = []
    m = 1
    while m * SPAN_PARTS <= longest - 1:
        found.append(_deviation(segments, m, m * interval_s))
        m *= 2
    return [deviation for deviation in found if deviation is not None]


# Inside


class _Run(NamedTuple):
    """Readings of which no more than one is missing between two; places: as intervals since the first."""

    at_s: array[float]
    ns: array[float]
    places: array[int]

    def take(self, at_s: float, ns: float, intervals: int) -> None:
        """Take a reading, so many intervals after the last."""
        self.places.append(self.places[-1] + intervals if self.places else 0)
        self.at_s.append(at_s)
        self.ns.append(ns)

    def evenly(self, interval_s: float) -> array[float]:
        """The readings moved to their places by the mean rate, for a late one shows the rate and no noise."""
        begin_s = self.at_s[0]
        length_s = self.at_s[-1] - begin_s
        rate = (self.ns[-1] - self.ns[0]) / length_s if length_s else 0.0
        even = array("d")
        for at_s, ns, place in zip(self.at_s, self.ns, self.places, strict=True):
            moved_ns = ns + rate * (place * interval_s - (at_s - begin_s))
            if len(even) < place:
                even.append(math.nan)
            even.append(moved_ns)
        return even


def _intervals(passed_s: float, interval_s: float) -> int | None:
    """How many intervals have passed; None if that is no whole number of them, or longer than anybody asks."""
    count = passed_s / interval_s
    if not count < TERMS_MAX:
        return None
    return round(count) if abs(count - round(count)) <= OFF_MAX else None


def _deviation(segments: Sequence[Sequence[float]], m: int, tau_s: float) -> Deviation | None:
    """None if there is no difference without a missing reading."""
    counts = [max(len(segment) - 2 * m, 0) for segment in segments]
    stride = max(sum(counts) // TERMS_MAX, 1)
    taken, terms, total = 0, 0, 0.0
    for segment, count in zip(segments, counts, strict=True):
        places = _places(count, stride)
        squares = array("d", (square for square in _squares(segment, m, places) if not math.isnan(square)))
        taken += len(places)
        terms += len(squares)
        total += math.fsum(squares)
    if not terms:
        return None
    ppb = math.sqrt(total / (2 * terms)) / tau_s
    error = 1 / math.sqrt(2 * _degrees_of_freedom(sum(counts) * terms / taken + 2 * m, m))
    return Deviation(tau_s, ppb, ppb / (1 + error), ppb * (1 + error), terms)


def _places(count: int, stride: int) -> Sequence[int]:
    """One place of each `stride`, at no period: readings that are missing at one would all be taken, or none."""
    if stride == 1:
        return range(count)
    places = (begin + int(block * GOLDEN % 1 * stride) for block, begin in enumerate(range(0, count, stride)))
    return [place for place in places if place < count]


def _degrees_of_freedom(readings: float, m: int) -> float:
    """How many independent differences those of so many readings are worth, if the rate's noise is white.

    Source: NIST SP 1065, table 5, white FM.
    """
    worth = (1.5 * (readings - 1) / m - 2 * (readings - 2) / readings) * 4 * m**2 / (4 * m**2 + 5)
    return max(worth, 1.0)


def _squares(x: Sequence[float], m: int, places: Sequence[int]) -> Iterator[float]:
    return ((x[i + 2 * m] - 2 * x[i + m] + x[i]) ** 2 for i in places)
