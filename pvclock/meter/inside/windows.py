"""How far apart CPUs' readings of one clock are: windows that hold the offset, from exchanges, exactly.

An exchange proves low <= b - a <= high for an offset that stands still.  Where the windows of two eighths of the run
have nothing in common, the offset moved; then low and high are what it had at some time each.  The window of one eighth
that is empty by itself does not tell which way: the offset moved, or both clocks went back during an exchange.  Nothing
else is taken from such an eighth, unless half of them or more are empty: that is an offset that moves all the time.

A reading is cut to a whole unit, so the difference of two may be off by one: a window is wider by that on both sides.
TSCs are whole themselves, and so is the difference of two that stands still.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import combinations
from typing import NamedTuple

from pvclock.meter.inside.record import ClockRecord, PairRecord, Slice
from pvclock.quantities import NS_PER_S

__all__ = ["Window", "all_windows", "far_edge", "is_any_apart", "slice_edges", "sound_edges", "unit_ns", "widest_half"]


class Window(NamedTuple):
    """The bounds of b's reading minus a's, in ns.

    low, high: b was ahead by `low` at least, and by no more than `high`; if it moved, each at some time.  least, most:
    the outermost edges of all eighths, between which everything seen lies.  moved: it did not stand still.  is_direct:
    the two were compared, not each with the first CPU.  is_torn: an eighth contradicts itself.
    """

    low: Fraction
    high: Fraction
    least: Fraction
    most: Fraction
    moved: bool
    is_direct: bool
    is_torn: bool = False

    @property
    def is_apart(self) -> bool:
        """Proven: the two did not agree at some time."""
        return self.low > 0 or self.high < 0

    @property
    def edges(self) -> tuple[Fraction, Fraction]:
        """What holds all offsets that the measurement leaves possible."""
        return (self.least, self.most) if self.moved or self.is_torn else (self.low, self.high)

    def turned(self) -> Window:
        """The same of a's reading minus b's."""
        return Window(-self.high, -self.low, -self.most, -self.least, self.moved, self.is_direct, self.is_torn)


def unit_ns(clock: ClockRecord) -> Fraction:
    """How many ns a unit of that clock is."""
    return Fraction(NS_PER_S, clock.hz)


def slice_edges(clock: ClockRecord, seen: Slice, cut: int = 1) -> tuple[Fraction, Fraction] | None:
    """The bounds in ns that an eighth of the run gives, wider by `cut` units; None if no round of it ended."""
    if seen.low is None or seen.high is None:
        return None
    return (seen.low - cut) * unit_ns(clock), (seen.high + cut) * unit_ns(clock)


def sound_edges(edges: Sequence[tuple[Fraction, Fraction]]) -> list[tuple[Fraction, Fraction]]:
    """Those of eighths that do not contradict themselves; or all, if half of them do, and not one alone."""
    sound = [(low, high) for low, high in edges if low <= high]
    torn = len(edges) - len(sound)
    return list(edges) if torn > 1 and torn * 2 >= len(edges) else sound


def all_windows(clock: ClockRecord, cpus: int) -> dict[tuple[int, int], Window | None]:
    """The window of every two CPUs a < b: their own, else the sum through the first CPU; None if there is neither."""
    direct = _direct_windows(clock)
    found: dict[tuple[int, int], Window | None] = {}
    for a, b in combinations(range(cpus), 2):
        found[a, b] = direct.get((a, b)) or _through_first(direct, a, b)
    return found


def far_edge(windows: Mapping[tuple[int, int], Window | None]) -> Fraction | None:
    """The largest edge of any window, without its sign; None if two CPUs have none."""
    edges = [max(abs(edge) for edge in window.edges) if window else None for window in windows.values()]
    return max((edge or Fraction(0) for edge in edges), default=Fraction(0)) if None not in edges else None


def is_any_apart(windows: Mapping[tuple[int, int], Window | None]) -> bool:
    """Are two CPUs proven to be apart?"""
    return any(window.is_apart for window in windows.values() if window)


def widest_half(windows: Mapping[tuple[int, int], Window | None]) -> Fraction:
    """Half the width of the widest window."""
    edges = [window.edges for window in windows.values() if window]
    return max((high - low for low, high in edges), default=Fraction(0)) / 2


# Inside


def _direct_windows(clock: ClockRecord) -> dict[tuple[int, int], Window]:
    found: dict[tuple[int, int], Window] = {}
    for pair in clock.pairs:
        window = _window(pair, clock, cut=0) if clock.name == "tsc" else None
        if window is None or window.moved or window.is_torn:
            window = _window(pair, clock, cut=1)
        if window is not None:
            a, b = sorted((pair.a, pair.b))
            found[a, b] = window if pair.a == a else window.turned()
    return found


def _window(pair: PairRecord, clock: ClockRecord, cut: int) -> Window | None:
    edges = [found for each in pair.slices if (found := slice_edges(clock, each, cut))]
    if not edges:
        return None
    every = [edge for both in edges for edge in both]
    least, most = min(every), max(every)
    sound = sound_edges(edges)
    is_torn = len(sound) < len(edges)
    if is_torn:  # one of its edges is of another time, and of which sign the offset was then is open
        most = max(abs(least), abs(most))
        least = -most
    if not sound:
        return Window(least, most, least, most, moved=False, is_direct=True, is_torn=True)
    low, high = max(low for low, _ in sound), min(high for _, high in sound)
    return Window(low, high, least, most, low > high, is_direct=True, is_torn=is_torn)


def _through_first(direct: Mapping[tuple[int, int], Window], a: int, b: int) -> Window | None:
    """b - a as (b - first) - (a - first); one that moved proves nothing of these two, and bounds what was seen."""
    to_a, to_b = direct.get((0, a)), direct.get((0, b))
    if a == 0 or to_a is None or to_b is None:
        return None
    least, most = to_b.least - to_a.most, to_b.most - to_a.least
    if to_a.moved or to_b.moved or to_a.is_torn or to_b.is_torn:
        return Window(least, most, least, most, moved=True, is_direct=False)
    return Window(to_b.low - to_a.high, to_b.high - to_a.low, least, most, moved=False, is_direct=False)
