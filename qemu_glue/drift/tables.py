"""The tables of `pvclock drift`: a row a clock while it goes on, and what each came to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from pvclock.commands.tables import Table
from pvclock.meter.drift import DriftingClock
from pvclock.meter.series import Series
from pvclock.meter.watch.words import about_ns, exact_ns, rate_in_words

__all__ = ["live_table", "summary_table"]

S_PER_DAY: Final = 86_400
NOT_SETTLED: Final = "not settled"


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
    table = Table(f"against {reference}", *(clock.series.name for clock in clocks))
    table.add_row("rate", *(_rate(clock.series) for clock in clocks))
    table.add_row("in a day", *(_in_a_day(clock.series) for clock in clocks))
    table.add_row("steps meanwhile", *(_steps(clock.series) for clock in clocks))
    for place, clock in enumerate(clocks):
        for name, step_ns in clock.series.reanchors.items():
            table.add_row(name, *("" if other != place else exact_ns(step_ns) for other in range(len(clocks))))
    return table


def _rate(series: Series) -> str:
    return NOT_SETTLED if series.rate is None else rate_in_words(*series.rate)


def _in_a_day(series: Series) -> str:
    return NOT_SETTLED if series.rate is None else about_ns(round(series.rate.ppb * S_PER_DAY))


def _steps(series: Series) -> str:
    if not series.points:
        return "-"
    bound_ns = max(point.step_bound_ns for point in series.points)
    return f"{exact_ns(min(series.steps_ns))} to {exact_ns(max(series.steps_ns))}, true to {bound_ns:.3g} ns"
