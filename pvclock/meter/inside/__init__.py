"""What is wrong with a guest's clock, from a measurement made inside it: docs/probe.md.

    record = parse_record(text)                 the last whole line of a console's output; ProbeRecordError, ProbeFailed
    verdict = judge(record, Budgets(max_warp_ns=...))
    verdict.status, verdict.exit_status, verdict.findings, verdict.open, verdict.floors, verdict.story
    verdict_document(verdict)                   the same for JSON

parse_step_ns() and parse_drift_ppb() of pvclock.meter.quantity_text read the budgets' texts.
"""

from pvclock.meter.inside.judge import judge
from pvclock.meter.inside.promises import Promises, promises
from pvclock.meter.inside.reading import parse_record
from pvclock.meter.inside.record import ProbeRecord
from pvclock.meter.inside.verdict import (
    Budgets,
    Finding,
    FindingCode,
    Floor,
    OpenQuestion,
    OpenReason,
    Verdict,
    Weight,
    verdict_document,
)
from pvclock.meter.verdict_status import VerdictStatus

__all__ = [
    "parse_record",
    "judge",
    "promises",
    "verdict_document",
    "Budgets",
    "Verdict",
    "VerdictStatus",
    "Finding",
    "FindingCode",
    "Weight",
    "Floor",
    "OpenQuestion",
    "OpenReason",
    "ProbeRecord",
    "Promises",
]
