"""The steps and disagreements that a watch told, in words, and the greatest of them in a table."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from datetime import datetime
from typing import Final, NamedTuple

from pvclock.meter.report.clock_series import runs_in_words
from pvclock.meter.report.fields import Fields
from pvclock.meter.report.model import Standing, Table
from pvclock.meter.watch.words import bounded_ns, counted, duration, exact_ns

__all__ = ["Step", "StepTable", "cause_in_words", "disagreement_in_words", "step_of"]

STEPS_SHOWN: Final = 50
PAUSE_EVENTS: Final = frozenset({"stop", "resume"})
BASES: Final = {
    "offsets": "TSC offsets read",
    "assumed": "if the guest's TSC was not changed",
    "changed": "the guest's TSC was changed, or may have been",
}
IN_SHORT: Final = {"offsets": "by TSC offsets", "assumed": "if the TSC was unchanged", "changed": "the TSC changed"}


class Step(NamedTuple):
    """A step of some vCPUs' clocks at at_s.  step_ns, seen_ns: None if unknown; cause: what the VMM told, or ""."""

    at_s: float
    vcpus: tuple[int, ...]
    step_ns: int | None
    bound_ns: int
    seen_ns: int | None
    seen_bound_ns: int
    basis: str
    lines: int
    cause: str
    is_at_pause: bool

    @property
    def is_sure(self) -> bool:
        """Was it more than its bound, or unknown?"""
        return self.step_ns is None or abs(self.step_ns) > self.bound_ns

    @property
    def size_ns(self) -> int:
        """Its length, either way; 0 if unknown."""
        return abs(self.step_ns or 0)

    @property
    def standing(self) -> Standing:
        """At a pause a clock has to step against the TSC."""
        if self.step_ns is None:
            return Standing.OPEN
        return Standing.PLAIN if self.is_at_pause else Standing.BAD

    def is_alike(self, other: Step) -> bool:
        """Is it the same step of another vCPU?"""
        return self._replace(vcpus=(), at_s=0.0) == other._replace(vcpus=(), at_s=0.0)

    def in_words(self) -> str:
        """The step as a sentence without its end."""
        return f"{_vcpus(self.vcpus)} {self._what()}{f'; {self.cause}' if self.cause else ''}"

    def _what(self) -> str:
        if self.step_ns is None:
            return "stepped by an unknown time, for the guest's TSC was changed, or may have been"
        assumed = f" ({BASES['assumed']})" if self.basis == "assumed" else ""
        return f"stepped by {exact_ns(self.step_ns, self.bound_ns)} against the TSC{assumed}{self._seen()}"

    def size_in_words(self) -> str:
        """How long it was, against the TSC and for the guest, and when."""
        return f"{exact_ns(self.step_ns or 0, self.bound_ns)} at {self.at_s:,.3f} s{self._seen()}"

    def _seen(self) -> str:
        return f", {self.seen_in_words()} from STOP to RESUME" if self.seen_ns is not None else ""

    def seen_in_words(self) -> str:
        """What the guest saw of a pause; "-" if that is unknown."""
        return "-" if self.seen_ns is None else bounded_ns(self.seen_ns, self.seen_bound_ns)


class StepTable:
    """The greatest steps of a watch, and how many there were."""

    def __init__(self) -> None:
        self.count, self.unknown, self.anew = 0, 0, 0
        self._kept: list[tuple[int, int, Step]] = []

    def add(self, step: Step) -> None:
        """Take a step, of however many vCPUs."""
        self.count += len(step.vcpus)
        self.unknown += len(step.vcpus) * (step.step_ns is None)
        if not step.is_sure:
            self.anew += len(step.vcpus)
            return
        heapq.heappush(self._kept, (step.size_ns, -self.count, step))
        if len(self._kept) > STEPS_SHOWN:
            heapq.heappop(self._kept)

    @property
    def greatest(self) -> Step | None:
        """The greatest step that is known."""
        return max((step for *_, step in self._kept if step.step_ns), key=lambda step: step.size_ns, default=None)

    def table(self) -> Table | None:
        """The steps, greatest first; None if there was none."""
        steps = [step for *_, step in sorted(self._kept, reverse=True)]
        if not steps:
            return None
        shown = sum(len(step.vcpus) for step in steps)
        more = self.count - self.anew - shown
        title = (
            f"Steps, the greatest first; {more:,} smaller ones are not shown" if more else "Steps, the greatest first"
        )
        headings = ("at", "vCPUs", "against the TSC", "seen by the guest", "the VMM told", "known")
        return Table(title, headings, tuple(map(_row, steps)), tuple(step.standing for step in steps))


def step_of(record: Fields) -> Step:
    """The step in a line, of one vCPU."""
    causes = [(event.text("what"), event.text_or_none("utc")) for event in record.all_fields("events")]
    return Step(
        record.number("at_s"),
        (record.whole("vcpu"),),
        record.whole_or_none("step_ns"),
        record.whole_or_none("bound_ns") or 0,
        record.whole_or_none("seen_ns"),
        record.whole_or_none("seen_bound_ns") or 0,
        record.text("basis"),
        record.whole("lines"),
        cause_in_words(causes),
        any(what in PAUSE_EVENTS for what, _ in causes),
    )


def cause_in_words(causes: Sequence[tuple[str, str | None]]) -> str:
    """What the VMM did, such as "STOP, RESUME 1.035 s later"; empty if it told nothing."""
    told: list[str] = []
    before: datetime | None = None
    for what, utc in causes:
        now = _instant(utc)
        later = f" {duration(round((now - before).total_seconds() * 1e9))} later" if now and before else ""
        told.append(f"{what.upper()}{later}")
        before = now
    return ", ".join(told)


def disagreement_in_words(record: Fields) -> str:
    """Which page was ahead, by how much and for how long."""
    by = exact_ns(record.whole("by_ns"), record.whole("bound_ns")).removeprefix("+")
    least_ns = record.whole("least_ns")
    how_long = f"for at least {duration(least_ns)}" if least_ns else "at one look"
    stale = "; it is stale, and nobody reads it" if record.truth("is_stale") else ""
    ahead, behind = record.whole("ahead"), record.whole("behind")
    return f"vCPU {ahead}'s page gave up to {by} more than vCPU {behind}'s, {how_long}{stale}"


def _row(step: Step) -> tuple[str, ...]:
    against = "unknown" if step.step_ns is None else exact_ns(step.step_ns, step.bound_ns)
    split = f"; sum of {counted(step.lines, 'line')}" if step.lines > 1 else ""
    known = f"{IN_SHORT.get(step.basis, step.basis)}{split}"
    return f"{step.at_s:,.3f} s", runs_in_words(step.vcpus), against, step.seen_in_words(), step.cause or "-", known


def _vcpus(vcpus: Sequence[int]) -> str:
    return f"vCPU{'s' * (len(vcpus) > 1)} {runs_in_words(vcpus)}"


def _instant(utc: str | None) -> datetime | None:
    try:
        return None if utc is None else datetime.fromisoformat(utc)
    except ValueError:
        return None
