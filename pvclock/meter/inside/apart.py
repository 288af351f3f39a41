"""Which CPUs' readings of a clock are apart: named by majority where there is one, as a pair where there are two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Final, NamedTuple

from pvclock.meter.inside.record import ClockRecord, ProbeRecord, WarpRecord
from pvclock.meter.inside.remedies import Remedies
from pvclock.meter.inside.symptoms import sees_apart, title
from pvclock.meter.inside.verdict import Finding, FindingCode, Weight
from pvclock.meter.inside.windows import Window, unit_ns
from pvclock.meter.inside.words import at_least, between, cpus_in_words, floor_in_words, listed

__all__ = ["Windows", "apart_findings", "groups_of"]

Windows = Mapping[tuple[int, int], Window | None]

GROUPS_TOLD_MAX: Final = 8


def groups_of(windows: Windows, cpus: int) -> list[list[int]]:
    """CPUs of which no two are proven to be apart, the largest group first."""
    groups: list[list[int]] = []
    for cpu in range(cpus):
        fitting = (group for group in groups if not any(_is_apart(windows, cpu, other) for other in group))
        if (group := next(fitting, None)) is not None:
            group.append(cpu)
        else:
            groups.append([cpu])
    return sorted(groups, key=len, reverse=True)


def apart_findings(record: ProbeRecord, clock: ClockRecord, windows: Windows, remedies: Remedies) -> list[Finding]:
    """Every offset that is proven, and every warp between CPUs of which no offset is."""
    groups = groups_of(windows, len(record.cpus))
    group_of = {cpu: at for at, group in enumerate(groups) for cpu in group}
    comparison = _Comparison(record, clock, windows, remedies)
    apart = [warp for warp in clock.warps if group_of[warp.writer] != group_of[warp.reader]]
    found = comparison.offsets(groups, apart) if len(groups) > 1 else []
    rest = [warp for warp in clock.warps if warp not in apart and warp.times and warp.largest]
    return found + ([comparison.warp_finding(rest)] if rest else [])


# Inside


def _window(windows: Windows, a: int, b: int) -> Window | None:
    """Of b's reading minus a's."""
    if a < b:
        return windows.get((a, b))
    window = windows.get((b, a))
    return window.turned() if window else None


def _is_apart(windows: Windows, a: int, b: int) -> bool:
    window = _window(windows, a, b)
    return window is not None and window.is_apart


class _Comparison(NamedTuple):
    """A clock on all CPUs, and what its faults are called."""

    record: ProbeRecord
    clock: ClockRecord
    windows: Windows
    remedies: Remedies

    def offsets(self, groups: Sequence[Sequence[int]], warps: Sequence[WarpRecord]) -> list[Finding]:
        if len(groups[0]) * 2 > len(self.record.cpus) and len(self.record.cpus) > 2:
            return [self.off_the_majority(groups[0], group, warps) for group in groups[1 : 1 + GROUPS_TOLD_MAX]]
        return [self.without_majority(groups, warps)]

    def off_the_majority(self, most: Sequence[int], group: Sequence[int], warps: Sequence[WarpRecord]) -> Finding:
        """The majority agrees, and this group is apart from it."""
        window = self.window_of_groups(most, group)
        side = "ahead of" if window.low > 0 else "behind"
        own = [each for each in warps if each.reader in group or each.writer in group]
        headline = (
            f"{self.whose(group)} {title(self.clock.name)} is {self.size(window)} {side} that of {self.named(most)}"
        )
        return self.offset_finding(headline, "", group, own, window)

    def without_majority(self, groups: Sequence[Sequence[int]], warps: Sequence[WarpRecord]) -> Finding:
        """No majority: the largest difference, and who agrees with whom."""
        windows = [self.window_of_groups(a, b) for at, a in enumerate(groups) for b in groups[at + 1 :]]
        widest = max((each for each in windows if each.is_apart), key=lambda each: max(each.low, -each.high))
        behind, ahead = (widest.a, widest.b) if widest.low > 0 else (widest.b, widest.a)
        headline = (
            f"{self.whose(ahead)} {title(self.clock.name)} is {self.size(widest)} ahead of that of {self.named(behind)}"
        )
        return self.offset_finding(headline, self.who_agrees(groups), sorted([*ahead, *behind]), warps, widest)

    def who_agrees(self, groups: Sequence[Sequence[int]]) -> str:
        if len(self.record.cpus) == 2:
            return "; two CPUs cannot tell which of them is off"
        told = [self.named(each) for each in groups[:GROUPS_TOLD_MAX]]
        rest = [f"{len(groups) - len(told)} more groups"] if len(groups) > len(told) else []
        return f"; no majority agrees: {listed([*told, *rest])} are each apart from the others"

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
            sees_apart(self.clock.name, floor_in_words(most)),
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
        """What is true of each of b against each of a; where that has no one sign, of the two that are most apart."""
        pairs = [(one, other, window) for one in a for other in b if (window := _window(self.windows, one, other))]
        low, high = min(window.low for *_, window in pairs), max(window.high for *_, window in pairs)
        if low > 0 or high < 0:
            least, most = min(each.least for *_, each in pairs), max(each.most for *_, each in pairs)
            moved = any(window.moved for *_, window in pairs)
            return _GroupWindow(a, b, low, high, *((least, most) if moved else (low, high)), moved)
        one, other, window = max(pairs, key=lambda pair: max(pair[2].low, -pair[2].high))
        return _GroupWindow([one], [other], window.low, window.high, *window.edges, window.moved)

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

    @property
    def is_apart(self) -> bool:
        return self.low > 0 or self.high < 0
