"""What the watch of one VM came to, at its end: as JSON, and how its budgets fared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pvclock.meter.watch.budgets import Budgets, Verdict
from pvclock.meter.watch.loop import WatchLoop
from pvclock.meter.watch.verdict import judged
from qemu_glue.watch.records import budgets_record, finding_record, rate_records, summary_record, vm_record

__all__ = ["Ending", "ending_of"]


class Ending(NamedTuple):
    """result: all that was found, for JSON.  verdict: None without budgets."""

    result: Mapping[str, object]
    verdict: Verdict | None

    @property
    def exit_status(self) -> int:
        """As the process has it."""
        return 0 if self.verdict is None else self.verdict.status.exit_status


def ending_of(loop: WatchLoop, budgets: Budgets, why_ended: str | None) -> Ending:
    """The end of a watch.  why_ended: the VM has, if so."""
    verdict = judged(budgets, loop)
    result = {
        **vm_record(loop),
        "pages": loop.finder.pages,
        "is_searching": loop.finder.is_searching,
        "why_ended": why_ended,
        "summary": summary_record(loop.watcher.summary),
        "rates": rate_records(loop),
        "host_troubles": list(map(finding_record, loop.troubles)),
        "budgets": budgets_record(budgets, verdict),
    }
    return Ending(result, verdict)
