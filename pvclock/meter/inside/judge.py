"""The verdict on a measurement from inside: every finding that it proves, and how the budgets fared."""

from __future__ import annotations

from pvclock.meter.inside.record import ProbeRecord
from pvclock.meter.inside.verdict import Budgets, Verdict

__all__ = ["judge"]


def judge(record: ProbeRecord, budgets: Budgets | None = None) -> Verdict:
    """Hold a record against what its guest was promised, and against budgets.

    Without budgets each proven fault breaks.  A budget takes the place of the faults of its kind: a fault within it is
    told and breaks nothing.
    """
    raise NotImplementedError
