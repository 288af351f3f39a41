"""What a watch came to: how often, how much and how sure, for its end and for budgets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import NamedTuple, TypeVar

from pvclock.meter.watch.changes import Change, Disagreement, FlagsChange, PageLost, Stall, Step, TscBasis
from pvclock.meter.watch.lines import is_same_line

__all__ = ["WatchSummary", "is_sure", "surely_ns"]

T = TypeVar("T")


class WatchSummary(NamedTuple):
    """All that was found since the watch began.

    duration_ns: from the first poll to the last, by the host's TSC.  lines: that replaced others, on all pages.
    steps: findings of that, unknown ones among them (`unknown`), those that rest on an assumption (`assumed`), and
    those of more than one line, of which the sum is exact and the single ones are not known (`split`).
    forward, backward: the greatest of either direction.  sum_ns: of all known steps of a vCPU, and of the vCPU whose
    sum is furthest from 0.
    sure_step, assumed_step: the one that is surely greatest, see surely_ns(), among those that rest on no assumption,
    and on one.  least_seen, most_seen: by seen_ns.
    sure_disagreement, assumed_disagreement: the greatest.
    restarts: the pages were searched again so often, and what was between is unknown.
    """

    polls: int = 0
    duration_ns: int = 0
    lines: int = 0
    steps: int = 0
    unknown: int = 0
    assumed: int = 0
    split: int = 0
    forward: Step | None = None
    backward: Step | None = None
    sum_ns: int = 0
    sure_step: Step | None = None
    assumed_step: Step | None = None
    least_seen: Step | None = None
    most_seen: Step | None = None
    disagreements: int = 0
    sure_disagreement: Disagreement | None = None
    assumed_disagreement: Disagreement | None = None
    flags_changes: int = 0
    pages_lost: int = 0
    restarts: int = 0
    stalls: int = 0
    longest_stall_ns: int = 0


class Tally:
    """Makes the summary, change by change."""

    def __init__(self) -> None:
        self.summary = WatchSummary()
        self._sums_ns: dict[int, int] = {}

    def note_poll(self, duration_ns: int) -> None:
        """A poll was taken, so long after the first."""
        self.summary = self.summary._replace(polls=self.summary.polls + 1, duration_ns=duration_ns)

    def note_restart(self) -> None:
        """The pages are searched again."""
        self.summary = self.summary._replace(restarts=self.summary.restarts + 1)

    def note(self, changes: Iterable[Change]) -> None:
        """Take what was found."""
        for change in changes:
            now = self.summary
            match change:
                case Step():
                    self.summary = self._with_step(now, change)
                case Disagreement():
                    self.summary = _with_disagreement(now, change)
                case FlagsChange():
                    self.summary = now._replace(flags_changes=now.flags_changes + 1)
                case PageLost():
                    self.summary = now._replace(pages_lost=now.pages_lost + 1)
                case Stall():
                    longest_ns = max(now.longest_stall_ns, change.gap_ns)
                    self.summary = now._replace(stalls=now.stalls + 1, longest_stall_ns=longest_ns)

    def _with_step(self, now: WatchSummary, step: Step) -> WatchSummary:
        now = now._replace(lines=now.lines + step.lines, steps=now.steps + 1)
        if step.step_ns is None:
            return now._replace(unknown=now.unknown + 1)
        self._sums_ns[step.vcpu] = self._sums_ns.get(step.vcpu, 0) + step.step_ns
        now = now._replace(
            sum_ns=max(self._sums_ns.values(), key=abs),
            split=now.split + (step.lines > 1),
            forward=_greater(now.forward, step if step.step_ns > 0 else None, lambda it: it.step_ns or 0),
            backward=_greater(now.backward, step if step.step_ns < 0 else None, lambda it: -(it.step_ns or 0)),
        )
        if step.seen_ns is not None:
            now = now._replace(
                least_seen=_greater(now.least_seen, step, lambda it: -(it.seen_ns or 0)),
                most_seen=_greater(now.most_seen, step, lambda it: it.seen_ns or 0),
            )
        if is_sure(step):
            return now._replace(sure_step=_greater(now.sure_step, step, surely_ns))
        return now._replace(assumed=now.assumed + 1, assumed_step=_greater(now.assumed_step, step, surely_ns))


def is_sure(step: Step) -> bool:
    """Does it rest on no assumption?  Nor does a line that came again as it was: a written TSC would show in it."""
    return step.basis is TscBasis.OFFSETS or (step.basis is TscBasis.ASSUMED and is_same_line(step.before, step.after))


def surely_ns(step: Step) -> Fraction:
    """At least one single step of these lines was at least that long, either way."""
    if step.step_ns is None or step.bound_ns is None:
        return Fraction(0)
    return Fraction(max(abs(step.step_ns) - step.bound_ns, 0), max(step.lines, 1))


def _with_disagreement(now: WatchSummary, found: Disagreement) -> WatchSummary:
    now = now._replace(disagreements=now.disagreements + 1)
    if found.basis is TscBasis.OFFSETS:
        return now._replace(sure_disagreement=_greater(now.sure_disagreement, found, lambda it: it.by_ns))
    return now._replace(assumed_disagreement=_greater(now.assumed_disagreement, found, lambda it: it.by_ns))


def _greater(now: T | None, other: T | None, key: Callable[[T], float | Fraction]) -> T | None:
    """The greater one by `key`; the earlier one of equals."""
    if now is None or other is None:
        return now or other
    return other if key(other) > key(now) else now
