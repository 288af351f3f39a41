"""A clock's events: guest time against host time, its rate, what was done to it and what went wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

from pvclock.meter.report.event_series import EventSeries, Point, Ratio, step_ns
from pvclock.meter.report.fields import Fields, Place, safe_text
from pvclock.meter.report.mark_collection import MarkCollection
from pvclock.meter.report.model import Axis, Line, Mark, Part, Plot, Section, Standing, Table, Unit
from pvclock.meter.watch.words import about_ns, counted, duration
from pvclock.quantities import U64_MASK
from pvclock.timekeeping.events import EventKind

__all__ = ["event_sections", "is_event"]

FIELDS: Final = frozenset({"sequence", "kind", "cause", "host_tsc", "guest_ns_before", "guest_ns_after", "rate_after"})
"""By which a line is known as an event."""
KNOWN: Final = frozenset(map(str, EventKind))
HOST_TROUBLE: Final = frozenset({"clocksource", "tsc_unstable", "tsc_step", "tsc_rate"})
BAD: Final = HOST_TROUBLE | {"crash"}
OPEN: Final = frozenset({"stall", "suspend", "refused", "suppressed"})
DRAWN_AS_RATE: Final = "rate"
"""A corrected rate is a step of the rate's own line: marks of thousands would hide all others."""
JUMP_MAX_NS: Final = 1e30
"""More is no time."""
NAMES_MAX: Final = 64
"""Policies and providers that are told apart: we have some ten; a file may name any number."""
OTHERS: Final = "others"
STEADY_PPB: Final = 1e6
"""A clock whose rates are all that close to 1 is drawn by its difference from it."""


def is_event(record: Mapping[str, object]) -> bool:
    """Is that line an event of a clock?"""
    return record.keys() >= FIELDS


def event_sections(source: str, lines: Iterable[tuple[int, dict[str, object]]]) -> list[Section]:
    """What the events of a clock tell; ReportSourceError for a line that is no event."""
    log = _Log()
    take = log.take
    for number, record in lines:
        try:
            take(record)
        except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError):
            _refuse(record, Place(source, number))
    return [_section(source, log)]


class _Count:
    """How often something was, what it stepped guest time by in all, and when it was first and last."""

    def __init__(self, at_s: float) -> None:
        self.times, self.stepped_ns = 0, 0.0
        self.first_s = self.last_s = at_s

    def add(self, at_s: float, jump_ns: float) -> None:
        """It was once more."""
        self.times += 1
        self.stepped_ns += jump_ns
        self.last_s = at_s


class _Log:
    """What is kept of a log while it is read."""

    def __init__(self) -> None:
        self.series = EventSeries()
        self.marks = MarkCollection()
        self.events, self.unplaced, self.unknown = 0, 0, 0
        self.first, self.last = 0, 0
        self.kinds: dict[str, _Count] = {}
        self.policies: dict[str, _Count] = {}
        self.providers: dict[str, None] = {}
        self.forward_ns, self.back_ns = 0.0, 0.0
        self._paused_s: float | None = None

    def take(self, record: Mapping[str, object]) -> None:
        """Take a line; any error tells that it is no event."""
        kind, point = _text(record["kind"]), _point(record)
        at_s = self.series.now_s if point is None else self.series.take(point)
        jump_ns = step_ns(_ratio(record["guest_ns_before"]), _ratio(record["guest_ns_after"]))
        if abs(jump_ns) > JUMP_MAX_NS:
            raise OverflowError
        self.unplaced += point is None
        self.forward_ns = max(self.forward_ns, jump_ns)
        self._note_back(at_s, jump_ns if point is None else min(jump_ns, self.series.fall_ns))
        if kind not in KNOWN:
            self.unknown += 1
            return
        self.events += 1
        self.last = _whole(record["sequence"])
        self.first = self.first or self.last
        self._count(kind, record, at_s, jump_ns)
        if kind != DRAWN_AS_RATE:
            self._mark(kind, record, at_s, jump_ns)

    def _note_back(self, at_s: float, back_ns: float) -> None:
        if back_ns < 0:
            self.back_ns = min(self.back_ns, back_ns)
            said = f"guest time went back by {duration(math.floor(back_ns))}"
            self.marks.add(Mark(at_s, "went back", said, Standing.BAD, size=-back_ns))

    def _count(self, kind: str, record: Mapping[str, object], at_s: float, jump_ns: float) -> None:
        _add(self.kinds, kind, at_s, jump_ns)
        if (policy := record.get("policy")) is not None:
            _add(self.policies, safe_text(_text(policy)), at_s, jump_ns)
        if (provider := record.get("provider")) and len(self.providers) < NAMES_MAX:
            self.providers.setdefault(safe_text(_text(provider)))

    def _mark(self, kind: str, record: Mapping[str, object], at_s: float, jump_ns: float) -> None:
        why = safe_text(_text(record["why"]))
        said = f"{why}; guest time stepped by {about_ns(round(jump_ns))}" if jump_ns else why
        if kind == EventKind.PAUSE:
            self._paused_s = at_s if self._paused_s is None else self._paused_s
            return
        if kind == EventKind.RESUME and self._paused_s is not None:
            begin_s, self._paused_s = self._paused_s, None
            lasted = f"paused for {duration(round((at_s - begin_s) * 1e9))}: {said}"
            self.marks.add(Mark(begin_s, "pause", lasted, until=at_s, size=at_s - begin_s))
            return
        self.marks.add(Mark(at_s, kind.replace("_", " "), said, _standing_of(kind), size=abs(jump_ns)))

    def end(self) -> None:
        """Close what is open."""
        self.series.end()
        if self._paused_s is not None:
            self.marks.add(Mark(self._paused_s, "pause", "paused to the end", until=self.series.now_s))
            self._paused_s = None


# Lines


def _point(record: Mapping[str, object]) -> Point | None:
    """The point of an event; None if it has no place in host time."""
    tsc, hz, real_ns = record["host_tsc"], record["tsc_hz"], record["real_ns"]
    sequence = _whole(record["sequence"])
    before, after = _ratio(record["guest_ns_before"]), _ratio(record["guest_ns_after"])
    rate = _ratio(record["rate_after"])
    if tsc is None or hz is None:
        return None
    if not 0 <= _whole(tsc) <= U64_MASK or not 1 <= _whole(hz) <= U64_MASK:
        raise ValueError
    utc_ns = None if real_ns is None else _whole(real_ns)
    return Point(sequence, _whole(tsc), _whole(hz), utc_ns, before, after, rate, record["kind"] == EventKind.RESTORE)


def _ratio(value: object) -> Ratio:
    """A fraction that is whole or in lowest terms, as to_json() writes it: equal ones are the same."""
    if type(value) is not list or len(value) != 2 or type(value[0]) is not int or type(value[1]) is not int:
        raise TypeError
    if value[1] < 1:
        raise ValueError
    return value[0], value[1]


def _whole(value: object) -> int:
    if type(value) is not int:
        raise TypeError
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _refuse(record: Mapping[str, object], place: Place) -> None:
    """Say which field of a line is wrong."""
    fields = Fields(record, place)
    for name in ("sequence", "host_tsc", "tsc_hz", "real_ns"):
        if name == "sequence" or name in fields:
            fields.whole(name)
    for name in ("kind", "why"):
        fields.text(name)
    raise place.error(
        "an object that is no event, or has a number beyond all time",
        "an event of a clock, as EventLog.json_lines() writes it",
    )


def _add(counts: dict[str, _Count], name: str, at_s: float, jump_ns: float) -> None:
    if name not in counts:
        name = name if len(counts) < NAMES_MAX else OTHERS
        counts.setdefault(name, _Count(at_s))
    counts[name].add(at_s, jump_ns)


def _standing_of(kind: str) -> Standing:
    return Standing.BAD if kind in BAD else Standing.OPEN if kind in OPEN else Standing.PLAIN


# The section


def _section(source: str, log: _Log) -> Section:
    log.end()
    verdict, standing = _verdict(log)
    parts = [*_plots(log), _kinds_table(log), *_policies_table(log)]
    return Section(_title(log), source, verdict, standing, tuple(_sentences(log)), tuple(parts))


def _title(log: _Log) -> str:
    providers = ", ".join(log.providers)
    return f"A clock's events ({providers})" if providers else "A clock's events"


def _verdict(log: _Log) -> tuple[str, Standing]:
    trouble = [kind.replace("_", " ") for kind in log.kinds if kind in BAD]
    if log.back_ns < 0:
        return f"Guest time went back, by up to {duration(math.floor(log.back_ns))}.", Standing.BAD
    if trouble:
        return f"There was trouble: {', '.join(trouble)}.", Standing.BAD
    if log.series.lost or log.unplaced:
        missing = [f"{counted(log.series.lost, 'event')} missing"] * bool(log.series.lost)
        missing += [f"{counted(log.unplaced, 'event')} without a host TSC"] * bool(log.unplaced)
        return f"Guest time never went back, as far as is known: {', '.join(missing)}.", Standing.OPEN
    return "Guest time never went back.", Standing.GOOD


def _sentences(log: _Log) -> Iterator[str]:
    series = log.series
    yield f"{counted(log.events, 'event')}, numbered {log.first:,} to {log.last:,}, in {_seconds(series.now_s)}."
    if log.forward_ns:
        yield f"The greatest step forward was {duration(round(log.forward_ns))}."
    if rates := [rate for rate in series.rates if rate]:
        yield _rates_in_words(min(rates), max(rates))
    if series.lost:
        yield f"Missing between others: {counted(series.lost, 'number')}; the lines are broken there."
    if series.numberings:
        yield (
            f"The host's TSC became another one {counted(series.numberings, 'time')} (it went back, the clock was "
            "restored, or another log begins): the line is broken there, and goes on by the time of day."
        )
    if log.unplaced:
        yield f"Without a host TSC: {counted(log.unplaced, 'event')}, shown where the event before stands."
    if log.unknown:
        yield f"Passed over: {counted(log.unknown, 'event')} of kinds that this pvclock does not know."


def _rates_in_words(least: float, most: float) -> str:
    if max(abs(least - 1), abs(most - 1)) * 1e9 <= STEADY_PPB:
        return (
            f"While it ran, its rate was {(least - 1) * 1e9:+.6g} to {(most - 1) * 1e9:+.6g} ppb off the nominal one."
        )
    return f"While it ran, its rate was {least:.9g} to {most:.9g} guest seconds in a host second."


def _plots(log: _Log) -> Iterator[Part]:
    series, marks = log.series, log.marks.marks()
    if not series.x_s:
        return
    time = Axis("Host time", Unit.S)
    note = (
        "Host time is the host's TSC by its nominal frequency, so a clock at rate 1 is level; one that is paused falls "
        "by 1 s in a second.  The points are exact.  "
    ) + log.marks.note()
    ahead = Line("guest time", series.x_s, series.ahead_ns)
    yield Plot("Guest time less host time", time, Axis("Ahead of the host", Unit.NS), (ahead,), marks, note.rstrip())
    if all(math.isnan(ppb) or abs(ppb) <= STEADY_PPB for ppb in series.rate_ppb):
        line = Line("rate", series.rate_x_s, series.rate_ppb, is_stepped=True)
        yield Plot("Rate", time, Axis("Faster than nominal", Unit.PPB), (line,), marks, "Broken where it was paused.")
    else:
        line = Line("rate", series.rate_x_s, series.rates, is_stepped=True)
        yield Plot("Rate", time, Axis("Rate", Unit.RATE), (line,), marks, "0 where it was paused.")


def _kinds_table(log: _Log) -> Table:
    return _counts_table("Events by kind", "kind", log.kinds, lambda kind: kind.replace("_", " "), _standing_of)


def _policies_table(log: _Log) -> Iterator[Table]:
    if log.policies:
        yield _counts_table("Missed time, by policy", "policy", log.policies, str, lambda _: Standing.PLAIN)


def _counts_table(
    title: str,
    heading: str,
    counts: Mapping[str, _Count],
    name: Callable[[str], str],
    standing: Callable[[str], Standing],
) -> Table:
    ordered = sorted(counts.items(), key=lambda item: -item[1].times)
    rows = tuple(
        (name(key), f"{it.times:,}", _stepped(it), _seconds(it.first_s), _seconds(it.last_s)) for key, it in ordered
    )
    headings = (heading, "events", "guest time stepped by", "first at", "last at")
    return Table(title, headings, rows, tuple(standing(key) for key, _ in ordered))


def _stepped(count: _Count) -> str:
    return about_ns(round(count.stepped_ns)) if count.stepped_ns else "-"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.3f} s"
