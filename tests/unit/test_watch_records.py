"""The JSON lines of `pvclock watch` are those that docs/watch.md describes: each kind, each key."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest

from pvclock.commands.outcome import line_json
from pvclock.host.watch import TroubleKind
from pvclock.meter.verdict_status import VerdictStatus
from pvclock.meter.watch.budgets import Budgets, Verdict
from pvclock.meter.watch.changes import Disagreement, FlagsChange, PageLost, Stall, Step, TscBasis
from pvclock.meter.watch.host_troubles import HostTrouble
from pvclock.meter.watch.loop import Finding, VmEnded
from pvclock.meter.watch.page_finder import PagesFound
from pvclock.meter.watch.summary import WatchSummary
from pvclock.meter.watch.vm import VmEvent, VmEventKind
from pvclock.quantities import Gpa, GuestNs, GuestTsc, HostTsc
from pvclock.readings import TimeInfo
from qemu_glue.watch.instants import utc_text
from qemu_glue.watch.records import budgets_record, finding_record, summary_record
from tests.watch_document import documented_keys, keys_of

pytestmark = pytest.mark.row("E3")

PAGE = TimeInfo(2, GuestTsc(1), GuestNs(2), 1 << 31, -1, 1)
EVENTS = (VmEvent(VmEventKind.STOP, 1_764_252_000_123_456_789),)
AT = HostTsc(9)
STEP = Step(AT, HostTsc(8), 0, PAGE, PAGE, 1, TscBasis.OFFSETS, -5, 2, None, None, EVENTS)
APART = Disagreement(AT, 0, 1, 115, 2, 31, EVENTS, TscBasis.ASSUMED)
FINDINGS: list[Finding] = [
    STEP,
    APART,
    FlagsChange(AT, 1, 1, 3),
    PageLost(AT, 1, "mul is 0"),
    Stall(AT, 15),
    EVENTS[0],
    HostTrouble(TroubleKind.SUSPEND, False, "it slept"),
    PagesFound((Gpa(0x1000),), "as given"),
    VmEnded("it is gone"),
]


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda finding: type(finding).__name__)
def test_a_finding_has_the_documented_keys(finding: Finding) -> None:
    """Its kind is a row of the document, which names all its keys, those of what is in it, too."""
    record = json.loads(line_json("watch", finding_record(finding)))
    assert record.pop("schema") == "pvclock.watch/1"
    assert set(keys_of(record)) - {"kind"} <= documented_keys()[record["kind"]]


def test_the_summary_has_the_documented_keys() -> None:
    """Counts, and the greatest findings as they are in their lines."""
    summary = WatchSummary(polls=3, sure_step=STEP, sure_disagreement=APART)
    record = json.loads(line_json("watch", summary_record(summary)))
    assert record.keys() - {"schema"} == documented_keys()["summary"]
    assert record["sure_step"]["step_ns"] == -5
    assert record["sure_disagreement"]["events"] == [{"what": "stop", "utc": "2025-11-27T14:00:00.123456Z"}]


def test_budgets_are_numbers() -> None:
    """Whole where they are whole; without budgets there is no verdict."""
    verdict = Verdict(VerdictStatus.BROKEN, ["it stepped"])
    record = budgets_record(Budgets(Fraction(1000), Fraction(1, 2)), verdict)
    assert record == {
        "max_step_ns": 1000,
        "max_drift_ppb": 0.5,
        "tsc_unchanged": False,
        "allow_pauses": False,
        "verdict": "broken",
        "reasons": ["it stepped"],
    }
    assert record.keys() <= documented_keys()["budgets"]
    assert budgets_record(Budgets(), None)["verdict"] is None


def test_utc_is_whole_us() -> None:
    """As the VMM's own stamps are, whatever the rest of a second is."""
    assert [utc_text(ns) for ns in (0, 999)] == ["1970-01-01T00:00:00.000000Z"] * 2
