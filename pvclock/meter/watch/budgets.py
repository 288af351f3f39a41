"""Budgets for a guest's clock: how far it may step and drift, and whether a watch shows that it kept to them.

A budget is broken only if a finding is beyond it at the better end of its bound, and undecided if a bound, an
assumption or something unknown leaves it open.  Disagreements of pages count as steps: a reader of the page that is
ahead goes back by that when it is brought up to date.  A stale page, of a vCPU that does not run, has no reader.

A page that does not change is a clock that does not step, unless the guest writes its TSC: KVM makes a new page when a
guest writes IA32_TSC_ADJUST, and none when it writes IA32_TSC.  That is seen where TSC offsets can be read, and nowhere
else; Linux does not do it.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

from pvclock.meter.verdict_status import VerdictStatus
from pvclock.meter.watch.changes import Disagreement, Step
from pvclock.meter.watch.disagreements import AGREE_NS
from pvclock.meter.watch.rate import PageRate
from pvclock.meter.watch.summary import WatchSummary, surely_ns
from pvclock.meter.watch.words import bounded_ns, counted, duration, plain_ns, rate_in_words

__all__ = ["Budgets", "Verdict", "judge"]


class Budgets(NamedTuple):
    """What is allowed; None: anything.

    max_step_ns: of a clock's steps against the TSC, either way, and of pages' disagreements.  max_drift_ppb: of its
    rate against the reference, either way.  tsc_unchanged: the user knows that nobody changed the guest's TSC where
    its offset cannot be read.  allow_pauses: a step at a pause that the VMM told counts by what the guest saw of it.
    """

    max_step_ns: Fraction | None = None
    max_drift_ppb: Fraction | None = None
    tsc_unchanged: bool = False
    allow_pauses: bool = False


class Verdict(NamedTuple):
    """How the budgets fared, and each reason for it, in words."""

    status: VerdictStatus
    findings: list[str]


class _Finding(NamedTuple):
    status: VerdictStatus
    what: str


def judge(budgets: Budgets, summary: WatchSummary, rates: Mapping[int, PageRate]) -> Verdict:
    """Hold what a watch found against its budgets.

    summary: the watcher's summary_as_seen, if pauses are allowed.  rates: each vCPU's, of its page's present line.
    """
    found = []
    if budgets.max_step_ns is not None:
        found += _steps(budgets.max_step_ns, budgets, summary)
        found += _disagreements(budgets.max_step_ns, budgets, summary)
    if budgets.max_drift_ppb is not None:
        found += _drifts(budgets.max_drift_ppb, rates)
    for status in (VerdictStatus.BROKEN, VerdictStatus.UNDECIDED):
        told = [each.what for each in found if each.status is status]
        if told:
            return Verdict(status, told)
    return Verdict(VerdictStatus.PASSED, [])


# Inside


def _broken(what: str) -> _Finding:
    return _Finding(VerdictStatus.BROKEN, what)


def _undecided(what: str) -> _Finding:
    return _Finding(VerdictStatus.UNDECIDED, what)


def _steps(most_ns: Fraction, budgets: Budgets, summary: WatchSummary) -> list[_Finding]:
    trusted = [summary.sure_step, summary.assumed_step if budgets.tsc_unchanged else None]
    found = [_broken(_step_told(step, most_ns)) for step in trusted if step and surely_ns(step) > most_ns]
    return found or _open_steps(most_ns, budgets, summary)


def _open_steps(most_ns: Fraction, budgets: Budgets, summary: WatchSummary) -> list[_Finding]:
    """What leaves open whether a step was longer."""
    found = []
    if summary.polls < 2:
        found.append("the pages were not looked at twice")
    if most_ns < AGREE_NS:
        found.append(f"a budget of {plain_ns(most_ns)} is below what can be measured, {AGREE_NS} ns")
    if summary.unknown:
        seen = ", or what it saw of a pause is unknown" * budgets.allow_pauses
        found.append(f"{counted(summary.unknown, 'unknown step')}: the guest's TSC was changed, or may have been{seen}")
    if summary.assumed and not budgets.tsc_unchanged:
        found.append(
            f"{counted(summary.assumed, 'step')} known only if nobody changed the guest's TSC, whose offset cannot be "
            "read; if you know that, say --tsc-unchanged"
        )
    if summary.split:
        found.append(
            f"at {counted(summary.split, 'look')} more than one line had come: only the sum of their steps is known"
        )
    if summary.restarts:
        found.append(f"other pages were found {counted(summary.restarts, 'time')}, and what was between is unknown")
    if summary.pages_lost:
        found.append(f"a page was lost {counted(summary.pages_lost, 'time')}")
    step = summary.possible_step
    if step and abs(step.step_ns or 0) + (step.bound_ns or 0) > most_ns:
        found.append(_step_told(step, most_ns))
    return [_undecided(each) for each in found]


def _step_told(step: Step, most_ns: Fraction) -> str:
    many = f" in {step.lines} lines" if step.lines > 1 else ""
    causes = " and ".join(dict.fromkeys(event.kind for event in step.events))
    return (
        f"vCPU {step.vcpu}'s clock stepped by {bounded_ns(step.step_ns or 0, step.bound_ns or 0)}{many}"
        f"{f', at {causes}' if causes else ''}: {_more(abs(step.step_ns or 0), most_ns)}{_of_pause(step)}"
    )


def _of_pause(step: Step) -> str:
    """What a user may not know: a pause that its guest does not see is a step, too."""
    if step.seen_ns is None or step.seen_bound_ns is None:
        return ""
    if step.seen_ns == step.step_ns:
        return ", as its guest saw it"
    return (
        f"; a pause counts by the TSC, with --allow-pauses by what the guest saw, "
        f"{bounded_ns(step.seen_ns, step.seen_bound_ns)}"
    )


def _disagreements(most_ns: Fraction, budgets: Budgets, summary: WatchSummary) -> list[_Finding]:
    sure, assumed = summary.sure_disagreement, summary.assumed_disagreement
    trusted = [sure, assumed if budgets.tsc_unchanged else None]
    found = [_broken(_apart(it, most_ns)) for it in trusted if it and it.by_ns - it.bound_ns > most_ns]
    possible = summary.possible_disagreement
    if not found and possible and possible.by_ns + possible.bound_ns > most_ns:
        return [_undecided(_apart(possible, most_ns))]
    return found


def _apart(found: Disagreement, most_ns: Fraction) -> str:
    return (
        f"vCPU {found.ahead}'s page was {bounded_ns(found.by_ns, found.bound_ns).removeprefix('+')} ahead of "
        f"vCPU {found.behind}'s, for {duration(found.least_ns)} at least: {_more(found.by_ns, most_ns)}"
    )


def _drifts(most_ppb: Fraction, rates: Mapping[int, PageRate]) -> list[_Finding]:
    if not rates:
        return [_undecided("no rate was measured")]
    distinct = {rate: vcpu for vcpu, rate in sorted(rates.items(), reverse=True)}  # most often all vCPUs have one
    found = [_drift(vcpu, rate, most_ppb) for rate, vcpu in reversed(distinct.items())]
    return [each for each in found if each]


def _drift(vcpu: int, rate: PageRate, most_ppb: Fraction) -> _Finding | None:
    if rate.ppb is None or rate.bound_ppb is None:
        return _undecided(f"vCPU {vcpu}'s rate is unknown: {rate.why}")
    told = f"vCPU {vcpu}'s rate is {rate_in_words(rate.ppb, rate.bound_ppb)}"
    if abs(rate.ppb) - rate.bound_ppb > most_ppb:
        return _broken(f"{told}: more than {float(most_ppb):g} ppb")
    if abs(rate.ppb) + rate.bound_ppb > most_ppb:
        return _undecided(f"{told}, which leaves {float(most_ppb):g} ppb open; a longer watch knows it better")
    return None


def _more(found_ns: int, most_ns: Fraction) -> str:
    more_ns, budget = found_ns - most_ns, plain_ns(most_ns)
    return f"{duration(round(more_ns))} more than {budget}" if more_ns > 0 else f"too near to {budget} to tell"
