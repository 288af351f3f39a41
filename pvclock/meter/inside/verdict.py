"""What a measurement from inside comes to: findings with their proof, floors, budgets, and an exit status."""

from __future__ import annotations

from enum import StrEnum
from fractions import Fraction
from typing import NamedTuple

from pvclock.meter.inside.promises import Promises
from pvclock.meter.verdict_status import VerdictStatus

__all__ = [
    "Budgets",
    "Finding",
    "FindingCode",
    "Floor",
    "OpenQuestion",
    "OpenReason",
    "StepFloor",
    "Verdict",
    "Weight",
    "plain_values",
    "verdict_document",
]


class Weight(StrEnum):
    """fault: this measurement proves it.  note: worth knowing, and no reason to fail."""

    FAULT = "fault"
    NOTE = "note"


class FindingCode(StrEnum):
    """What a finding is about, for programs."""

    OFFSET = "offset"
    """CPUs' readings of one clock are apart."""
    WARP = "warp"
    """A CPU read less than another, or itself, had read before; told with the offset where that is proven, too."""
    DRIFT = "drift"
    """The offset of two CPUs moved during the run."""
    UNSTEADY = "unsteady"
    """One exchange contradicts itself: the offset of two CPUs moved, or both clocks went back."""
    STEP_BACK = "step-back"
    """A clock fell behind the TSC, or a CPU's TSC went back."""
    STEP_FORWARD = "step-forward"
    RATE_CHANGED = "rate-changed"
    BROKEN_PROMISE = "broken-promise"
    """STABLE or invariant TSC is offered, and not kept."""
    FREQUENCY = "frequency"
    """A frequency that the guest is told is not the TSC's."""
    STOPPED_FLAG = "stopped-flag"
    """GUEST_STOPPED was set at all looks."""
    COMPLAINT = "complaint"
    """A line of the kernel's."""
    CLOCKSOURCE = "clocksource"
    """The kernel took a slow clock."""
    NO_PAGE = "no-page"
    """A CPU has no kvmclock: its page was never written."""
    ADDED_FAULT = "added-fault"
    """--add put it in."""


class Finding(NamedTuple):
    """One thing that is wrong or worth knowing.

    clock: its name, or "".  headline: the fault in a few words, which stand by themselves.  what: with its proof, and
    what else there is to say of it.  software_sees, change: what follows inside, and what to
    change on the host or in the guest, a remedy each; may be empty.  cpus: those named by it, by their numbers.
    budget: the budget that decides instead of the weight, if it is given: "max_warp", "max_step", "max_drift" or "".
    low_ns, high_ns: the size's bounds, where it has one in time.  promise: the one that is broken: "stable",
    "invariant-tsc" or "".
    """

    code: FindingCode
    weight: Weight
    clock: str
    headline: str
    what: str
    software_sees: str
    change: tuple[str, ...] = ()
    cpus: tuple[int, ...] = ()
    budget: str = ""
    low_ns: Fraction | None = None
    high_ns: Fraction | None = None
    promise: str = ""


class OpenReason(StrEnum):
    """What leaves a verdict open, for who chooses the next step."""

    ONE_CPU = "one-cpu"
    """Only one was measured, and nothing is to be compared."""
    NOT_COMPARED = "not-compared"
    """CPUs of which no exchange ended."""
    FLOOR_BETWEEN_CPUS = "floor-between-cpus"
    """CPUs may be apart by more than the budget."""
    FLOOR_OF_STEPS = "floor-of-steps"
    """A step beyond the budget may be hidden: a longer run does not help."""
    SHORT_RUN = "short-run"
    """A longer run can tell."""


class OpenQuestion(NamedTuple):
    """What is not decided, in words; seconds: a run of which length can tell, where that is known."""

    reason: OpenReason
    what: str
    seconds: int | None = None


class Floor(NamedTuple):
    """How well CPUs were told apart by one clock.

    ns: CPUs that are apart by less than that may go unseen; None: two were never compared.  apart_at_most_ns: no two
    CPUs are further apart.  Both are the largest edge of any window, unless an offset is proven: then `ns` is half the
    width of the widest window.
    """

    clock: str
    ns: Fraction | None
    apart_at_most_ns: Fraction | None
    what: str


class StepFloor(NamedTuple):
    """How small a step of a clock was looked for: `ns`; None: none was, or the run was too short to learn its rate."""

    clock: str
    ns: Fraction | None
    what: str


class Budgets(NamedTuple):
    """What is allowed; None: not asked.

    max_warp_ns: between CPUs, of every clock that was compared.  max_step_ns: of a clock against the TSC, either way.
    max_drift_ppb: of a CPU's clock against another's, and of a clock's rate during the run.
    """

    max_warp_ns: Fraction | None = None
    max_step_ns: Fraction | None = None
    max_drift_ppb: Fraction | None = None


class Verdict(NamedTuple):
    """findings: faults first.  broken, open: what broke a budget, or leaves it open.  story: which clocks, and why.

    is_added: a fault was put in (--add).  cpus: those that were measured, by their numbers.  cpus_present: how many the
    system has; None where the record does not say.
    """

    status: VerdictStatus
    findings: tuple[Finding, ...]
    broken: tuple[str, ...]
    open: tuple[OpenQuestion, ...]
    floors: tuple[Floor, ...]
    story: tuple[str, ...]
    promises: Promises
    is_added: bool
    cpus: tuple[int, ...]
    cpus_present: int | None
    step_floors: tuple[StepFloor, ...]

    @property
    def exit_status(self) -> int:
        """0 passed, 1 broken, 2 undecided."""
        return self.status.exit_status


def verdict_document(verdict: Verdict) -> dict[str, object]:
    """The verdict for JSON: plain values only, lengths of time as floats in ns."""
    return {
        "status": str(verdict.status),
        "findings": plain_values(verdict.findings),
        "broken": list(verdict.broken),
        "open": plain_values(verdict.open),
        "floors": plain_values(verdict.floors),
        "story": list(verdict.story),
        "promises": plain_values(verdict.promises),
        "is_added": verdict.is_added,
        "cpus": list(verdict.cpus),
        "cpus_present": verdict.cpus_present,
        "step_floors": plain_values(verdict.step_floors),
    }


def plain_values(value: object) -> object:
    """Named tuples as objects, other tuples as lists, exact numbers as floats."""
    if isinstance(value, Fraction):
        return float(value)
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: plain_values(each) for name, each in value._asdict().items()}
    if isinstance(value, tuple):
        return [plain_values(each) for each in value]
    return value
