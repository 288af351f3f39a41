"""How the budgets of a watch fared, in words."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text

from pvclock.meter.verdict_status import VerdictStatus
from pvclock.meter.watch.budgets import Verdict

__all__ = ["verdict_in_words"]


def verdict_in_words(verdict: Verdict | None) -> Iterator[Text]:
    """A line for the verdict, and one for each reason."""
    match verdict:
        case Verdict(VerdictStatus.PASSED):
            yield Text("Within its budgets.", "green")
        case Verdict(VerdictStatus.BROKEN, findings):
            yield Text("A budget is broken:", "red")
            yield from (Text(f"  {finding}", "red") for finding in findings)
        case Verdict(VerdictStatus.UNDECIDED, findings):
            yield Text("Undecided whether it keeps its budgets:", "yellow")
            yield from (Text(f"  {finding}", "yellow") for finding in findings)
