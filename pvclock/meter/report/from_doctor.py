"""What `pvclock doctor` found of a host, and what `doctor --guest` and a probe found of a guest's clock from inside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from pvclock.errors import ProbeRecordError
from pvclock.meter.inside.judge import judge
from pvclock.meter.inside.rates import tsc_hz_by
from pvclock.meter.inside.reading import parse_record
from pvclock.meter.inside.record import ClockRecord, ProbeRecord
from pvclock.meter.inside.verdict import Budgets, verdict_document
from pvclock.meter.inside.windows import all_windows
from pvclock.meter.report.fields import Fields, Place
from pvclock.meter.report.model import STANDINGS, Axis, Interval, Intervals, Part, Section, Standing, Table, Unit
from pvclock.meter.watch.words import counted
from pvclock.state.json_schema import plain

__all__ = ["guest_section", "host_section", "record_section"]

PPB: Final = 10**9
PAIRS_SHOWN: Final = 40
WORKS: Final = {
    "engine_clock": "engine clock",
    "kvm_guests": "KVM guests",
    "crosscheck": "QEMU cross-check",
    "lab": "lab",
}


def host_section(source: str, result: Fields) -> Section:
    """What a doctor's result tells of a host."""
    findings = list(result.all_fields("findings"))
    missing = [each for each in findings if not each.truth("ok")]
    needed = [each for each in missing if each.truth("needed")]
    verdict = f"Guests need what is missing here: {_names(needed)}." if needed else "All that guests need is here."
    works = result.fields("works")
    here = [name for key, name in WORKS.items() if works.content.get(key) is True]
    sentences = [f"Works here: {', '.join(here) or 'nothing'}."]
    sentences += [f"Not: {', '.join(name for name in WORKS.values() if name not in here)}."] * (len(here) < len(WORKS))
    sentences += [f"{each.text('name')}: {each.text('advice')}" for each in needed if each.text("advice")]
    if spared := [each for each in missing if not each.truth("needed")]:
        sentences.append(f"Missing, and no guest needs it: {_names(spared)}; what to do is in the table.")
    rows = tuple(_finding_row(each) for each in findings)
    table = Table("This host", ("what", "found", "needed", "what to do"), rows, tuple(map(_standing_here, findings)))
    return Section("Host", source, verdict, Standing.BAD if needed else Standing.GOOD, tuple(sentences), (table,))


def guest_section(source: str, result: Fields) -> Section:
    """What a verdict on a guest's clock tells; with the record beside it, each two CPUs."""
    record = _record_of(result)
    intervals = _of_record(record) if record else _of_clocks(list(result.all_fields("clocks")))
    return _guest(source, result, intervals)


def record_section(source: str, record: ProbeRecord) -> Section:
    """What a probe's own line tells: judged as `pvclock probe --judge` does without budgets."""
    document = plain(verdict_document(judge(record, Budgets())))
    return _guest(source, Fields(document, Place(source)), _of_record(record))


# The host


def _names(findings: Iterable[Fields]) -> str:
    return ", ".join(each.text("name") for each in findings)


def _finding_row(finding: Fields) -> tuple[str, ...]:
    needed = "by guests" if finding.truth("needed") else "-"
    return finding.text("name"), finding.fields("found").text("text"), needed, finding.text("advice") or "-"


def _standing_here(finding: Fields) -> Standing:
    if finding.truth("ok"):
        return Standing.GOOD
    return Standing.BAD if finding.truth("needed") else Standing.OPEN


# A guest's clock


def _guest(source: str, result: Fields, intervals: Sequence[Intervals]) -> Section:
    findings = sorted(result.all_fields("findings"), key=lambda each: each.text("weight") != "fault")
    parts: list[Part | None] = [_findings(findings), *intervals, _promises(result, findings), _floors(result)]
    verdict, standing = _verdict(result, findings)
    told = tuple(part for part in parts if part is not None)
    return Section("A guest's clock, from inside", source, verdict, standing, tuple(_sentences(result)), told)


def _verdict(result: Fields, findings: Sequence[Fields]) -> tuple[str, Standing]:
    status = result.text("status")
    standing = STANDINGS.get(status, Standing.OPEN)
    broken, questions = result.texts("broken"), list(result.all_fields("open"))
    faults = [each.text("headline") for each in findings if each.text("weight") == "fault"]
    added = "With the fault that --add put in: " if result.truth("is_added") else ""
    if broken:
        return f"{added}A budget is broken: {broken[0]}", standing
    if status == "broken" and faults:
        more = f"; {len(faults) - 1} more below" if len(faults) > 1 else ""
        return f"{added}The clock is wrong: {faults[0]}{more}.", standing
    if status == "undecided" and questions:
        return f"{added}Undecided whether the clock is right: {questions[0].text('what')}", standing
    if faults:
        return f"{added}The clock keeps the budgets given; what is wrong within them is below.", standing
    return f"{added}Nothing is wrong with the clock, as far as can be told from inside.", standing


def _sentences(result: Fields) -> Iterator[str]:
    yield from result.texts("broken")[1:]
    yield from (question.text("what") for question in result.all_fields("open"))
    measured, present = len(result.numbers("cpus")), result.whole_or_none("cpus_present")
    if present is not None and measured < present:
        yield f"{measured} of {counted(present, 'CPU')} {'was' if measured == 1 else 'were'} measured."
    yield from result.texts("story")


def _findings(findings: Sequence[Fields]) -> Table | None:
    if not findings:
        return None
    rows = tuple(
        (
            each.text("headline") or each.text("code"),
            each.text("what"),
            each.text("software_sees") or "-",
            _change(each),
        )
        for each in findings
    )
    standings = tuple(Standing.BAD if each.text("weight") == "fault" else Standing.PLAIN for each in findings)
    return Table("What was found", ("finding", "what it is", "software sees", "what to change"), rows, standings)


def _change(finding: Fields) -> str:
    return "; ".join(finding.texts("change")) or "-"


def _promises(result: Fields, findings: Sequence[Fields]) -> Table:
    told = result.fields("promises")
    broken = {each.text("promise") for each in findings}
    is_judged = not result.truth("is_added") and len(result.numbers("cpus")) > 1
    rows = [
        ("STABLE: vCPUs' clocks agree", *_kept(told.truth("kvm_stable"), "stable" in broken, is_judged)),
        ("invariant TSC", *_kept(told.truth("invariant_tsc"), "invariant-tsc" in broken, is_judged)),
        ("hypervisor", told.text("hypervisor"), "-", Standing.PLAIN),
        ("clocks", ", ".join(told.texts("clocks")) or "none", "-", Standing.PLAIN),
    ]
    rows += [
        (f"TSC frequency by {each.text('source')}", f"{each.number('hz') / 1e6:,.6f} MHz", "-", Standing.PLAIN)
        for each in told.all_fields("frequencies")
    ]
    headings = ("what", "promised", "seen")
    return Table("Promised and seen", headings, tuple(row[:3] for row in rows), tuple(row[3] for row in rows))


def _kept(is_offered: bool, is_broken: bool, is_judged: bool) -> tuple[str, str, Standing]:
    offered = "offered" if is_offered else "not offered"
    if is_broken:
        return offered, "NOT kept", Standing.BAD
    if not is_judged:
        return offered, "not judged", Standing.PLAIN
    return (offered, "nothing against it", Standing.GOOD) if is_offered else (offered, "-", Standing.PLAIN)


def _floors(result: Fields) -> Table | None:
    rows = [
        (each.text("clock"), each.text("what"))
        for name in ("floors", "step_floors")
        for each in result.all_fields(name)
    ]
    return Table("What may go unseen", ("clock", "what"), tuple(rows)) if rows else None


# Numbers


def _record_of(result: Fields) -> ProbeRecord | None:
    """The record in the document of `doctor --guest`."""
    if "record" not in result:
        return None
    import json

    try:
        return parse_record(json.dumps(result.content["record"]))
    except ProbeRecordError as error:
        raise result.place.error(f"record: {error.field}: {error.found}", error.supported) from None


def _of_record(record: ProbeRecord) -> list[Intervals]:
    found = [_offsets(clock, record) for clock in record.clocks]
    rates = [_rate(clock, record) for clock in record.clocks if clock is not record.tsc]
    return [each for each in (*found, _rate_intervals([rate for rate in rates if rate])) if each is not None]


def _offsets(clock: ClockRecord, record: ProbeRecord) -> Intervals | None:
    """The windows of a clock between each two CPUs, those that are furthest from 0 first if there are many."""
    rows = []
    for (a, b), window in all_windows(clock, len(record.cpus)).items():
        if window is not None:
            name = f"CPU {record.cpus[b].cpu} less CPU {record.cpus[a].cpu}"
            low, high = (float(edge) for edge in window.edges)
            standing = Standing.BAD if window.is_apart or window.moved else Standing.GOOD
            rows.append(Interval(name, min(low, high), max(low, high), standing=standing))
    if not rows:
        return None
    kept = (
        sorted(rows, key=lambda row: -max(abs(row.low), abs(row.high)))[:PAIRS_SHOWN]
        if len(rows) > PAIRS_SHOWN
        else rows
    )
    more = f"  {len(rows) - len(kept)} more pairs, which are closer, are not shown." if len(rows) > len(kept) else ""
    note = f"The offset is within the bar for sure; where 0 is within, too, no offset is proven.{more}"
    return Intervals(f"Offsets between CPUs: {clock.name}", Axis("Offset", Unit.NS), tuple(kept), note)


def _rate(clock: ClockRecord, record: ProbeRecord) -> Interval | None:
    hz = tsc_hz_by(clock)
    if hz is None or hz.low <= 0:
        return None
    low, high = (float((record.tsc_hz / edge - 1) * PPB) for edge in (hz.high, hz.low))
    return Interval(clock.name, low, high)


def _of_clocks(clocks: Sequence[Fields]) -> list[Intervals]:
    """The same from the numbers of a document without the record: of each clock the two CPUs furthest apart."""
    offsets, rates = [], []
    for clock in clocks:
        name = clock.text("name")
        low, high = clock.number_or_none("apart_low_ns"), clock.number_or_none("apart_high_ns")
        if low is not None and high is not None and "apart_cpus" in clock:
            a, b = (*clock.numbers("apart_cpus"), 0.0, 0.0)[:2]
            standing = Standing.BAD if low > 0 or high < 0 or low > high else Standing.GOOD
            offsets.append(
                Interval(f"{name}: CPU {b:.0f} less CPU {a:.0f}", min(low, high), max(low, high), standing=standing)
            )
        low, high = clock.number_or_none("rate_low_ppb"), clock.number_or_none("rate_high_ppb")
        if low is not None and high is not None:
            rates.append(Interval(name, min(low, high), max(low, high)))
    note = "Of each clock the two CPUs that are furthest apart.  The offset is within the bar for sure."
    shown = [Intervals("Offsets between CPUs", Axis("Offset", Unit.NS), tuple(offsets), note)] if offsets else []
    return [*shown, *[each for each in [_rate_intervals(rates)] if each]]


def _rate_intervals(rates: Sequence[Interval]) -> Intervals | None:
    note = "Each clock against the first CPU's TSC, at the frequency that was taken for it."
    return (
        Intervals("Rates against the TSC", Axis("Faster than the TSC", Unit.PPB), tuple(rates), note) if rates else None
    )
