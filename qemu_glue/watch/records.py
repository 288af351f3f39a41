"""The JSON lines of `pvclock watch`, schema pvclock.watch/1: docs/watch.md says what each key is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

from pvclock.meter.watch.changes import Change, Disagreement, FlagsChange, PageLost, Stall, Step
from pvclock.meter.watch.vm import VmEvent

__all__ = ["change_record", "utc"]

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def change_record(change: Change) -> Mapping[str, object]:
    """A change without its instants: `kind` and its numbers."""
    match change:
        case Step():
            return {
                "kind": "step",
                "vcpu": change.vcpu,
                "step_ns": change.step_ns,
                "bound_ns": change.bound_ns,
                "basis": change.basis,
                "seen_ns": change.seen_ns,
                "seen_bound_ns": change.seen_bound_ns,
                "lines": change.lines,
                "before": change.before,
                "after": change.after,
                "events": _events(change.events),
            }
        case Disagreement():
            numbers = ("ahead", "behind", "by_ns", "bound_ns", "least_ns")
            return {
                "kind": "disagreement",
                **{name: getattr(change, name) for name in numbers},
                "events": _events(change.events),
            }
        case FlagsChange(vcpu=vcpu, before=before, after=after):
            return {"kind": "flags", "vcpu": vcpu, "before": before, "after": after}
        case PageLost(vcpu=vcpu, why=why):
            return {"kind": "page_lost", "vcpu": vcpu, "why": why}
        case Stall(gap_ns=gap_ns):
            return {"kind": "stall", "gap_ns": gap_ns}


def utc(utc_ns: int) -> str:
    """UTC to the us: 2026-11-27T14:03:04.512345Z."""
    return f"{(EPOCH + timedelta(microseconds=utc_ns // 1000)).isoformat(timespec='microseconds')[:-6]}Z"


def _events(events: Sequence[VmEvent]) -> list[Mapping[str, object]]:
    return [{"kind": event.kind, "utc": utc(event.utc_ns)} for event in events]
