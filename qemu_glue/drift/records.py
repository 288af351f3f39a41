"""The JSON of `pvclock drift`, schema pvclock.drift/1: docs/commands.md says what each key is."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from pvclock.commands.outcome import Outcome, error_json, line_json, outcome_json
from pvclock.meter.drift.clocks import DriftingClock
from qemu_glue.drift.plan import DriftPlan
from qemu_glue.watch.instants import utc_text

__all__ = ["DriftRecords"]


class DriftRecords:
    """The lines of one run, from its beginning on; each is kept, for files that are written at the end."""

    def __init__(self, clocks: Sequence[DriftingClock], plan: DriftPlan) -> None:
        self.clocks, self.plan = clocks, plan
        begin = {
            "kind": "begin",
            **_when(0.0),
            "reference": plan.reference,
            "interval_s": plan.interval_s,
            "settle_s": plan.settle_s,
            "clocks": [{"clock": clock.word, "name": clock.readings.name} for clock in clocks],
        }
        self.lines = [line_json("drift", begin)]

    def take(self, at_s: float) -> str:
        """Each clock's newest reading, as a line."""
        readings = [{"clock": clock.word, **_reading(clock)} for clock in self.clocks]
        line = line_json("drift", {"kind": "reading", **_when(at_s), "readings": readings})
        self.lines.append(line)
        return line

    def result(self, seconds: float) -> Mapping[str, object]:
        """What it came to; seconds: after the clocks had settled."""
        return {
            "reference": self.plan.reference,
            "seconds": seconds,
            "settle_s": self.plan.settle_s,
            "clocks": [_outcome(clock) for clock in self.clocks],
        }

    def with_outcome(self, outcome: Outcome) -> list[str]:
        """All lines, and the outcome last, as `--json` prints them."""
        return [*self.lines, outcome_json("drift", outcome, on_one_line=True)]

    def with_error(self, error: Exception) -> list[str]:
        """The same with the error that ended it."""
        return [*self.lines, error_json("drift", error, on_one_line=True)]


def _when(at_s: float) -> Mapping[str, object]:
    return {"at_s": at_s, "utc": utc_text(time.time_ns())}


def _reading(clock: DriftingClock) -> Mapping[str, object]:
    point = clock.readings.points[-1]._asdict()
    del point["s"]
    return point


def _outcome(clock: DriftingClock) -> Mapping[str, object]:
    readings = clock.readings
    rate, steps = readings.rate, readings.steps_ns
    return {
        "clock": clock.word,
        "name": readings.name,
        "rate_ppb": None if rate is None else rate.ppb,
        "bound_ppb": None if rate is None else rate.bound_ppb,
        "why": readings.why_no_rate,
        "steps": len(readings.sure_steps),
        "stepped_ns": sum(point.step_ns for point in readings.sure_steps),
        "least_step_ns": min(steps, default=None),
        "most_step_ns": max(steps, default=None),
        "stopped_readings": readings.stopped_readings,
        "reanchors_ns": readings.reanchors,
    }
