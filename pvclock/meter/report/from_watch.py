"""A watch's JSON lines: the guest's clock against the host's, its steps, its rate, and what became of the budgets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Final

from pvclock.meter.report.clock_series import LINES_MAX, distinct, readings_plots, stability_plot
from pvclock.meter.report.fields import Fields, Place
from pvclock.meter.report.model import STANDINGS, Axis, Part, Plot, Section, Standing, Table, Unit
from pvclock.meter.report.watch_log import STALL_NS, WatchLog
from pvclock.meter.report.watch_sessions import WatchSessions
from pvclock.meter.watch.words import counted, duration, plain_ns, rate_in_words, vcpus_in_words
from pvclock.quantities import quoted

__all__ = ["watch_sections"]

SCHEMA: Final = "pvclock.watch/1"
REASONS_SHOWN: Final = 8


def watch_sections(source: str, lines: Iterable[tuple[int, dict[str, object]]]) -> list[Section]:
    """What each watch in a file tells: one, or several that were appended, or one a VM of a fleet."""
    sessions = WatchSessions()
    for number, content in lines:
        record = Fields(content, Place(source, number))
        if content.get("schema") != SCHEMA:
            raise record.place.error(f"schema {quoted(content.get('schema'))}", f"{SCHEMA}, as in the lines before")
        sessions.take(record)
    return [_section(source, log) for log in sessions.close()]


def _section(source: str, log: WatchLog) -> Section:
    log.close()
    series = distinct(log.readings.values(), list(log.readings))
    verdict, standing = _verdict(log)
    parts: list[Part | None] = [
        *readings_plots(series, _reference(log), log.marks.marks(), log.marks.note()),
        _rate_plot(log),
        stability_plot(series),
        log.steps.table(),
        _promises(log),
    ]
    told = tuple(part for part in parts if part is not None)
    return Section(_title(log), source, verdict, standing, tuple(_sentences(log)), told)


def _title(log: WatchLog) -> str:
    """By the VM's name, and in a fleet what it is, too."""
    began = log.begin or log.end
    told, description = (began.text_or_none(name) for name in ("vm", "description")) if began else (None, None)
    vm = told or log.vm
    more = f" ({description})" if description and description != vm else ""
    return f"Watch of {vm}{more}" if vm else "Watch of a virtual machine"


def _reference(log: WatchLog) -> str:
    begin = log.begin or log.end
    return (begin and begin.text_or_none("reference")) or "the host's clock"


# The verdict, and what else is worth saying


def _verdict(log: WatchLog) -> tuple[str, Standing]:
    if log.error is not None:
        return f"The watch was ended by an error: {log.error}", Standing.OPEN
    if log.end is None and log.ended is not None:
        return f"Not watched to the end, so there is no verdict: {log.ended}.", Standing.OPEN
    if log.end is None:
        return "The file does not have the watch's last line: there is no verdict.", Standing.OPEN
    budgets = log.end.fields("budgets")
    status = budgets.text_or_none("verdict")
    reasons = budgets.texts("reasons")
    if status is None:
        return f"No budget was given.  {_steps_in_words(log)}", Standing.PLAIN
    said = {
        "passed": "Within its budgets.",
        "broken": "A budget is broken",
        "undecided": "Undecided whether it keeps its budgets",
    }
    words = said.get(status, status)
    return f"{words}: {reasons[0]}" if reasons else words, STANDINGS.get(status, Standing.OPEN)


def _sentences(log: WatchLog) -> Iterator[str]:
    budgets = log.end.fields("budgets") if log.end else None
    yield from (budgets.texts("reasons")[1:REASONS_SHOWN] if budgets else ())
    yield _length(log)
    if not log.end or (budgets and "verdict" in budgets):
        yield _steps_in_words(log)
    if log.worst_disagreement:
        yield f"Pages disagreed {counted(log.disagreements, 'time')}; the most: {log.worst_disagreement[1]}."
    yield from _rates(log)
    yield from (f"The host: {why}" for why in log.troubles)
    if log.ended and log.end:
        yield f"{log.ended[0].upper()}{log.ended[1:]}."
    if log.begin and (why := log.begin.text_or_none("why_no_events")):
        yield f"The VMM's events are not told: {why}."
    if not log.readings:
        yield "There are no readings in the file: a watch that writes some shows the clock over time."
    if log.unknown_kinds:
        yield f"Passed over: {counted(log.unknown_kinds, 'line')} of kinds that this pvclock does not know."


def _length(log: WatchLog) -> str:
    summary = log.end.fields("summary") if log.end else None
    stalls = f"; {_stalls(log)}" if log.stalls else ""
    if summary is None:
        return f"Watched for {log.last_s:,.3f} s, as far as the file goes{stalls}."
    return f"Watched for {duration(summary.whole('duration_ns'))}, {counted(summary.whole('polls'), 'look')}{stalls}."


def _stalls(log: WatchLog) -> str:
    longest, marked = duration(log.longest_stall_ns), plain_ns(STALL_NS)
    return f"{counted(log.stalls, 'stall')}, {longest} the longest; those of {marked} and more are marked"


def _steps_in_words(log: WatchLog) -> str:
    steps = log.steps
    if not steps.count:
        return "No page got a new line: no step."
    unknown = f", {steps.unknown:,} of them unknown" if steps.unknown else ""
    anew = f"; {steps.anew:,} without a step" if steps.anew else ""
    greatest = f"  The greatest: {steps.greatest.in_words()}." if steps.greatest else ""
    return f"{counted(steps.count, 'new line')}{unknown}{anew}.{greatest}"


def _rates(log: WatchLog) -> Iterator[str]:
    """The rates at the end, vCPUs of the same rate together."""
    told: dict[str, list[int]] = {}
    for rate in log.end.all_fields("rates") if log.end else ():
        ppb, bound_ppb = rate.number_or_none("rate_ppb"), rate.number_or_none("bound_ppb")
        known = ppb is not None and bound_ppb is not None
        words = rate_in_words(ppb, bound_ppb) if known else f"unknown: {rate.text_or_none('why')}"  # type: ignore[arg-type]
        told.setdefault(words, []).append(rate.whole("vcpu"))
    for words, vcpus in list(told.items())[:REASONS_SHOWN]:
        whose = "" if len(told) == 1 else f" of vCPU {', '.join(map(str, vcpus[:REASONS_SHOWN]))}"
        yield f"The rate{whose} against {_reference(log)} was {words}."


def _rate_plot(log: WatchLog) -> Plot | None:
    shown = list(log.rates.items())[:LINES_MAX]
    same: dict[bytes, list[int]] = {}
    for vcpu, rate in shown:
        same.setdefault(rate.at_s.tobytes() + rate.ppb.tobytes(), []).append(vcpu)
    named = [(vcpus, log.rates[vcpus[0]]) for vcpus in same.values()]
    lines = tuple(rate.line(vcpus_in_words(vcpus)) for vcpus, rate in named)
    if not any(len(line.x) for line in lines):
        return None
    how = "As the watch told it: over all its time so far.  The bound shrinks as it grows."
    note = " ".join(filter(None, [how, log.marks.note()]))
    x, y = Axis("Time", Unit.S), Axis(f"Faster than {_reference(log)}", Unit.PPB)
    return Plot(f"Rate against {_reference(log)}", x, y, lines, log.marks.marks(), note)


# What was promised, and what was seen


def _promises(log: WatchLog) -> Table | None:
    if log.begin is None:
        return None
    rows = list(_promised(log, log.begin))
    headings = ("what", "promised, or set", "seen")
    return Table("Promised and seen", headings, tuple(row[:3] for row in rows), tuple(row[3] for row in rows))


def _promised(log: WatchLog, begin: Fields) -> Iterator[tuple[str, str, str, Standing]]:
    if begin.whole_or_none("vcpus") != 1:
        yield "vCPUs' pages agree", "by KVM, if the pages are STABLE", *_agreement(log)
    offsets = begin.text_or_none("why_no_offsets")
    assumed = "steps rest on what was read" if offsets is None else "steps count if nobody changed the guest's TSC"
    yield "TSC offsets", "readable" if offsets is None else f"not readable: {offsets}", assumed, Standing.PLAIN
    if (hz := begin.number_or_none("tsc_hz")) is not None:
        host = begin.number_or_none("host_tsc_hz")
        seen = "-" if host is None else f"the host's counts {host / 1e6:,.6f} MHz"
        yield "TSC frequency", f"{hz / 1e6:,.6f} MHz for the guest", seen, Standing.PLAIN
    if log.end:
        yield from _budgets(log, log.end.fields("budgets"))


def _agreement(log: WatchLog) -> tuple[str, Standing]:
    if log.worst_disagreement:
        return log.worst_disagreement[1], Standing.BAD
    if log.end is None and log.ended is None:
        return "none was told; one is when it ends, or the watch does", Standing.OPEN
    return "no disagreement at any look", Standing.GOOD


def _budgets(log: WatchLog, budgets: Fields) -> Iterator[tuple[str, str, str, Standing]]:
    standing = STANDINGS.get(budgets.text_or_none("verdict") or "", Standing.PLAIN)
    one_budget = ("max_step_ns" in budgets) + ("max_drift_ppb" in budgets) == 1
    own = standing if one_budget or standing is Standing.GOOD else Standing.PLAIN
    if (max_step_ns := budgets.number_or_none("max_step_ns")) is not None:
        pauses = ", pauses by what the guest saw" if budgets.truth("allow_pauses") else ""
        greatest = log.steps.greatest.size_in_words() if log.steps.greatest else "no step"
        yield "no step of more than", f"{plain_ns(Fraction(max_step_ns))}{pauses}", greatest, own
    if (max_drift_ppb := budgets.number_or_none("max_drift_ppb")) is not None:
        yield "no rate of more than", f"{max_drift_ppb:,.10g} ppb", " ".join(_rates(log)) or "-", own
