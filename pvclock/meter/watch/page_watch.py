"""One vCPU's page over time: which line gave way to which, and what that was for the guest's clock.

A poll that lacks the page or its TSC offset is left out: the line and the offset of before stay together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from pvclock.meter.watch.changes import Change, FlagsChange, PageLost, Step, TscBasis
from pvclock.meter.watch.lines import Line, TscRates, is_same_line, step_between
from pvclock.meter.watch.poll import Poll
from pvclock.meter.watch.tsc_account import TscAccount
from pvclock.meter.watch.vm import VmEvent
from pvclock.quantities import U32_MASK, HostTsc
from pvclock.readings import TimeInfo

__all__ = ["LOST_POLLS", "PageWatch"]

LOST_POLLS: Final = 10
"""Polls in a row without a legal page, after which it is lost."""

UTC_BOUND_NS: Final = 1000
"""A pause lies between two stamps of whole us."""

UTC_PPM: Final = 500
"""How far NTP slews UTC at most."""

VERSION_BACK: Final = 1 << 31
EVENTS_KEPT: Final = 64


class PageWatch:
    """vCPU `vcpu`'s page, poll by poll."""

    def __init__(self, vcpu: int, rates: TscRates, is_legal: Callable[[TimeInfo], bool]) -> None:
        self._vcpu = vcpu
        self._rates = rates
        self._is_legal = is_legal
        self._line: Line | None = None
        self._since = HostTsc(0)  # the last poll that saw it
        self._account = TscAccount(rates, HostTsc(0))
        self._events: tuple[VmEvent, ...] = ()  # since the last step
        self._pauses: list[int] = []  # that ended since that poll was taken
        self._waiting: Step | None = None  # for the RESUME that belongs to it
        self._moved_to: int | None = None  # the offset, under the same line, at the last poll
        self._illegal_polls = self._polls_without_offset = 0

    def take(self, poll: Poll, pauses: list[int], *, is_stopped: bool) -> tuple[Line | None, list[Change]]:
        """The line that lay there at the poll, None if it is not known, and what changed since the one before.

        pauses: the lengths in ns of those that ended, by what was told with this poll; is_stopped: another has begun.
        """
        self._events = (*self._events, *poll.events)[-EVENTS_KEPT:]
        self._pauses += pauses
        changes = self.finish()
        page = poll.pages[self._vcpu]
        if page is None or not self._is_legal(page):
            self._account.note(poll.events)
            return None, [*changes, *self._lost(poll, page)]
        self._illegal_polls = 0
        line = Line(page, poll.tsc_offsets[self._vcpu])
        if self._lacks_offset(line):
            self._account.note(poll.events)
            return None, changes
        before, self._line = self._line, line
        if before is None:
            self._account = TscAccount(self._rates, poll.middle)
            self._account.note(poll.events)
        else:
            changes += self._flags_change(before, line, poll)
            changes += self._changed(before, line, poll, pauses, is_stopped=is_stopped)
        self._since = poll.middle
        return line, changes

    def finish(self) -> list[Change]:
        """The step that waited for a RESUME, if any."""
        step, self._waiting = self._waiting, None
        return [] if step is None else [self._with_pauses(step)]

    # Inside

    def _lost(self, poll: Poll, page: TimeInfo | None) -> list[Change]:
        self._illegal_polls += 1
        if self._illegal_polls != LOST_POLLS:
            return []
        what = "it was being changed each time" if page is None else "what lies there is no page of a clock"
        return [PageLost(poll.middle, self._vcpu, f"no legal page at {LOST_POLLS} polls in a row: {what}")]

    def _lacks_offset(self, line: Line) -> bool:
        """Is the offset missing for a moment?  If it is for long, it cannot be read any more."""
        is_missing = line.offset is None and self._line is not None and self._line.offset is not None
        self._polls_without_offset = self._polls_without_offset + 1 if is_missing else 0
        return 0 < self._polls_without_offset < LOST_POLLS

    def _flags_change(self, before: Line, line: Line, poll: Poll) -> list[Change]:
        flags = before.info.flags, line.info.flags
        return [] if flags[0] == flags[1] else [FlagsChange(poll.middle, self._vcpu, *flags)]

    def _changed(self, before: Line, line: Line, poll: Poll, pauses: list[int], *, is_stopped: bool) -> list[Change]:
        if before.info.version != line.info.version or not is_same_line(before.info, line.info):
            self._moved_to = None
            step = self._step(before, line, poll)
            if is_stopped and len(self._pauses) < step.lines:
                self._waiting = step
                return []
            return [self._with_pauses(step)]
        self._account.note(poll.events)
        self._pauses = list(pauses)
        return self._moved(before, line, poll, is_stopped=is_stopped)

    def _moved(self, before: Line, line: Line, poll: Poll, *, is_stopped: bool) -> list[Change]:
        """The guest's TSC was written, and its line stayed: a step of its clock, if the guest runs by them.

        A VMM writes the TSC of a guest that stands, and KVM replaces the line before the guest runs; so this counts
        once two polls saw it.
        """
        if before.offset is None or line.offset == before.offset:
            self._moved_to = None
            return []
        is_second, self._moved_to = self._moved_to == line.offset, None if is_stopped else line.offset
        if is_stopped or not is_second:
            self._line = line._replace(offset=before.offset)
            return []
        return [self._with_pauses(self._step(before, line, poll))]

    def _step(self, before: Line, line: Line, poll: Poll) -> Step:
        lines = self._lines(before.info, line.info)
        basis = self._basis(before, line, poll)
        step_ns, bound_ns = step_between(before.info, before.offset, line.info, line.offset)
        is_known = basis is not TscBasis.CHANGED
        events, self._events = self._events, ()
        return Step(
            at=poll.middle,
            since=self._since,
            vcpu=self._vcpu,
            before=before.info,
            after=line.info,
            lines=lines,
            basis=basis,
            step_ns=step_ns if is_known else None,
            bound_ns=bound_ns if is_known else None,
            seen_ns=None,
            seen_bound_ns=None,
            events=events,
        )

    def _lines(self, before: TimeInfo, after: TimeInfo) -> int:
        """How many lines followed each other, by the version; one that went back, or stayed, is of a new count."""
        if before[:5] == after[:5]:
            return 0
        counted = (after.version - before.version) & U32_MASK
        if 0 < counted < VERSION_BACK:
            return counted // 2
        self._account.doubt()
        return 1

    def _basis(self, before: Line, line: Line, poll: Poll) -> TscBasis:
        if before.offset is None or line.offset is None:
            return self._account.take(before.info, line.info, self._since, poll.middle, poll.events)
        self._account = TscAccount(self._rates, poll.middle)
        self._account.note(poll.events)
        return TscBasis.OFFSETS

    def _with_pauses(self, step: Step) -> Step:
        """The step, and what the guest saw of it, if as many pauses ended meanwhile as there are new lines."""
        pauses, self._pauses = self._pauses, []
        speed = self._rates.speed(step.before)
        if step.step_ns is None or step.bound_ns is None or speed is None or len(pauses) != step.lines or not pauses:
            return step
        stopped_ns = sum(pauses)
        bound_ns = step.bound_ns + UTC_BOUND_NS * len(pauses) + abs(stopped_ns) * UTC_PPM // 10**6 + 1
        return step._replace(seen_ns=step.step_ns + round(stopped_ns * speed), seen_bound_ns=bound_ns)
