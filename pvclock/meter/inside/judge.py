"""The verdict on a measurement from inside: every finding that it proves, and how the budgets fared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Final

from pvclock.meter.inside.advice import Remedies
from pvclock.meter.inside.apart import Windows, apart_findings
from pvclock.meter.inside.budgets import check_budgets
from pvclock.meter.inside.claims import BETWEEN_CPUS, frequency_findings, promise_findings, stopped_findings
from pvclock.meter.inside.kernel import clocksource_findings, complaint_findings
from pvclock.meter.inside.motion import drift_findings, rate_findings
from pvclock.meter.inside.pages import no_page_findings, stable_clocks, without_unwritten_pages
from pvclock.meter.inside.promises import Promises, promises
from pvclock.meter.inside.record import ClockRecord, ProbeRecord
from pvclock.meter.inside.steps import step_findings, step_floors
from pvclock.meter.inside.story import story
from pvclock.meter.inside.symptoms import title
from pvclock.meter.inside.verdict import (
    Budgets,
    Finding,
    FindingCode,
    Floor,
    OpenQuestion,
    OpenReason,
    Verdict,
    Weight,
)
from pvclock.meter.inside.windows import all_windows, far_edge, is_any_apart, widest_half
from pvclock.meter.inside.words import floor_in_words, listed
from pvclock.meter.verdict_status import VerdictStatus

__all__ = ["judge"]

COMPARED: Final = frozenset({"tsc", "monotonic", "pvclock", "hyperv"})
"""Clocks that a probe compares between CPUs; the others are one device, or one clock's other face."""


def judge(record: ProbeRecord, budgets: Budgets | None = None) -> Verdict:
    """Hold a record against what its guest was promised, and against budgets.

    Without budgets each proven fault breaks.  A budget takes the place of the faults of its kind: a fault within it is
    told and breaks nothing.
    """
    budgets = budgets or Budgets()
    told, unwritten = promises(record), no_page_findings(record)
    record = without_unwritten_pages(record)
    windows = {clock.name: all_windows(clock, len(record.cpus)) for clock in record.clocks if _is_compared(clock)}
    floors = [_floor(record, clock, windows[clock.name]) for clock in record.clocks if clock.name in windows]
    found = [*_findings(record, told, windows, floors), *unwritten]
    against = check_budgets(record, windows, budgets)
    broken = [each.what for each in found if each.weight is Weight.FAULT and not _is_budgeted(each, budgets)]
    open_ = [*_not_compared(record, floors), *against.open]
    return Verdict(
        _status([*broken, *against.broken], open_),
        tuple(found),
        tuple(against.broken),
        tuple(open_),
        tuple(floors),
        tuple(story(record, told)),
        told,
        any(record.added_ns),
        tuple(each.cpu for each in record.cpus),
        record.cpus_present,
        tuple(step_floors(record)),
    )


# Inside


def _is_compared(clock: ClockRecord) -> bool:
    return bool(clock.pairs)


def _is_budgeted(finding: Finding, budgets: Budgets) -> bool:
    of_kind: Mapping[str, Fraction | None] = {
        "max_warp": budgets.max_warp_ns,
        "max_step": budgets.max_step_ns,
        "max_drift": budgets.max_drift_ppb,
    }
    return of_kind.get(finding.budget) is not None


def _status(broken: Sequence[str], open_: Sequence[OpenQuestion]) -> VerdictStatus:
    if broken:
        return VerdictStatus.BROKEN
    return VerdictStatus.UNDECIDED if open_ else VerdictStatus.PASSED


def _findings(
    record: ProbeRecord, told: Promises, windows: Mapping[str, Windows], floors: Sequence[Floor]
) -> list[Finding]:
    """All of them, faults first; with a fault that was put in nothing is to be changed."""
    remedies = Remedies(told.hypervisor, record.kernel.available if record.kernel else ())
    faults: list[Finding] = []
    for clock in record.clocks:
        if clock.name in windows:
            faults += apart_findings(record, clock, windows[clock.name], remedies)
            faults += drift_findings(record, clock, windows[clock.name], remedies)
        else:
            faults += apart_findings(record, clock, {}, remedies)
        faults += step_findings(record, clock, remedies)
        faults += rate_findings(record, clock, remedies)
    faults = [_allowed(each) if _is_allowed(each, told) else each for each in faults]
    found = [
        *promise_findings(record, told, faults, remedies),
        *_with_cause(faults),
        *frequency_findings(record, told),
        *stopped_findings(record),
        *complaint_findings(record.kernel, _of_tsc(record, faults, floors)),
        *clocksource_findings(record.kernel, told),
        *_added(record),
    ]
    if any(record.added_ns):
        found = [each._replace(change=()) for each in found]
    return sorted(found, key=lambda each: each.weight is Weight.NOTE)


def _with_cause(faults: Sequence[Finding]) -> list[Finding]:
    """A clock is apart on the CPUs whose TSC is: that is said with it."""
    tsc = [each.cpus for each in faults if each.code is FindingCode.OFFSET and each.clock == "tsc"]
    return [
        each._replace(what=f"{each.what}; so is the TSC there")
        if each.code is FindingCode.OFFSET and each.clock != "tsc" and each.cpus in tsc
        else each
        for each in faults
    ]


def _of_tsc(record: ProbeRecord, faults: Sequence[Finding], floors: Sequence[Floor]) -> str:
    """What a kernel's complaint of the TSC is held against."""
    if any(record.added_ns):
        return "this run is no witness, for a fault was put in by --add"
    if proven := [each for each in faults if each.clock == "tsc"]:
        return f"this run agrees: {proven[0].what}"
    floor = next((each.ns for each in floors if each.clock == "tsc"), None)
    within = f" beyond its floor of {floor_in_words(floor)} between CPUs" if floor is not None else ""
    return f"this run found nothing wrong with the TSC{within}"


def _is_allowed(fault: Finding, told: Promises) -> bool:
    """Are CPUs' pages apart that nobody promised to be in order?  One that goes back by itself keeps no word at all."""
    is_between = fault.code in {*BETWEEN_CPUS, FindingCode.UNSTEADY} and len(fault.cpus) > 1
    return is_between and fault.clock == "pvclock" and "pvclock" not in stable_clocks(told)


def _allowed(fault: Finding) -> Finding:
    remark = "; without STABLE kvmclock's ABI allows that, and Linux puts its readings in order by itself"
    return fault._replace(weight=Weight.NOTE, what=fault.what + remark, change=())


def _added(record: ProbeRecord) -> list[Finding]:
    added = [(cpu.cpu, ns) for cpu, ns in zip(record.cpus, record.added_ns, strict=False) if ns]
    if not added:
        return []
    told = listed([f"{ns:+,} ns on CPU {cpu}" for cpu, ns in added])
    return [
        Finding(
            FindingCode.ADDED_FAULT,
            Weight.NOTE,
            "",
            f"a fault was put in by --add: {told}",
            f"a fault was put in by --add: {told}; what is found of it is no fault of this guest's clock",
            "nothing: only the probe's own readings were changed.",
            (),
            tuple(cpu for cpu, _ in added),
        )
    ]


# Floors


def _floor(record: ProbeRecord, clock: ClockRecord, windows: Windows) -> Floor:
    name, edge = title(clock.name), far_edge(windows)
    if edge is None:
        never = [pair for pair, window in windows.items() if window is None]
        a, b = (record.cpus[place].cpu for place in never[0])
        return Floor(clock.name, None, None, f"{name}: CPUs {a} and {b} were never compared{_more(len(never) - 1)}")
    if not is_any_apart(windows):
        words = f"no two CPUs are further apart than {floor_in_words(edge)}, and what is less may go unseen"
        return Floor(clock.name, edge, edge, f"{name}: {words}")
    unseen = widest_half(windows)
    words = f"beside what was found an offset of less than {floor_in_words(unseen)} may go unseen"
    return Floor(
        clock.name, unseen, edge, f"{name}: {words}; no two CPUs are further apart than {floor_in_words(edge)}"
    )


def _more(pairs: int) -> str:
    if pairs == 1:
        return ", nor was one other pair"
    return f", nor were {pairs:,} other pairs" if pairs else ""


def _not_compared(record: ProbeRecord, floors: Sequence[Floor]) -> list[OpenQuestion]:
    """What leaves the whole verdict open, budgets or not."""
    if len(record.cpus) > 1 and not floors:
        return [OpenQuestion(OpenReason.NOT_COMPARED, "several CPUs, and no clock was compared between them")]
    never = [each.what for each in floors if each.ns is None]
    if len(record.cpus) > 1:
        told = {each.clock for each in floors}
        left = [title(each.name) for each in record.clocks if each.name in COMPARED and each.name not in told]
        never += [f"{name} was not compared between CPUs" for name in left]
    return [OpenQuestion(OpenReason.NOT_COMPARED, each) for each in never]
