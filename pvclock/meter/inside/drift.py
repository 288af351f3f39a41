"""How fast the offset of two CPUs moved during the run: bounds in ppb, from the windows of its eighths.

A window's low edge was seen at one instant of its exchange, its high edge at another.  When these were is known by the
exchanges' middles alone: one has ended before the next begins, so it is no longer than the way to its neighbours'.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations, pairwise
from typing import NamedTuple

from pvclock.meter.inside.record import ClockRecord, PairRecord, Slice
from pvclock.meter.inside.windows import slice_edges, sound_edges

__all__ = ["Drift", "drift_of"]


class Drift(NamedTuple):
    """The rate of b's reading minus a's, in ppb, between `low` and `high`, None where there is no bound.

    moved_ns: the most that is proven to have been added (negative: taken away) between two eighths; 0: nothing is.
    """

    low: Fraction | None
    high: Fraction | None
    moved_ns: Fraction


class _Seen(NamedTuple):
    """An eighth: its edges in ns, the TSC in its exchange's middle, and how far that can have reached."""

    low: Fraction
    high: Fraction
    middle: int
    reach: int


def drift_of(pair: PairRecord, clock: ClockRecord, tsc_hz: int) -> Drift | None:
    """The bounds of a pair's drift; None where fewer than two eighths had a round, or their order is not known."""
    seen = _seen(pair.slices, clock)
    if len(seen) < 2:
        return None
    lows, highs, moves = [], [], [Fraction(0)]
    sound = sound_edges([(each.low, each.high) for each in seen])
    for first, last in combinations(seen, 2):
        least, most = last.low - first.high, last.high - first.low
        lows.append(_slowest(least, first, last, tsc_hz))
        highs.append(_negated(_slowest(-most, first, last, tsc_hz)))
        if (first.low, first.high) in sound and (last.low, last.high) in sound:
            moves += [max(least, Fraction(0)), min(most, Fraction(0))]
    return Drift(
        max((each for each in lows if each is not None), default=None),
        min((each for each in highs if each is not None), default=None),
        max(moves, key=abs),
    )


# Inside


def _seen(slices: tuple[Slice, ...], clock: ClockRecord) -> list[_Seen]:
    middles = [each.at_tsc for each in slices]
    gaps = [after - before for before, after in pairwise(middles)]
    if not gaps or min(gaps) <= 0:
        return []
    reaches = [min(around) for around in zip([gaps[0], *gaps], [*gaps, gaps[-1]], strict=True)]
    return [
        _Seen(*edges, each.at_tsc, reach)
        for each, reach in zip(slices, reaches, strict=True)
        if (edges := slice_edges(clock, each))
    ]


def _slowest(added: Fraction, first: _Seen, last: _Seen, tsc_hz: int) -> Fraction | None:
    """The least rate, in ns a second, at which `added` ns or more can have come; None if no time may have passed."""
    between, reach = last.middle - first.middle, first.reach + last.reach
    ticks = between + reach if added > 0 else between - reach
    return added * tsc_hz / ticks if ticks > 0 else None


def _negated(rate: Fraction | None) -> Fraction | None:
    return None if rate is None else -rate
