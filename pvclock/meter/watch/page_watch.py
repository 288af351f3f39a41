"""One vCPU's page over time: which line gave way to which, and what that was for the guest's clock.

A poll that lacks the page or its TSC offset is left out: the line and the offset of before stay together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from pvclock.meter.watch.changes import Change, FlagsChange, PageLost, Step, TscBasis
from pvclock.meter.watch.lines import Line, TscRates, step_within
from pvclock.meter.watch.pauses import Pause, Stopped, with_seen
from pvclock.meter.watch.poll import Poll
from pvclock.meter.watch.tsc_account import TscAccount
from pvclock.meter.watch.vm import VmEvent, VmEventKind
from pvclock.quantities import U32_MASK, HostTsc
from pvclock.readings import TimeInfo

__all__ = ["LOST_POLLS", "PageWatch"]

LOST_POLLS: Final = 10
"""Polls in a row without a legal page, after which it is lost."""

MOVED_POLLS: Final = 2
"""Polls in a row that see a line with another TSC, after which they count."""

OFFSETS_MAX: Final = 10
"""Polls in a row that each see another TSC offset, after which it is unknown what the guest read meanwhile."""

RESUME_LIMIT_S: Final = 1
"""How late a VMM may tell that its guest goes on."""

VERSION_BACK: Final = 1 << 31
EVENTS_KEPT: Final = 64


class _Move(NamedTuple):
    """A line as it was first seen with another TSC offset, and how many polls in a row saw that.

    offsets: how many there were in a row that did not come to count.
    """

    line: Line
    polls: int
    offsets: int


class PageWatch:
    """vCPU `vcpu`'s page, poll by poll.  tells_events: would the VMM tell of a reset?"""

    def __init__(self, vcpu: int, rates: TscRates, is_legal: Callable[[TimeInfo], bool], *, tells_events: bool) -> None:
        self._vcpu = vcpu
        self._rates = rates
        self._is_legal = is_legal
        self._tells_events = tells_events
        self._line: Line | None = None
        self._since = HostTsc(0)  # the last poll that saw it, with its offset
        self._account = TscAccount(rates, HostTsc(0))
        self._events: tuple[VmEvent, ...] = ()  # since the last step
        self._pauses: tuple[Pause, ...] = ()  # those that ended, as was told from that poll on
        self._waiting: Step | None = None  # for the RESUME that belongs to it
        self._flags = 0
        self._move: _Move | None = None
        self._illegal_polls = self._polls_without_offset = 0

    def take(self, poll: Poll, stopped: Stopped) -> tuple[Line | None, list[Change]]:
        """The line that lay there at the poll with the offset that counts, None if not known, and what changed."""
        if self._is_as_before(poll):
            self._since = poll.middle
            return self._line, []
        self._events = (*self._events, *poll.events)[-EVENTS_KEPT:]
        self._pauses += stopped.ended
        changes = [] if self._may_wait(poll) else self.finish()
        page = poll.pages[self._vcpu]
        if page is None or not self._is_legal(page):
            self._account.note(poll.events)
            return None, [*changes, *self._lost(poll, page)]
        self._illegal_polls = 0
        line = Line(page, poll.tsc_offsets[self._vcpu])
        if self._lacks_offset(line):
            self._account.note(poll.events)
            return None, changes
        if self._line is None:
            self._begin_with(line, poll)
        else:
            changes += self._flags_change(page, poll)
            changes += self._compared(self._line, line, poll, stopped)
        self._flags = page.flags
        return (self._line if self._move is None else None), changes

    def finish(self) -> list[Change]:
        """The step that waited for a RESUME, if any, with what was told since."""
        step, self._waiting = self._waiting, None
        if step is None:
            return []
        events, self._events = self._events, ()
        return [self._with_pauses(step._replace(events=(*step.events, *events)))]

    # Inside

    def _may_wait(self, poll: Poll) -> bool:
        """May a step wait on for its RESUME?  A VMM on a busy host tells it late; but the page stays meanwhile."""
        step, line = self._waiting, self._line
        if step is None or line is None or len(self._pauses) >= step.lines:
            return False
        is_same = Line(poll.pages[self._vcpu] or step.before, poll.tsc_offsets[self._vcpu]) == line
        return is_same and poll.middle - step.at < RESUME_LIMIT_S * self._rates.host_hz

    def _is_as_before(self, poll: Poll) -> bool:
        """Is nothing new, and nothing open?  At nearly all polls; so it is asked first."""
        line = self._line
        if line is None or poll.pages[self._vcpu] != line.info or poll.tsc_offsets[self._vcpu] != line.offset:
            return False
        is_open = self._waiting or self._move or self._pauses or self._illegal_polls or self._polls_without_offset
        return not (is_open or poll.events)

    def _lost(self, poll: Poll, page: TimeInfo | None) -> list[Change]:
        if self._vcpu in poll.absent:
            return []
        self._illegal_polls += 1
        if self._illegal_polls != LOST_POLLS:
            return []
        what = "it was being changed each time" if page is None else "what lies there is no page of a clock"
        return [PageLost(poll.middle, self._vcpu, f"no legal page at {LOST_POLLS} looks in a row: {what}")]

    def _lacks_offset(self, line: Line) -> bool:
        """Is the offset missing for a moment?  If it is for long, it cannot be read any more."""
        is_missing = line.offset is None and self._line is not None and self._line.offset is not None
        self._polls_without_offset = self._polls_without_offset + 1 if is_missing else 0
        return 0 < self._polls_without_offset < LOST_POLLS

    def _begin_with(self, line: Line, poll: Poll) -> None:
        self._line, self._since = line, poll.middle
        self._account = TscAccount(self._rates, poll.middle)
        self._account.note(poll.events)

    def _flags_change(self, page: TimeInfo, poll: Poll) -> list[Change]:
        is_same = page.flags == self._flags
        return [] if is_same else [FlagsChange(poll.middle, self._vcpu, self._flags, page.flags)]

    def _compared(self, before: Line, line: Line, poll: Poll, stopped: Stopped) -> list[Change]:
        """What the line is after the one before."""
        self._move = self._moving(before, line, stopped)
        if self._move is not None:
            self._account.note(poll.events)
            return self._unknown_move(self._move, before, line, poll)
        step = self._step(before, line, poll)
        self._line, self._since = line, poll.middle
        if step is None:
            self._account.note(poll.events)
            self._pauses = stopped.ended
            return []
        self._events = ()
        if stopped.is_late and len(self._pauses) < step.lines:
            self._waiting = step
            return []
        return [self._with_pauses(step)]

    def _moving(self, before: Line, line: Line, stopped: Stopped) -> _Move | None:
        """The TSC's write, if it is open whether the guest runs by this line with that TSC.

        A VMM writes the TSC of a guest that stands, and KVM replaces the line before the guest runs; then what lies
        there meanwhile is no clock of anyone.  So a line counts with another TSC if it came after it, or if some polls
        saw both while the guest was not stopped; but not the old line after what may be a reset, where no guest may
        look at that page any more.
        """
        move = self._move
        if before.offset is None or line.offset is None or line.offset == before.offset:
            return None
        if move is None or move.line.offset != line.offset:
            return _Move(line, 1, 1 if move is None else move.offsets + 1)
        if _is_new(move.line.info, line.info):
            return None
        polls = 1 if stopped.is_stopped else move.polls + 1
        was_paused = any(event.kind is VmEventKind.RESUME for event in self._events)  # and put back to a snapshot
        may_be_reset = self._account.is_doubted or was_paused or not self._tells_events
        if polls >= MOVED_POLLS and (_is_new(before.info, line.info) or not may_be_reset):
            return None
        return _Move(line, polls, move.offsets)

    def _unknown_move(self, move: _Move, before: Line, line: Line, poll: Poll) -> list[Change]:
        """What is told of a TSC that was written at a reset, once; and of one that is another all the time."""
        if move.offsets == OFFSETS_MAX:
            lines = self._lines(before.info, line.info) if _is_new(before.info, line.info) else 0
            step = self._made(before, line, poll, lines, TscBasis.CHANGED)
            self._begin_with(line, poll)
            self._move, self._events, self._pauses = None, (), ()
            return [step]
        return [self._made(before, line, poll, 0, TscBasis.CHANGED)] if move.polls == MOVED_POLLS else []

    def _step(self, before: Line, line: Line, poll: Poll) -> Step | None:
        """The step from one line to the other; None if nothing is new."""
        if _is_new(before.info, line.info):
            lines = self._lines(before.info, line.info)
            return self._made(before, line, poll, lines, self._basis(before, line, poll))
        is_moved = before.offset is not None and line.offset not in {None, before.offset}
        return self._made(before, line, poll, 0, TscBasis.OFFSETS) if is_moved else None

    def _made(self, before: Line, line: Line, poll: Poll, lines: int, basis: TscBasis) -> Step:
        is_scaled = self._rates.is_scaled(line.info)
        step_ns, bound_ns = step_within(before, line, self._since, poll.middle, is_scaled=is_scaled)
        is_known = basis is not TscBasis.CHANGED
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
            events=self._events,
        )

    def _lines(self, before: TimeInfo, after: TimeInfo) -> int:
        """How many lines followed each other, by the version; one that went back, or stayed, is of a new count."""
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
        pauses, self._pauses = self._pauses, ()
        told = with_seen(step, pauses, self._rates.speed(step.before))
        if told.basis is not step.basis:
            self._account = TscAccount(self._rates, step.at)
        return told


def _is_new(before: TimeInfo, after: TimeInfo) -> bool:
    """Was the page written, but for its flags?"""
    return before[:5] != after[:5]
