"""The JSON lines of a drift: several clocks against one reference, the steps between readings, and at new anchors."""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Final

from pvclock.meter.report.clock_series import ClockSeries, readings_plots, stability_plot
from pvclock.meter.report.fields import Fields, Place, safe_text
from pvclock.meter.report.mark_collection import MarkCollection
from pvclock.meter.report.model import Axis, Interval, Intervals, Line, Mark, Part, Plot, Section, Standing, Table, Unit
from pvclock.meter.watch.words import about_ns, counted, rate_in_words
from pvclock.quantities import quoted

__all__ = ["drift_sections"]

SCHEMA: Final = "pvclock.drift/1"
CLOCKS_MAX: Final = 64
DRIFTS_MAX: Final = 1000
WAYS_MAX: Final = 100
PROCESS: Final = re.compile(r"\bprocess (\d{1,10})\b")


class _Steps:
    """The steps of one clock between readings.

    known, sure: of those that count, how many are known, and how many are more than their bound.
    """

    def __init__(self) -> None:
        self.at_s, self.ns, self.low, self.high = (array("d") for _ in range(4))
        self.known, self.sure, self.greatest_ns = 0, 0, 0.0

    def take(self, at_s: float, ns: float, bound_ns: float, *, counts: bool) -> None:
        """Take a step; nan if it is unknown."""
        self.at_s.append(max(at_s, self.at_s[-1]) if self.at_s else at_s)
        self.ns.append(ns)
        self.low.append(ns - bound_ns)
        self.high.append(ns + bound_ns)
        self.known += counts and not math.isnan(ns)
        if counts and abs(ns) > bound_ns:
            self.sure += 1
            self.greatest_ns = max(self.greatest_ns, ns, key=abs)


class _Drift:
    """A drift while it is read."""

    def __init__(self, begin: Fields) -> None:
        self.begin = begin
        self.reference = begin.text("reference")
        self.interval_s = begin.number("interval_s")
        self.settle_s = begin.number("settle_s")
        clocks = list(begin.all_fields("clocks"))
        if not 0 < len(clocks) <= CLOCKS_MAX:
            raise begin.place.error(f"{len(clocks)} clocks", f"1 to {CLOCKS_MAX}")
        if self.interval_s <= 0:
            raise begin.place.error(f"an interval of {self.interval_s:g} s", "one of more than 0")
        self.long_names = {clock.text("clock"): clock.text("name") for clock in clocks}
        self.series = {clock.text("clock"): ClockSeries(_short_name(clock)) for clock in clocks}
        self.steps = {name: _Steps() for name in self.series}
        self.marks = MarkCollection()
        self.result: Fields | None = None
        self.error: str | None = None
        self.last_s = 0.0
        self.unknown_kinds = 0

    @property
    def is_over(self) -> bool:
        """Was its last line taken?"""
        return self.result is not None or self.error is not None

    def take(self, record: Fields) -> None:
        """Take a line after the first."""
        if "error" in record:
            self.error = record.fields("error").text("message")
        elif "result" in record:
            self.result = record.fields("result")
        elif record.text("kind") == "reading":
            self._reading(record)
        else:
            self.unknown_kinds += 1

    def _reading(self, record: Fields) -> None:
        at_s = self.last_s = record.number("at_s")
        for each in record.all_fields("readings"):
            name = each.text("clock")
            if name not in self.series:
                raise record.place.error(f"a reading of clock {name:.60}", f"one of {', '.join(self.series)}")
            step_ns, bound_ns = each.number_or_nan("step_ns"), each.number_or_nan("step_bound_ns")
            if abs(step_ns) > bound_ns:
                self._step(name, at_s, step_ns)
            self.series[name].take(at_s, each.number_or_nan("ahead_ns"), each.number_or_nan("bound_ns"))
            self.steps[name].take(at_s, step_ns, bound_ns, counts=at_s >= self.settle_s)

    def _step(self, name: str, at_s: float, ns: float) -> None:
        """A step that is sure."""
        series = self.series[name]
        series.step(ns)
        not_counted = "; not counted, for the clocks settled" if at_s < self.settle_s else ""
        said = f"{series.name} stepped by {about_ns(round(ns))}{not_counted}"
        self.marks.add(Mark(at_s, "step", said, size=abs(ns)))


def drift_sections(source: str, lines: Iterable[tuple[int, dict[str, object]]]) -> list[Section]:
    """What each drift in a file tells: one, or several that were appended."""
    told: list[_Drift | Section] = []
    for number, content in lines:
        record = Fields(content, Place(source, number))
        if content.get("schema") != SCHEMA:
            raise record.place.error(f"schema {quoted(content.get('schema'))}", f"{SCHEMA}, as in the lines before")
        last = told[-1] if told else None
        if content.get("kind") == "begin":
            told.append(_Drift(record))
        elif isinstance(last, _Drift) and not (last.is_over and "error" in record):
            last.take(record)
        elif "error" in record:
            said = f"pvclock drift could not do its work: {record.fields('error').text('message')}"
            told.append(Section("pvclock drift", source, said, Standing.OPEN, (), ()))
        else:
            raise record.place.error("a line before a drift began", "one of kind begin first")
        if len(told) > DRIFTS_MAX:
            raise record.place.error(f"more than {DRIFTS_MAX} drifts in one file", "less")
    return [_section(source, each) if isinstance(each, _Drift) else each for each in told]


def _section(source: str, drift: _Drift) -> Section:
    series = list(drift.series.values())
    settling = (Mark(0.0, "settling", "not counted", until=drift.settle_s),) if drift.settle_s > 0 else ()
    note = "Readings while the clocks settle do not count." if settling else ""
    parts: list[Part | None] = [
        *readings_plots(series, drift.reference, (*settling, *drift.marks.marks()), note),
        _rates(drift),
        _steps_plot(drift),
        stability_plot([_settled(each, drift.settle_s) for each in series], drift.interval_s),
        _table(drift),
        _reanchors(drift),
    ]
    verdict, standing = _verdict(drift)
    *first, last = [each.name for each in series]
    names = f"{', '.join(first)} and {last}" if first else last
    told = tuple(part for part in parts if part is not None)
    return Section(f"Drift of {names}", source, verdict, standing, tuple(_sentences(drift)), told)


def _verdict(drift: _Drift) -> tuple[str, Standing]:
    if drift.error is not None:
        return f"The drift was ended by an error: {drift.error}", Standing.OPEN
    if drift.result is None:
        return "The file does not have the last line: there is no result.", Standing.OPEN
    clocks = list(drift.result.all_fields("clocks"))
    rates = [f"{_short_name(clock)} {_rate(clock)}" for clock in clocks]
    is_known = any(_known_rate(clock) for clock in clocks)
    return f"Against {drift.reference}: {'; '.join(rates)}.", Standing.PLAIN if is_known else Standing.OPEN


def _sentences(drift: _Drift) -> Iterator[str]:
    readings = max(len(each.at_s) for each in drift.series.values())
    settled = f", of which the first {drift.settle_s:g} s do not count" if drift.settle_s else ""
    yield f"{counted(readings, 'reading')}, one in {drift.interval_s:g} s, in {drift.last_s:,.3f} s{settled}."
    yield from _steps_in_words(drift)
    if drift.unknown_kinds:
        yield f"Passed over: {counted(drift.unknown_kinds, 'line')} of kinds that this pvclock does not know."


def _steps_in_words(drift: _Drift) -> Iterator[str]:
    """How often each clock stepped for sure."""
    for name, steps in drift.steps.items():
        if steps.sure:
            greatest = f"{'the greatest' if steps.sure > 1 else 'of'} {about_ns(round(steps.greatest_ns))}"
            yield f"{drift.series[name].name}: {counted(steps.sure, 'step')}, {greatest}."
    every = drift.steps.values()
    if any(steps.known for steps in every) and not any(steps.sure for steps in every):
        yield "No clock stepped by more than the bound of its step."


def _short_name(clock: Fields) -> str:
    """What tells a clock from others, in a word or two; its whole name is in a table."""
    word = clock.text("clock")
    if word != "qemu":
        return word
    process = PROCESS.search(clock.text("name"))
    return f"QEMU {process[1]}" if process else "QEMU"


def _settled(series: ClockSeries, settle_s: float) -> ClockSeries:
    """The same without the readings of before settle_s."""
    first = next((place for place, at_s in enumerate(series.at_s) if at_s >= settle_s), len(series.at_s))
    kept = ClockSeries(series.name)
    for place in range(first, len(series.at_s)):
        kept.take(series.at_s[place], series.ahead_ns[place], series.bound_ns[place])
    kept.cuts = {place - first for place in series.cuts if place >= first}
    return kept


def _rates(drift: _Drift) -> Intervals | None:
    rows = []
    for clock in drift.result.all_fields("clocks") if drift.result else ():
        if (rate := _known_rate(clock)) is not None:
            ppb, bound_ppb = rate
            rows.append(Interval(_short_name(clock), ppb - bound_ppb, ppb + bound_ppb, ppb))
    axis = Axis(f"Faster than {drift.reference}", Unit.PPB)
    return Intervals(f"Rate against {drift.reference}", axis, tuple(rows)) if rows else None


def _steps_plot(drift: _Drift) -> Plot | None:
    lines = tuple(
        Line(drift.series[name].name, steps.at_s, steps.ns, steps.low, steps.high)
        for name, steps in drift.steps.items()
        if any(not math.isnan(ns) for ns in steps.ns)
    )
    note = "By how much each reading differs from what the page of the reading before would have given."
    x, y = Axis("Time", Unit.S), Axis("Step", Unit.NS)
    return Plot("Steps between readings", x, y, lines, (), note) if lines else None


def _table(drift: _Drift) -> Table:
    """The clocks, by their whole names, and what each came to."""
    found = {clock.text("clock"): clock for clock in drift.result.all_fields("clocks")} if drift.result else {}
    rows = []
    for word, long_name in drift.long_names.items():
        told = ("-", "-", "-")
        if (clock := found.get(word)) is not None:
            told = (_rate(clock), _ns(clock, "least_step_ns"), _ns(clock, "most_step_ns"))
        rows.append((drift.series[word].name, long_name, *told))
    headings = ("clock", "what it is", f"rate against {drift.reference}", "least step", "greatest step")
    return Table("The clocks", headings, tuple(rows))


def _reanchors(drift: _Drift) -> Table | None:
    """The steps at new anchors: a row a way, a column a clock."""
    clocks = list(drift.result.all_fields("clocks")) if drift.result else []
    steps = {_short_name(clock): clock.fields("reanchors_ns") for clock in clocks if "reanchors_ns" in clock}
    ways = dict.fromkeys(way for each in steps.values() for way in each.content)
    if not ways:
        return None
    rows = tuple((safe_text(way), *(_ns(each, way) for each in steps.values())) for way in islice(ways, WAYS_MAX))
    return Table("Steps at a new anchor", ("what made it", *steps), rows)


def _known_rate(clock: Fields) -> tuple[float, float] | None:
    """(ppb, bound_ppb) of a clock."""
    ppb, bound_ppb = clock.number_or_none("rate_ppb"), clock.number_or_none("bound_ppb")
    return None if ppb is None or bound_ppb is None else (ppb, bound_ppb)


def _rate(clock: Fields) -> str:
    if (rate := _known_rate(clock)) is not None:
        return rate_in_words(*rate)
    why = clock.text_or_none("why")
    return f"unknown: {why}" if why else "unknown"


def _ns(clock: Fields, name: str) -> str:
    ns = clock.number_or_none(name)
    return "-" if ns is None else about_ns(round(ns))
