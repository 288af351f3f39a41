"""What a measurement says of a clock and its budgets, seen from outside or from inside a guest."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["VerdictStatus"]


class VerdictStatus(StrEnum):
    """passed: nothing is proven wrong.  broken: a fault is, or a budget.  undecided: the measurement leaves it open."""

    PASSED = "passed"
    BROKEN = "broken"
    UNDECIDED = "undecided"

    @property
    def exit_status(self) -> int:
        """A command's."""
        match self:
            case VerdictStatus.PASSED:
                return 0
            case VerdictStatus.BROKEN:
                return 1
            case VerdictStatus.UNDECIDED:
                return 2
