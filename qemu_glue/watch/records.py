"""The JSON of `pvclock watch`, schema pvclock.watch/1: docs/watch.md says what each key is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

from pvclock.meter.watch.budgets import Budgets, Verdict
from pvclock.meter.watch.changes import Disagreement, FlagsChange, PageLost, Stall, Step
from pvclock.meter.watch.loop import Finding, HostTrouble, VmEnded, WatchLoop
from pvclock.meter.watch.page_finder import PagesFound
from pvclock.meter.watch.summary import WatchSummary
from pvclock.meter.watch.vm import VmEvent
from qemu_glue.watch.instants import utc_text

__all__ = ["budgets_record", "finding_record", "rate_records", "summary_record", "vm_record"]


def finding_record(finding: Finding) -> Mapping[str, object]:
    """A finding without its instants: `kind`, and its numbers."""
    match finding:
        case Step():
            return {"kind": "step", **_step(finding)}
        case Disagreement():
            return {"kind": "disagreement", **_disagreement(finding)}
        case FlagsChange():
            return {"kind": "flags", **_all_but_at(finding)}
        case PageLost():
            return {"kind": "page_lost", **_all_but_at(finding)}
        case Stall():
            return {"kind": "stall", **_all_but_at(finding)}
        case VmEvent():
            return {"kind": "event", "event": finding.kind}
        case HostTrouble():
            return {"kind": "host", "trouble": finding.kind, "unstable": finding.unstable, "why": finding.why}
        case PagesFound():
            return {"kind": "found", **finding._asdict()}
        case VmEnded():
            return {"kind": "ended", **finding._asdict()}


def vm_record(loop: WatchLoop) -> Mapping[str, object]:
    """What is watched, and how."""
    return {
        "vm": loop.vm.name,
        "vcpus": loop.vm.vcpus,
        "means": loop.vm.ram.means,
        "interval_s": loop.interval_s,
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


def summary_record(summary: WatchSummary) -> Mapping[str, object]:
    """All that was found: counts, and the greatest of each kind."""

    def record(value: object) -> object:
        match value:
            case Step():
                return _step(value)
            case Disagreement():
                return _disagreement(value)
        return value

    return {name: record(value) for name, value in summary._asdict().items()}


def budgets_record(budgets: Budgets, verdict: Verdict | None) -> Mapping[str, object]:
    """What was allowed, and how that fared; without budgets there is no verdict."""
    return {
        "max_step_ns": _number(budgets.max_step_ns),
        "max_drift_ppb": _number(budgets.max_drift_ppb),
        "tsc_unchanged": budgets.tsc_unchanged,
        "verdict": None if verdict is None else verdict.status,
        "reasons": [] if verdict is None else verdict.findings,
    }


def _step(step: Step) -> Mapping[str, object]:
    return {**_all_but_at(step), "events": _events(step.events)}


def _disagreement(found: Disagreement) -> Mapping[str, object]:
    return {**_all_but_at(found), "events": _events(found.events)}


def _all_but_at(change: Step | Disagreement | FlagsChange | PageLost | Stall) -> Mapping[str, object]:
    """Its fields but for those that are instants of the host's TSC."""
    return {name: value for name, value in change._asdict().items() if name not in {"at", "since"}}


def _events(events: Sequence[VmEvent]) -> list[Mapping[str, object]]:
    return [{"event": event.kind, "utc": utc_text(event.utc_ns)} for event in events]


def _number(number: Fraction | None) -> int | float | None:
    if number is None or number.denominator == 1:
        return number and int(number)
    return float(number)
