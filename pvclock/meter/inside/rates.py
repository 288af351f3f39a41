"""How fast a clock ran against the first CPU's TSC, and what frequency of the TSC that makes: intervals, exactly.

A reading lies between two of the TSC; the clock itself was within RESOLUTION units of what it read.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations
from typing import Final, NamedTuple

from pvclock.meter.inside.record import ClockRecord, Sample

__all__ = ["Interval", "RateChange", "rate_change", "tsc_hz_by"]

RESOLUTION: Final = 2
"""Units of a clock that its reading may be off by: one that it is cut to, one that its writer rounds."""


class Interval(NamedTuple):
    """All from `low` to `high`."""

    low: Fraction
    high: Fraction


class RateChange(NamedTuple):
    """The rate of a later part of the run over an earlier one's, minus 1, in ppb; the parts' TSC readings."""

    ppb: Interval
    earlier: tuple[int, int]
    later: tuple[int, int]


def tsc_hz_by(clock: ClockRecord) -> Interval | None:
    """The TSC's ticks in a second of that clock, over the whole run; None if its samples do not say."""
    samples = _in_order(clock)
    ran = _rate(samples[0], samples[-1]) if len(samples) > 1 else None
    if ran is None or ran.low <= 0:
        return None
    return Interval(clock.hz / ran.high, clock.hz / ran.low)


def rate_change(clock: ClockRecord, *, halves: bool = False) -> RateChange | None:
    """The change of rate that is proven best, of any two parts of the run, or of its halves alone."""
    samples = _in_order(clock)
    middle = len(samples) // 2
    spans = [(0, middle), (middle, len(samples) - 1)] if halves else list(combinations(range(len(samples)), 2))
    rates = [(samples[a], samples[b], _rate(samples[a], samples[b])) for a, b in spans if a < b]
    changes = [
        RateChange(
            Interval((after.low / before.high - 1) * 10**9, (after.high / before.low - 1) * 10**9),
            (begin.tsc_before, end.tsc_after),
            (again.tsc_before, last.tsc_after),
        )
        for (begin, end, before), (again, last, after) in combinations(rates, 2)
        if before and after and before.low > 0 and after.low > 0 and again.tsc_before >= end.tsc_before
    ]
    return max(changes, key=lambda change: max(change.ppb.low, -change.ppb.high), default=None)


# Inside


def _in_order(clock: ClockRecord) -> list[Sample]:
    """The samples that were taken (others are zeros), as long as the TSC went on."""
    found: list[Sample] = []
    for sample in clock.samples:
        if sample.tsc_after and (found[-1].tsc_after if found else 0) < sample.tsc_before <= sample.tsc_after:
            found.append(sample)
    return found


def _rate(first: Sample, last: Sample) -> Interval | None:
    """Units a tick between two samples; None if the time between may have been none."""
    units = last.clock - first.clock
    ticks_least, ticks_most = last.tsc_before - first.tsc_after, last.tsc_after - first.tsc_before
    if ticks_least <= 0:
        return None
    low, high = units - RESOLUTION, units + RESOLUTION
    return Interval(
        Fraction(low, ticks_most if low > 0 else ticks_least), Fraction(high, ticks_least if high > 0 else ticks_most)
    )
