"""The JSON of `pvclock drift`, schema pvclock.drift/1: docs/commands.md says what each key is."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from pvclock.commands.outcome import Outcome, line_json, outcome_json
from pvclock.meter.drift import DriftingClock
from qemu_glue.watch.instants import utc_text

__all__ = ["DriftRecords"]


class DriftRecords:
    """The lines of one run, from its beginning on; each is kept, for files that are written at the end."""

    def __init__(self, clocks: Sequence[DriftingClock], reference: str, interval_s: float, settle_s: float) -> None:
        self._clocks, self._reference, self._settle_s = clocks, reference, settle_s
        begin = {
            "kind": "begin",
            **_when(0.0),
            "reference": reference,
            "interval_s": interval_s,
            "settle_s": settle_s,
            "clocks": [{"clock": clock.word, "name": clock.series.name} for clock in clocks],
        }
        self.lines = [line_json("drift", begin)]

    def take(self, at_s: float) -> str:
        """Each clock's newest reading, as a line."""
        readings = [{"clock": clock.word, **_reading(clock)} for clock in self._clocks]
        line = line_json("drift", {"kind": "reading", **_when(at_s), "readings": readings})
        self.lines.append(line)
        return line

    def result(self, seconds: float) -> Mapping[str, object]:
        """What it came to; seconds: after the clocks had settled."""
        return {
            "reference": self._reference,
            "seconds": seconds,
            "settle_s": self._settle_s,
            "clocks": [_outcome(clock) for clock in self._clocks],
        }

    def with_outcome(self, outcome: Outcome) -> list[str]:
        """All lines, and the outcome last, as `--json` prints them."""
        return [*self.lines, outcome_json("drift", outcome, on_one_line=True)]


def _when(at_s: float) -> Mapping[str, object]:
    return {"at_s": at_s, "utc": utc_text(time.time_ns())}


def _reading(clock: DriftingClock) -> Mapping[str, object]:
    point = clock.series.points[-1]._asdict()
    del point["s"]
    return point


def _outcome(clock: DriftingClock) -> Mapping[str, object]:
    series, rate = clock.series, clock.series.rate
    return {
        "clock": clock.word,
        "name": series.name,
        "rate_ppb": None if rate is None else rate.ppb,
        "bound_ppb": None if rate is None else rate.bound_ppb,
        "least_step_ns": min(series.steps_ns),
        "most_step_ns": max(series.steps_ns),
        "reanchors_ns": series.reanchors,
    }
