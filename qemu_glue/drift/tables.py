"""The tables of `pvclock drift`: a row a clock while it goes on, and what each came to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from pvclock.commands.tables import Table
from pvclock.meter.drift import DriftingClock
from pvclock.meter.series import Series
from pvclock.meter.watch.words import about_ns, counted, exact_ns, rate_in_words

__all__ = ["live_table", "summary_table"]

S_PER_DAY: Final = 86_400


def live_table(clocks: Sequence[DriftingClock], reference: str) -> Table:
    """A row a clock: how far ahead it is, how fast, and how it stepped."""
    table = Table("clock", "ahead", f"rate against {reference}", "steps", "last step")
    for clock in clocks:
        series = clock.series
        point = series.points[-1]
        table.add_row(
            series.name,
            about_ns(round(point.ahead_ns)),
            _rate(series),
            _steps(series),
            exact_ns(point.step_ns),
        )
    return table


def summary_table(clocks: Sequence[DriftingClock], reference: str) -> Table:
    """What each clock came to, a column each."""
    series = [clock.series for clock in clocks]
    table = Table(f"against {reference}", *(each.name for each in series))
    table.add_row("rate", *map(_rate, series))
    table.add_row("in a day", *map(_in_a_day, series))
    table.add_row("steps", *map(_steps, series))
    table.add_row("each reading's step", *map(_extremes, series))
    if any(each.stopped_readings for each in series):
        table.add_row("stopped", *map(_stopped, series))
    for place, each in enumerate(series):
        for name, step_ns in each.reanchors.items():
            table.add_row(name, *("" if other != place else exact_ns(step_ns) for other in range(len(series))))
    return table


def _rate(series: Series) -> str:
    return series.why_no_rate or "-" if series.rate is None else rate_in_words(*series.rate)


def _in_a_day(series: Series) -> str:
    return "-" if series.rate is None else about_ns(round(series.rate.ppb * S_PER_DAY))


def _steps(series: Series) -> str:
    """The steps that are sure."""
    steps = series.sure_steps_ns
    return f"{len(steps):,}, in all {about_ns(sum(steps))}" if steps else "none"


def _extremes(series: Series) -> str:
    if not series.settled:
        return "-"
    bound_ns = max(point.step_bound_ns for point in series.settled)
    return f"{exact_ns(min(series.steps_ns))} to {exact_ns(max(series.steps_ns))}, true to {bound_ns:.3g} ns"


def _stopped(series: Series) -> str:
    stopped, of = series.stopped_readings, len(series.settled)
    if stopped is None:
        return "unknown"
    return "all the while" if stopped == of else f"at {stopped:,} of {counted(of, 'reading')}"
