"""The JSON of `pvclock watch`, schema pvclock.watch/1: docs/watch.md says what each key is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Final

from pvclock import Reference
from pvclock.meter.watch.ahead import Ahead
from pvclock.meter.watch.budgets import Budgets, Verdict
from pvclock.meter.watch.changes import Disagreement, FlagsChange, PageLost, Stall, Step
from pvclock.meter.watch.host_troubles import HostTrouble
from pvclock.meter.watch.loop import Finding, VmEnded, WatchLoop
from pvclock.meter.watch.page_finder import PagesFound
from pvclock.meter.watch.summary import WatchSummary
from pvclock.meter.watch.vm import VmEvent
from qemu_glue.watch.instants import utc_text

__all__ = [
    "budgets_record",
    "finding_record",
    "rate_records",
    "reading_record",
    "summary_record",
    "vm_record",
]


KINDS: Final = {
    Step: "step",
    Disagreement: "disagreement",
    FlagsChange: "flags",
    PageLost: "page_lost",
    Stall: "stall",
    VmEvent: "event",
    HostTrouble: "host",
    PagesFound: "found",
    VmEnded: "ended",
}
INSTANTS: Final = {"at", "since", "utc_ns"}
"""Fields that are told as at_s and utc."""


def finding_record(finding: Finding) -> Mapping[str, object]:
    """A finding without its instants: `kind`, and its numbers."""
    fields = _told(finding)
    if "kind" in fields:
        fields["what"] = fields.pop("kind")
    return {"kind": KINDS[type(finding)], **fields}


def vm_record(loop: WatchLoop) -> Mapping[str, object]:
    """What is watched, and how; in a fleet `vm` is the name that it has there."""
    return {
        "vm": loop.vm.name,
        "description": loop.vm.name,
        "vcpus": loop.vm.vcpus,
        "means": loop.vm.ram.means,
        "interval_s": loop.interval_s,
        "is_paused": loop.is_paused,
        "tsc_hz": loop.vm.tsc_hz,
        "host_tsc_hz": loop.host_tsc_hz,
        "reference": loop.reference,
        "why_no_offsets": loop.vm.why_no_offsets,
        "why_no_events": loop.vm.why_no_events,
    }


def rate_records(loop: WatchLoop) -> list[Mapping[str, object]]:
    """Each vCPU's rate, so far."""
    return [
        {"vcpu": vcpu, "rate_ppb": rate.ppb, "bound_ppb": rate.bound_ppb, "why": rate.why}
        for vcpu, rate in sorted(loop.rates().items())
    ]


def reading_record(reference: Reference, readings: Sequence[Ahead]) -> Mapping[str, object]:
    """How far each vCPU's clock is ahead of the reference."""
    return {"kind": "reading", "reference": reference, "readings": [each._asdict() for each in readings]}


def summary_record(summary: WatchSummary) -> Mapping[str, object]:
    """All that was found: counts, and the greatest of each kind."""
    return {
        name: _told(value) if isinstance(value, Step | Disagreement) else value
        for name, value in summary._asdict().items()
    }


def budgets_record(budgets: Budgets, verdict: Verdict | None) -> Mapping[str, object]:
    """What was allowed, and how that fared; without budgets there is no verdict."""
    return {
        "max_step_ns": _number(budgets.max_step_ns),
        "max_drift_ppb": _number(budgets.max_drift_ppb),
        "tsc_unchanged": budgets.tsc_unchanged,
        "allow_pauses": budgets.allow_pauses,
        "verdict": None if verdict is None else verdict.status,
        "reasons": [] if verdict is None else verdict.findings,
    }


def _told(finding: Finding) -> dict[str, object]:
    fields = {name: value for name, value in finding._asdict().items() if name not in INSTANTS}
    if isinstance(finding, Step | Disagreement):
        fields["events"] = [{"what": event.kind, "utc": utc_text(event.utc_ns)} for event in finding.events]
    return fields


def _number(number: Fraction | None) -> int | float | None:
    return None if number is None else int(number) if number.denominator == 1 else float(number)
