"""What a watch's budgets came to, and what else than its findings leaves them open."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from pvclock.meter.verdict_status import VerdictStatus
from pvclock.meter.watch.budgets import Budgets, Verdict, judge
from pvclock.meter.watch.loop import WatchLoop

__all__ = ["NEVER_RAN", "judged"]

NEVER_RAN: Final = "the guest was stopped all the while"


def judged(budgets: Budgets, loop: WatchLoop) -> Verdict | None:
    """The verdict; None without budgets.

    What was passed is undecided if the guest never ran, if its pages were not to be seen at the end, or may not have
    been those, or if the host's TSC, by which all is measured, was wrong.
    """
    if budgets.max_step_ns is None and budgets.max_drift_ppb is None:
        return None
    watcher = loop.watcher
    verdict = judge(budgets, watcher.summary_as_seen if budgets.allow_pauses else watcher.summary, loop.rates())
    doubts = list(_doubts(loop))
    if verdict.status is VerdictStatus.BROKEN or not doubts:
        return verdict
    return Verdict(VerdictStatus.UNDECIDED, [*verdict.findings, *doubts])


def _doubts(loop: WatchLoop) -> Iterator[str]:
    if not loop.has_run:
        yield NEVER_RAN
    if loop.finder.is_searching:
        yield "the pages were not found again before the end"
    elif loop.finder.doubt is not None:
        known = f"if you know where the guest's pages are, say so, such as --page {loop.finder.places[0]:#x}"
        yield f"{loop.finder.doubt}; {known}"
    yield from (f"the host's TSC could not be trusted: {trouble.why}" for trouble in loop.troubles if trouble.unstable)
