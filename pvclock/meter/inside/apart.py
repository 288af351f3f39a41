"""Which CPUs' readings of a clock are apart: named where a majority proves it, else as a pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import combinations
from typing import Final, NamedTuple

from pvclock.meter.inside.advice import Remedies
from pvclock.meter.inside.majority import Outlier, groups_of, outliers
from pvclock.meter.inside.record import ClockRecord, ProbeRecord, WarpRecord
from pvclock.meter.inside.symptoms import sees_apart, title
from pvclock.meter.inside.verdict import Finding, FindingCode, Weight
from pvclock.meter.inside.windows import Window, unit_ns
from pvclock.meter.inside.words import at_least, between, cpus_in_words, far_end, listed

__all__ = ["Windows", "apart_findings"]

Windows = Mapping[tuple[int, int], Window | None]

TOLD_MAX: Final = 8
"""Groups, and CPUs that are off, in one verdict."""


def apart_findings(record: ProbeRecord, clock: ClockRecord, windows: Windows, remedies: Remedies) -> list[Finding]:
    """Every offset that is proven, and every warp between CPUs of which no offset is."""
    comparison = _Comparison(record, clock, windows, remedies)
    off = outliers(len(record.cpus), comparison.side, comparison.is_apart)
    named = {cpu for each in off for cpu in each.cpus}
    found = [comparison.off_the_majority(each) for each in off[:TOLD_MAX]]
    if pairs := [pair for pair in comparison.apart_pairs() if named.isdisjoint(pair)]:
        found.append(comparison.pair_finding(pairs))
    rest = [warp for warp in clock.warps if warp.times and warp.largest and not comparison.is_told(warp)]
    return found + ([comparison.warp_finding(rest)] if rest else [])


# Inside


def _window(windows: Windows, a: int, b: int) -> Window | None:
    """Of b's reading minus a's."""
    if a < b:
        return windows.get((a, b))
    window = windows.get((b, a))
    return window.turned() if window else None


def _is_between(warp: WarpRecord, these: Sequence[int], those: Sequence[int]) -> bool:
    return (warp.writer in these and warp.reader in those) or (warp.writer in those and warp.reader in these)


def _others(pairs: Sequence[tuple[int, int]]) -> str:
    more = len(pairs) - 1
    return f"; {more:,} more pair{'s are' if more > 1 else ' is'} apart" if more else ""


class _Comparison(NamedTuple):
    """A clock on all CPUs, and what its faults are called."""

    record: ProbeRecord
    clock: ClockRecord
    windows: Windows
    remedies: Remedies

    def window(self, a: int, b: int) -> Window | None:
        """Of b's reading minus a's."""
        return _window(self.windows, a, b)

    def is_apart(self, a: int, b: int) -> bool:
        """Proven, by any window."""
        window = self.window(a, b)
        return window is not None and window.is_apart

    def side(self, a: int, b: int) -> int:
        """1: b was proven ahead of a by their own window, and never behind; -1: the other way round; else 0."""
        window = self.window(a, b)
        if window is None or not window.is_direct:
            return 0
        return int(window.low > 0) - int(window.high < 0)

    def is_told(self, warp: WarpRecord) -> bool:
        """Is that warp what an offset makes?"""
        return self.is_apart(warp.writer, warp.reader)

    def apart_pairs(self) -> list[tuple[int, int]]:
        """Those whose own windows prove it; those that follow from two others if there is none."""
        apart = [(pair, window) for pair, window in self.windows.items() if window and window.is_apart]
        return [pair for pair, window in apart if window.is_direct] or [pair for pair, _ in apart]

    def off_the_majority(self, off: Outlier) -> Finding:
        """Each of these CPUs is apart from each of the majority."""
        window = self.window_of_groups(off.majority, off.cpus)
        own = [warp for warp in self.clock.warps if _is_between(warp, off.cpus, off.majority)]
        side = "ahead of" if off.side > 0 else "behind"
        headline = (
            f"{self.whose(off.cpus)} {title(self.clock.name)} is {self.size(window)} {side} that of "
            f"{self.named(off.majority)}"
        )
        return self.offset_finding(headline, "", off.cpus, own, window)

    def pair_finding(self, pairs: Sequence[tuple[int, int]]) -> Finding:
        """No CPU can be called the one that is off: the two that are furthest apart, and what else is."""
        windows = [self.window_of_groups([a], [b]) for a, b in pairs]
        widest = max(windows, key=lambda each: max(each.low, -each.high))
        behind, ahead = (widest.a, widest.b) if widest.low >= -widest.high else (widest.b, widest.a)
        own = [warp for warp in self.clock.warps if _is_between(warp, ahead, behind)]
        headline = (
            f"{self.whose(ahead)} {title(self.clock.name)} is {self.size(widest)} ahead of that of {self.named(behind)}"
        )
        return self.offset_finding(headline, self.who_agrees(pairs), sorted([*ahead, *behind]), own, widest)

    def who_agrees(self, pairs: Sequence[tuple[int, int]]) -> str:
        """Why none is named."""
        cpus = range(len(self.record.cpus))
        if len(cpus) == 2:
            return "; two CPUs cannot tell which of them is off"
        if not all(window is None or window.is_direct for window in self.windows.values()):
            first = self.named([0])
            return f"; each CPU was compared with {first} alone, so it may be {first} that is off{_others(pairs)}"
        groups = groups_of(cpus, self.is_apart)
        if all(self.is_apart(a, b) for one, other in combinations(groups, 2) for a in one for b in other):
            told = [self.named(each) for each in groups[:TOLD_MAX]]
            rest = [f"{len(groups) - len(told)} more groups"] if len(groups) > len(told) else []
            return f"; no majority agrees: {listed([*told, *rest])} are each apart from the others"
        return f"; neither is proven to be apart from most CPUs, so which of them is off is open{_others(pairs)}"

    def offset_finding(
        self, headline: str, remark: str, cpus: Sequence[int], warps: Sequence[WarpRecord], window: _GroupWindow
    ) -> Finding:
        most = max(abs(window.least), abs(window.most))
        return Finding(
            FindingCode.OFFSET,
            Weight.FAULT,
            self.clock.name,
            headline,
            headline + remark + self.proof(warps),
            sees_apart(self.clock.name, far_end(window.least, window.most)),
            self.remedies.for_offset(),
            tuple(self.record.cpus[cpu].cpu for cpu in cpus),
            "max_warp",
            max(window.low, -window.high),
            most,
        )

    def warp_finding(self, warps: Sequence[WarpRecord]) -> Finding:
        """Warps where no window proves an offset: it is smaller than a cache line's way, or does not last."""
        largest = max(warps, key=lambda warp: warp.largest)
        size = largest.largest * unit_ns(self.clock)
        times, name = sum(warp.times for warp in warps), title(self.clock.name)
        if largest.writer == largest.reader:
            before = "it had read before itself"
        else:
            before = f"{self.named([largest.writer])} had read before"
        headline = f"{self.named([largest.reader])} read {at_least(size)} less of {name} than {before}"
        cpus = sorted({cpu for warp in warps for cpu in (warp.reader, warp.writer)})
        return Finding(
            FindingCode.WARP,
            Weight.FAULT,
            self.clock.name,
            headline,
            f"{headline}; {times:,} such reading{'s' * (times != 1)} of {self.clock.cell_reads:,}",
            sees_apart(self.clock.name, f"{at_least(size)} or more"),
            self.remedies.for_offset(),
            tuple(self.record.cpus[cpu].cpu for cpu in cpus),
            "max_warp",
            size,
            None,
        )

    def window_of_groups(self, a: Sequence[int], b: Sequence[int]) -> _GroupWindow:
        """What is true of each of b against each of a."""
        pairs = [window for one in a for other in b if (window := self.window(one, other))]
        low, high = min(window.low for window in pairs), max(window.high for window in pairs)
        least, most = min(window.edges[0] for window in pairs), max(window.edges[1] for window in pairs)
        return _GroupWindow(a, b, low, high, least, most, any(window.moved for window in pairs))

    def size(self, window: _GroupWindow) -> str:
        if window.moved:
            return f"at times {at_least(max(window.low, -window.high))} or more, and never the same,"
        return between(window.low, window.high)

    def proof(self, warps: Sequence[WarpRecord]) -> str:
        times = sum(warp.times for warp in warps)
        if not times:
            return ""
        largest = max(warp.largest for warp in warps) * unit_ns(self.clock)
        return (
            f"; {times:,} reading{'s' * (times != 1)} went back by up to {at_least(largest)} from one CPU to the other"
        )

    def named(self, cpus: Sequence[int]) -> str:
        return cpus_in_words([self.record.cpus[cpu].cpu for cpu in cpus])

    def whose(self, cpus: Sequence[int]) -> str:
        return f"{self.named(cpus)}{chr(39)}{'s' * (len(cpus) == 1)}"


class _GroupWindow(NamedTuple):
    """A window of every one of b against every one of a."""

    a: Sequence[int]
    b: Sequence[int]
    low: Fraction
    high: Fraction
    least: Fraction
    most: Fraction
    moved: bool
