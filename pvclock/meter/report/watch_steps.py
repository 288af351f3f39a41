"""The steps and disagreements that a watch told, in words, and the greatest of them in a table."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple

from pvclock.meter.report.fields import Fields
from pvclock.meter.report.model import Standing, Table
from pvclock.meter.watch.sentences import cause, told_disagreement_in_words, told_step_in_words
from pvclock.meter.watch.words import bounded_ns, counted, exact_ns, runs_in_words, vcpus_in_words

__all__ = ["Step", "StepTable", "disagreement_in_words", "step_of"]

STEPS_SHOWN: Final = 50
UNKNOWN_SHOWN: Final = 20
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
PAUSE_EVENTS: Final = frozenset({"stop", "resume"})
KNOWN_BY: Final = {"offsets": "by TSC offsets", "assumed": "if the TSC was unchanged", "changed": "the TSC changed"}


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
        """The step as a sentence without its end, as the watch itself tells it."""
        said = told_step_in_words(
            lines=self.lines,
            basis=self.basis,
            step_ns=self.step_ns,
            bound_ns=self.bound_ns,
            seen_ns=self.seen_ns,
            seen_bound_ns=self.seen_bound_ns,
            cause=self.cause,
        )
        return f"{vcpus_in_words(self.vcpus)} {said}"

    def size_in_words(self) -> str:
        """How long it was, against the TSC and for the guest, and when."""
        seen = f", {self.seen_in_words()} from STOP to RESUME" if self.seen_ns is not None else ""
        return f"{exact_ns(self.step_ns or 0, self.bound_ns)} at {self.at_s:,.3f} s{seen}"

    def seen_in_words(self) -> str:
        """What the guest saw of a pause; "-" if that is unknown."""
        return "-" if self.seen_ns is None else bounded_ns(self.seen_ns, self.seen_bound_ns)


class StepTable:
    """Steps of a watch: the first ones of unknown size, the greatest of the others, and how many there were."""

    def __init__(self) -> None:
        self.count, self.unknown, self.anew = 0, 0, 0
        self._unknown: list[Step] = []
        self._greatest: list[tuple[int, int, Step]] = []

    def add(self, step: Step) -> None:
        """Take a step, of however many vCPUs."""
        self.count += len(step.vcpus)
        if not step.is_sure:
            self.anew += len(step.vcpus)
        elif step.step_ns is None:
            self.unknown += len(step.vcpus)
            self._unknown += [step] * (len(self._unknown) < UNKNOWN_SHOWN)
        else:
            heapq.heappush(self._greatest, (step.size_ns, -self.count, step))
            if len(self._greatest) > STEPS_SHOWN:
                heapq.heappop(self._greatest)

    @property
    def greatest(self) -> Step | None:
        """The greatest step that is known."""
        return max(self._greatest)[2] if self._greatest else None

    def table(self) -> Table | None:
        """The steps of unknown size, then the greatest; None if there was none."""
        known = [step for *_, step in sorted(self._greatest, reverse=True)]
        steps = self._unknown + known
        if not steps:
            return None
        title = "Steps, unknown ones and then the greatest" if self._unknown else "Steps, the greatest first"
        more_unknown = self.unknown - _vcpus_of(self._unknown)
        smaller = self.count - self.anew - self.unknown - _vcpus_of(known)
        left_out = [f"{more_unknown:,} more of unknown size"] * (more_unknown > 0)
        left_out += [f"{smaller:,} smaller ones"] * (smaller > 0)
        title += f"; {' and '.join(left_out)} are not shown" if left_out else ""
        headings = ("at", "vCPUs", "against the TSC", "seen by the guest", "the VMM told", "known")
        return Table(title, headings, tuple(map(_row, steps)), tuple(step.standing for step in steps))


def step_of(record: Fields) -> Step:
    """The step in a line, of one vCPU."""
    events = _events(record)
    return Step(
        record.number("at_s"),
        (record.whole("vcpu"),),
        record.whole_or_none("step_ns"),
        record.whole_or_none("bound_ns") or 0,
        record.whole_or_none("seen_ns"),
        record.whole_or_none("seen_bound_ns") or 0,
        record.text("basis"),
        record.whole("lines"),
        cause(events),
        any(what in PAUSE_EVENTS for what, _ in events),
    )


def disagreement_in_words(record: Fields) -> str:
    """The disagreement in a line, as the watch itself tells it."""
    return told_disagreement_in_words(
        ahead=record.whole("ahead"),
        behind=record.whole("behind"),
        by_ns=record.whole("by_ns"),
        bound_ns=record.whole("bound_ns"),
        least_ns=record.whole("least_ns"),
        is_stale=record.truth("is_stale"),
        cause=cause(_events(record)),
    )


def _row(step: Step) -> tuple[str, ...]:
    against = "unknown" if step.step_ns is None else exact_ns(step.step_ns, step.bound_ns)
    split = f"; sum of {counted(step.lines, 'line')}" if step.lines > 1 else ""
    known = f"{KNOWN_BY.get(step.basis, step.basis)}{split}"
    return f"{step.at_s:,.3f} s", runs_in_words(step.vcpus), against, step.seen_in_words(), step.cause or "-", known


def _events(record: Fields) -> list[tuple[str, int | None]]:
    """Each event's kind and, where it can be read, its UTC in ns."""
    return [(event.text("what"), _utc_ns(event.text_or_none("utc"))) for event in record.all_fields("events")]


def _vcpus_of(steps: Sequence[Step]) -> int:
    return sum(len(step.vcpus) for step in steps)


def _utc_ns(utc: str | None) -> int | None:
    try:
        instant = None if utc is None else datetime.fromisoformat(utc)
    except ValueError:
        return None
    if instant is None:
        return None
    return (instant.replace(tzinfo=instant.tzinfo or UTC) - EPOCH) // timedelta(microseconds=1) * 1000
