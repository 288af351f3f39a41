"""The readings of clocks beside a reference, as lines, with their steps taken out, and as Allan deviation."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from statistics import median
from typing import Final, NamedTuple

from pvclock.meter.allan import Deviation, allan_deviations, even_segments
from pvclock.meter.report.model import Axis, Line, Mark, Plot, Unit
from pvclock.meter.watch.words import vcpus_in_words

__all__ = ["LINES_MAX", "ClockSeries", "distinct", "readings_plots", "stability_plot"]

LINES_MAX: Final = 16
"""Clocks of one plot: of more, those that went furthest are drawn."""
INTERVALS_LOOKED_AT: Final = 1000
ONE_LOOK_S: Final = 0.001
"""A step and the reading of the look that saw it are told with times that differ by less."""
HIDDEN_BELOW: Final = 20
"""Where steps are that many times as large as all else, the plot of all hides it, and one without steps is made."""


class _Step(NamedTuple):
    """A step, and the reading that shows it first.  at_s, ns: None if unknown."""

    place: int
    at_s: float | None
    ns: float | None


class ClockSeries:
    """One clock's readings.  ahead_ns: of its reference; nan where it is unknown.  Readings come with at_s rising.

    Steps, and what else is no noise, may be told later than readings that show them: they are placed by their time.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.at_s = array("d")
        self.ahead_ns = array("d")
        self.bound_ns = array("d")
        self.cuts: set[int] = set()
        """Readings before which something happened that is no noise."""
        self._steps: list[_Step] = []

    def take(self, at_s: float, ahead_ns: float, bound_ns: float) -> None:
        """Take a reading; ahead_ns is nan if it is unknown."""
        self.at_s.append(max(at_s, self.at_s[-1]) if self.at_s else at_s)
        self.ahead_ns.append(ahead_ns)
        self.bound_ns.append(bound_ns)

    def step(self, step_ns: float | None, at_s: float | None = None) -> None:
        """The clock stepped by that; None: by how much is unknown.  at_s: None: since the last reading."""
        self._steps.append(_Step(self.cut(at_s), at_s, step_ns))
        if step_ns is None:
            self._steps.append(_Step(self.cut(), None, None))  # readings may begin anew once it is told

    def begin_anew(self) -> None:
        """What follows counts from 0 again: the line is broken."""
        self.step(None)
        if self.at_s:
            self.take(self.at_s[-1], math.nan, math.nan)
            self.cut()

    def cut(self, at_s: float | None = None) -> int:
        """Something happened that is no noise; the first reading that shows it.  at_s: None: since the last reading."""
        place = len(self.at_s) if at_s is None else bisect_left(self.at_s, at_s - ONE_LOOK_S)
        self.cuts.add(place)
        return place

    def stepless_ns(self) -> array[float]:
        """The readings without their steps: nan where ahead_ns is."""
        stepless = array("d")
        stepped_ns, last_ns, is_level_lost = 0.0, 0.0, False
        steps = deque(sorted(self._steps, key=lambda step: step.place))
        for place, ahead_ns in enumerate(self.ahead_ns):
            while steps and steps[0].place <= place:
                ns = steps.popleft().ns
                is_level_lost = is_level_lost or ns is None
                stepped_ns += ns or 0.0
            if is_level_lost and not math.isnan(ahead_ns):
                stepped_ns, is_level_lost = ahead_ns - last_ns, False
            stepless.append(ahead_ns - stepped_ns)
            last_ns = last_ns if math.isnan(ahead_ns) else stepless[-1]
        return stepless

    def line(self) -> Line:
        """The readings, with their bounds as the band, and each step upright at its time."""
        drawn = array("d"), array("d"), array("d")
        begin = 0
        in_order = sorted(self._steps, key=lambda step: (step.place, step.at_s or 0.0))
        for place, steps in groupby(in_order, key=lambda step: step.place):
            self._draw_readings(drawn, begin, place)
            for point in self._around(place, list(steps)):
                for column, value in zip(drawn, point, strict=True):
                    column.append(value)
            begin = place
        self._draw_readings(drawn, begin, len(self.at_s))
        return _banded(self.name, *drawn)

    def stepless_line(self) -> Line:
        """The same without its steps."""
        return _banded(self.name, self.at_s, self.stepless_ns(), self.bound_ns)

    @property
    def interval_s(self) -> float | None:
        """The time between two readings, as it is most of the time; None without two."""
        places = self.at_s[:INTERVALS_LOOKED_AT]
        passed = [later - earlier for earlier, later in pairwise(places) if later > earlier]
        return median(passed) if passed else None

    @property
    def usual_bound_ns(self) -> float | None:
        """The median of the readings' bounds; None if there are none."""
        known = [bound for bound in self.bound_ns if not math.isnan(bound)]
        return median(known) if known else None

    def deviations(self, interval_s: float) -> list[Deviation]:
        """The Allan deviation; none of too few readings."""
        return allan_deviations(even_segments(self.at_s, self.ahead_ns, interval_s, self.cuts), interval_s)

    # Inside

    def _draw_readings(self, drawn: tuple[array[float], ...], begin: int, end: int) -> None:
        for column, values in zip(drawn, (self.at_s, self.ahead_ns, self.bound_ns), strict=True):
            column.extend(values[begin:end])

    def _around(self, place: int, steps: Sequence[_Step]) -> Iterator[tuple[float, float, float]]:
        """The clock just before and just after each step that `place` is the first reading to show."""
        if not 0 < place < len(self.at_s) or any(step.at_s is None or step.ns is None for step in steps):
            return
        begin_s, end_s = self.at_s[place - 1], self.at_s[place]
        begin_ns, end_ns = self.ahead_ns[place - 1], self.ahead_ns[place]
        bound_ns = max(self.bound_ns[place - 1], self.bound_ns[place])
        drift_ns = end_ns - begin_ns - math.fsum(step.ns or 0.0 for step in steps)
        stepped_ns = 0.0
        for step in steps:
            at_s = min(max(step.at_s or 0.0, begin_s), end_s)
            part = (at_s - begin_s) / (end_s - begin_s) if end_s > begin_s else 0.0
            yield at_s, begin_ns + stepped_ns + part * drift_ns, bound_ns
            stepped_ns += step.ns or 0.0
            yield at_s, begin_ns + stepped_ns + part * drift_ns, bound_ns


def _banded(name: str, at_s: array[float], ns: array[float], bound_ns: array[float]) -> Line:
    low = array("d", (each - bound for each, bound in zip(ns, bound_ns, strict=True)))
    high = array("d", (each + bound for each, bound in zip(ns, bound_ns, strict=True)))
    return Line(name, at_s, ns, low, high)


def distinct(series: Iterable[ClockSeries], names: Sequence[int]) -> list[ClockSeries]:
    """The series of vCPUs, those with the same readings as one, which has all their numbers in its name."""
    alike: dict[tuple[bytes, bytes], tuple[ClockSeries, list[int]]] = {}
    for vcpu, each in zip(names, series, strict=True):
        key = each.at_s.tobytes(), each.ahead_ns.tobytes()
        alike.setdefault(key, (each, []))[1].append(vcpu)
    for each, vcpus in alike.values():
        each.name = vcpus_in_words(vcpus)
    return [each for each, _ in alike.values()]


def readings_plots(series: Sequence[ClockSeries], against: str, marks: tuple[Mark, ...], note: str = "") -> list[Plot]:
    """The clocks against their reference; if steps hide all else, once more without them.  None without readings."""
    known = [each for each in series if any(not math.isnan(ns) for ns in each.ahead_ns)]
    if not known:
        return []
    shown = sorted(known, key=lambda each: -_extent_ns(each.ahead_ns))[:LINES_MAX]
    shown = [each for each in known if each in shown]
    left_out = (
        f"{len(known) - len(shown)} more clocks, which went less far, are not drawn." if len(known) > len(shown) else ""
    )
    said = " ".join(filter(None, ["The band is what the readings' bounds leave open.", note, left_out]))
    x, y = Axis("Time", Unit.S), Axis(f"Ahead of {against}", Unit.NS)
    plots = [Plot(f"Clock against {against}", x, y, tuple(each.line() for each in shown), marks, said)]
    if max(_extent_ns(each.ahead_ns) for each in shown) > HIDDEN_BELOW * max(
        _extent_ns(each.stepless_ns()) for each in shown
    ):
        lines = tuple(each.stepless_line() for each in shown)
        how = "Each step is taken out as it was measured, and one of unknown size as if there had been no time between."
        without = " ".join(filter(None, [how, note]))
        plots.append(Plot(f"Clock against {against}, without its steps", x, y, lines, marks, without))
    return plots


def stability_plot(series: Sequence[ClockSeries], interval_s: float | None = None) -> Plot | None:
    """The Allan deviation of clocks, above what their readings' bounds allow; None of too few readings."""
    lines = []
    floors: dict[float, float] = {}
    for each in series[:LINES_MAX]:
        every_s = interval_s or each.interval_s
        found = each.deviations(every_s) if every_s else []
        drawn = [deviation for deviation in found if deviation.ppb > 0]  # 0 has no logarithm
        if drawn:
            tau_s, ppb, low, high = (array("d", column) for column in list(zip(*drawn, strict=True))[:4])
            lines.append(Line(each.name, tau_s, ppb, low, high))
        if (bound_ns := each.usual_bound_ns) is not None:
            for deviation in found:
                floors[deviation.tau_s] = max(floors.get(deviation.tau_s, 0.0), bound_ns / deviation.tau_s)
    drawn_floor = [(tau_s, floor) for tau_s, floor in sorted(floors.items()) if floor > 0]
    if drawn_floor:
        tau_s, ppb = (array("d", column) for column in zip(*drawn_floor, strict=True))
        lines.append(Line("by the readings' bounds alone", tau_s, ppb))
    if not lines:
        return None
    note = (
        "How much the rate over a time tau differs from that over the next one; a constant rate is 0.  The band is "
        "what the number of readings leaves open, 68 times in 100.  Readings before and after a step, a pause or a gap "
        "of more than one are not compared.  What lies at the line of the bounds, or below, may be of the measurement "
        "alone."
    )
    tau = Axis("Averaging time tau", Unit.S, is_log=True)
    return Plot("Allan deviation", tau, Axis("Allan deviation", Unit.PPB, is_log=True), tuple(lines), (), note)


def _extent_ns(ns: Iterable[float]) -> float:
    known = [each for each in ns if not math.isnan(each)]
    return max(known) - min(known) if known else 0.0
