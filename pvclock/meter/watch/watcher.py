"""The watch of one VM's clock: fed with polls, it tells what changed.  Pure: it reads no clock and no memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from pvclock.meter.watch.changes import Change, Disagreement, Stall
from pvclock.meter.watch.disagreements import Disagreements
from pvclock.meter.watch.lines import Line, TscRates, value_at
from pvclock.meter.watch.page_watch import PageWatch
from pvclock.meter.watch.pauses import Pauses
from pvclock.meter.watch.poll import Poll
from pvclock.meter.watch.summary import Tally, WatchSummary
from pvclock.quantities import NS_PER_S, HostTsc
from pvclock.readings import TimeInfo

__all__ = ["Watcher"]

STALL_INTERVALS: Final = 4
"""Polls further apart than so many intervals are a stall."""


class Watcher:
    """Watches the pages of `vcpus` vCPUs.

    host_tsc_hz: the host's TSC frequency.  interval_ns: how far apart polls are wanted.  guest_tsc_hz: the guest's, if
    its VMM tells; else a line that is for another than the host's means that the guest's TSC is scaled.  is_paused: is
    the guest, when the watch begins?  tells_events: would its VMM tell of a reset?  is_legal: can that be a clock's
    page?
    """

    def __init__(
        self,
        vcpus: int,
        *,
        host_tsc_hz: int,
        interval_ns: int,
        guest_tsc_hz: int | None = None,
        is_paused: bool = False,
        tells_events: bool = False,
        is_legal: Callable[[TimeInfo], bool],
    ) -> None:
        self._vcpus = vcpus
        self._rates = TscRates(host_tsc_hz, guest_tsc_hz)
        self.interval_ns = interval_ns
        """How far apart polls are wanted; may change between two of them."""
        self._tells_events, self._is_legal = tells_events, is_legal
        self._pauses = Pauses(host_tsc_hz, is_paused=is_paused)
        self._tally = Tally()
        self._first: HostTsc | None = None
        self._last: Poll | None = None
        self.lines: tuple[Line | None, ...] = ()
        """The line of each vCPU that counts as of the last poll, with its TSC offset; None where that is not known."""
        self._begin()

    @property
    def summary(self) -> WatchSummary:
        """What was found so far."""
        return self._tally.summary

    @property
    def summary_as_seen(self) -> WatchSummary:
        """The summary for budgets that allow pauses."""
        return self._tally.as_seen

    @property
    def open_disagreements(self) -> list[Disagreement]:
        """Those that have not ended, as they are; take() tells them when they end."""
        return self._disagreements.open()

    def take(self, poll: Poll) -> list[Change]:
        """What is found by one more poll, in the order of polls."""
        changes: list[Change] = [*self._stall(poll)]
        stopped = self._pauses.take(poll)
        lines = []
        for page in self._pages:
            line, found = page.take(poll, stopped)
            lines.append(line)
            changes += found
        self.lines = tuple(lines)
        changes += self._disagreements.take(poll, lines)
        self._tally.note(changes)
        self._first = poll.middle if self._first is None else self._first
        self._tally.note_poll(self._ns(poll.middle - self._first))
        self._last = poll
        return changes

    def finish(self) -> list[Change]:
        """What is left to tell at the end of a watch, or before a restart."""
        changes = [change for page in self._pages for change in page.finish()]
        changes += self._disagreements.finish()
        self._tally.note(changes)
        return changes

    def restart(self, vcpus: int | None = None) -> list[Change]:
        """Begin anew with pages found by another search, of `vcpus` vCPUs, by default as many; the summary goes on.

        What is left to tell of the old ones.  No step leads from these to the new ones.
        """
        changes = self.finish()
        if self._last is not None:
            self._tally.note_restart()
        self._vcpus = self._vcpus if vcpus is None else vcpus
        self._last = None
        self._begin()
        return changes

    def readings(self, poll: Poll) -> tuple[int | None, ...]:
        """What each vCPU's clock shows (ns) at the poll's `middle`; None where its page or its TSC is not known."""
        shown = zip(poll.pages, poll.tsc_offsets, strict=True)
        return tuple(self._reading(page, offset, poll.middle) for page, offset in shown)

    # Inside

    def _begin(self) -> None:
        self._pages = [
            PageWatch(vcpu, self._rates, self._is_legal, tells_events=self._tells_events) for vcpu in range(self._vcpus)
        ]
        self._disagreements = Disagreements(self._rates.host_hz)

    def _ns(self, ticks: int) -> int:
        return ticks * NS_PER_S // self._rates.host_hz

    def _stall(self, poll: Poll) -> list[Stall]:
        gap_ns = 0 if self._last is None else self._ns(poll.middle - self._last.middle)
        return [Stall(poll.middle, gap_ns)] if gap_ns > STALL_INTERVALS * self.interval_ns else []

    def _reading(self, page: TimeInfo | None, offset: int | None, at: HostTsc) -> int | None:
        if page is None or offset is None or not self._is_legal(page) or self._rates.is_scaled(page):
            return None
        return value_at(page, at + offset)
