"""Pages of one VM against each other: who gave other times than whom, by how much, and for how long at least.

Each vCPU is held against vCPU 0, whose page Linux's vDSO reads on all CPUs; of those that disagreed with it from the
same poll to the same poll and in the same direction, the one that did so most is told.  Where some were ahead of vCPU 0
and others behind it, the two that were furthest apart are told, too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from pvclock.meter.watch.changes import Disagreement, TscBasis
from pvclock.meter.watch.lines import Line, difference, is_same_line
from pvclock.meter.watch.poll import Poll
from pvclock.meter.watch.vm import VmEvent
from pvclock.quantities import NS_PER_S, U32_MASK, HostTsc

__all__ = ["AGREE_NS", "Disagreements"]

AGREE_NS: Final = 2
"""Up to this pages agree: each is floored to whole ns when it is made, and when it is read."""

POLLS_KEPT: Final = 1024
"""With events; a cause is not looked for further back."""


class _Lead(NamedTuple):
    """By how much `ahead` is ahead of `behind` at a poll."""

    ahead: int
    behind: int
    by_ns: int
    bound_ns: int
    basis: TscBasis
    pages: tuple[Line, Line]


class _Episode:
    """Two pages that disagree: from the poll that saw it first, and the longest time without a doubt."""

    def __init__(self, lead: _Lead, poll: int, at: HostTsc) -> None:
        self.first_poll = poll
        self.widest = self._last = lead
        self._since = self.at = at
        self._longest_ticks = 0

    def extend(self, lead: _Lead, at: HostTsc) -> None:
        """Another poll saw it.  The time counts unless the pages may have agreed in between."""
        if not _is_gapless(self._last, self.at, lead, at):
            self._since = at
        self._longest_ticks = max(self._longest_ticks, at - self._since)
        self.widest = max(self.widest, lead, key=lambda it: it.by_ns)
        self._last, self.at = lead, at

    def told(self, host_tsc_hz: int, events: tuple[VmEvent, ...]) -> Disagreement:
        """What there is to tell of it."""
        ahead, behind, by_ns, bound_ns, basis, _ = self.widest
        least_ns = self._longest_ticks * NS_PER_S // host_tsc_hz
        return Disagreement(self.at, ahead, behind, by_ns, bound_ns, least_ns, events, basis)


class Disagreements:
    """Those of a VM's pages, poll by poll."""

    def __init__(self, host_tsc_hz: int) -> None:
        self._host_tsc_hz = host_tsc_hz
        self._polls = 0
        self._with_vcpu0: dict[int, _Episode] = {}
        self._of_others: _Episode | None = None
        self._events: deque[tuple[int, VmEvent]] = deque(maxlen=POLLS_KEPT)

    def take(self, poll: Poll, lines: Sequence[Line | None]) -> list[Disagreement]:
        """Take the lines that lay there at a poll, None where that is not known; those that have ended."""
        self._polls += 1
        self._events.extend((self._polls, event) for event in poll.events)
        first = lines[0]
        if first is None:
            return []
        leads = {
            vcpu: _lead(0, first, vcpu, line, poll.middle)
            for vcpu, line in enumerate(lines)
            if vcpu and line is not None
        }
        ended = [episode for vcpu, lead in leads.items() if (episode := self._follow(vcpu, lead, poll.middle))]
        widest = self._follow_others(leads, lines, poll.middle)
        return self._told(ended) + self._told([widest] if widest else [])

    def finish(self) -> list[Disagreement]:
        """Those that have not ended; they end now."""
        told = self.open()
        self._with_vcpu0, self._of_others = {}, None
        return told

    def open(self) -> list[Disagreement]:
        """Those that have not ended, as they are."""
        return self._told(list(self._with_vcpu0.values())) + self._told([self._of_others] if self._of_others else [])

    # Inside

    def _follow(self, vcpu: int, lead: _Lead | None, at: HostTsc) -> _Episode | None:
        """Hold a vCPU against vCPU 0; the episode that ended, if any."""
        episode = self._with_vcpu0.get(vcpu)
        if episode and lead and lead.ahead == episode.widest.ahead:
            episode.extend(lead, at)
            return None
        if episode:
            del self._with_vcpu0[vcpu]
        if lead:
            self._with_vcpu0[vcpu] = _Episode(lead, self._polls, at)
        return episode

    def _follow_others(
        self, leads: dict[int, _Lead | None], lines: Sequence[Line | None], at: HostTsc
    ) -> _Episode | None:
        """Hold those on both sides of vCPU 0 against each other; the episode that ended, if any."""
        episode = self._of_others
        lead = _furthest_apart(leads, lines, at)
        if lead is None:
            self._of_others = None
            return episode
        if episode and (lead.ahead, lead.behind) == (episode.widest.ahead, episode.widest.behind):
            episode.extend(lead, at)
        elif episode is None or lead.by_ns > episode.widest.by_ns:
            self._of_others = _Episode(lead, self._polls, at)
        return None

    def _told(self, episodes: list[_Episode]) -> list[Disagreement]:
        together: dict[tuple[int, HostTsc, bool], _Episode] = {}
        for episode in episodes:
            key = episode.first_poll, episode.at, episode.widest.ahead == 0
            together[key] = max(together.get(key, episode), episode, key=lambda it: it.widest.by_ns)
        return [episode.told(self._host_tsc_hz, self._events_of(episode)) for episode in together.values()]

    def _events_of(self, episode: _Episode) -> tuple[VmEvent, ...]:
        """What was told from the poll before it on."""
        return tuple(event for poll, event in self._events if poll >= episode.first_poll - 1)


def _lead(one_vcpu: int, one: Line, other_vcpu: int, other: Line, at: HostTsc) -> _Lead | None:
    """Which of two pages is ahead; None if they agree."""
    if one.offset == other.offset and is_same_line(one.info, other.info):
        return None  # as nearly always
    by_ns, bound_ns = difference(one, other, at)
    if abs(by_ns) <= max(AGREE_NS, bound_ns):
        return None
    if by_ns < 0:
        one_vcpu, one, other_vcpu, other = other_vcpu, other, one_vcpu, one
    is_known = one.offset is not None and other.offset is not None
    basis = TscBasis.OFFSETS if is_known else TscBasis.ASSUMED
    return _Lead(one_vcpu, other_vcpu, abs(by_ns), bound_ns, basis, (one, other))


def _furthest_apart(leads: dict[int, _Lead | None], lines: Sequence[Line | None], at: HostTsc) -> _Lead | None:
    ahead = max(_of_side(leads, is_ahead=True), default=None)
    behind = max(_of_side(leads, is_ahead=False), default=None)
    if ahead is None or behind is None:
        return None
    one, other = lines[ahead[1]], lines[behind[1]]
    return _lead(ahead[1], one, behind[1], other, at) if one and other else None


def _of_side(leads: dict[int, _Lead | None], *, is_ahead: bool) -> Iterator[tuple[int, int]]:
    """(by_ns, vCPU) of those that are ahead of vCPU 0, or behind it."""
    return ((lead.by_ns, vcpu) for vcpu, lead in leads.items() if lead and (lead.behind == 0) == is_ahead)


def _is_gapless(before: _Lead, since: HostTsc, after: _Lead, at: HostTsc) -> bool:
    """Did the pages disagree all the time between two polls?

    So it is if they got one line at most, no TSC was written, and the lines of either poll disagree at the other, too.
    """
    pairs = list(zip(before.pages, after.pages, strict=True))
    lines = sum((new.info.version - old.info.version & U32_MASK) // 2 for old, new in pairs)
    if lines > 1 or any(new.offset != old.offset for old, new in pairs):
        return False
    return _is_ahead(*before.pages, at) and _is_ahead(*after.pages, since)


def _is_ahead(one: Line, other: Line, at: HostTsc) -> bool:
    by_ns, bound_ns = difference(one, other, at)
    return by_ns > max(AGREE_NS, bound_ns)
