"""The tables of `pvclock drift`: a row a clock while it goes on, and what each came to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from pvclock.commands.tables import Table
from pvclock.meter.drift.clocks import DriftingClock
from pvclock.meter.drift.readings import ClockReadings
from pvclock.meter.watch.words import about_ns, counted, exact_ns, rate_in_words

__all__ = ["live_table", "summary_table"]

S_PER_DAY: Final = 86_400


def live_table(clocks: Sequence[DriftingClock], reference: str) -> Table:
    """A row a clock: how far ahead it is, how fast, and how it stepped."""
    table = Table("clock", "ahead", f"rate against {reference}", "steps", "last step")
    for clock in clocks:
        readings = clock.readings
        point = readings.points[-1]
        table.add_row(
            readings.name,
            about_ns(round(point.ahead_ns)),
            _rate(readings),
            _steps(readings),
            exact_ns(point.step_ns),
        )
    return table


def summary_table(clocks: Sequence[DriftingClock], reference: str) -> Table:
    """What each clock came to, a column each."""
    readings = [clock.readings for clock in clocks]
    table = Table(f"against {reference}", *(each.name for each in readings))
    table.add_row("rate", *map(_rate, readings))
    table.add_row("in a day", *map(_in_a_day, readings))
    table.add_row("steps", *map(_steps, readings))
    table.add_row("each reading's step", *map(_extremes, readings))
    if any(each.stopped_readings for each in readings):
        table.add_row("stopped", *map(_stopped, readings))
    for place, each in enumerate(readings):
        for name, step_ns in each.reanchors.items():
            table.add_row(name, *("" if other != place else exact_ns(step_ns) for other in range(len(readings))))
    return table


def _rate(readings: ClockReadings) -> str:
    return readings.why_no_rate or "-" if readings.rate is None else rate_in_words(*readings.rate)


def _in_a_day(readings: ClockReadings) -> str:
    return "-" if readings.rate is None else about_ns(round(readings.rate.ppb * S_PER_DAY))


def _steps(readings: ClockReadings) -> str:
    """The steps that are sure."""
    steps = [point.step_ns for point in readings.sure_steps]
    return f"{len(steps):,}, in all {about_ns(sum(steps))}" if steps else "none"


def _extremes(readings: ClockReadings) -> str:
    if not readings.settled:
        return "-"
    bound_ns = max(point.step_bound_ns for point in readings.settled)
    return f"{exact_ns(min(readings.steps_ns))} to {exact_ns(max(readings.steps_ns))}, true to {bound_ns:.3g} ns"


def _stopped(readings: ClockReadings) -> str:
    stopped, of = readings.stopped_readings, len(readings.settled)
    if stopped is None:
        return "unknown"
    return "all the while" if stopped == of else f"at {stopped:,} of {counted(of, 'reading')}"
