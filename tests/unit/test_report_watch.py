"""What a report makes of a watch: the readings as lines, steps taken out, marks, steps in a table, the verdict."""

from __future__ import annotations

import json
import math
import random
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest

from pvclock.errors import ReportSourceError
from pvclock.meter.report.fields import Fields, Place
from pvclock.meter.report.mark_collection import MarkCollection
from pvclock.meter.report.model import MARKS_MAX, Mark, Plot, Standing, Table
from pvclock.meter.report.sources import read
from pvclock.meter.report.watch_steps import STEPS_SHOWN, UNKNOWN_SHOWN, disagreement_in_words, step_of
from pvclock.meter.watch.changes import Disagreement, Step, TscBasis
from pvclock.meter.watch.sentences import sentences
from pvclock.meter.watch.vm import VmEvent, VmEventKind
from pvclock.quantities import HostTsc
from pvclock.readings import TimeInfo
from qemu_glue.watch.records import finding_record
from tests.unit.report_lines import (
    found,
    plot,
    reading,
    report_of,
    rows,
    section_of,
    step,
    vmm_event,
    watch_result,
    written,
)

pytestmark = pytest.mark.row("E10")

AGAINST = "Clock against raw"
STEPLESS = "Clock against raw, without its steps"
ALLAN = "Allan deviation"
PAUSE_NS = -1_000_000_000


def watch_line(kind: str, at_s: float, **fields: object) -> dict[str, Any]:
    """A line of any kind."""
    return {"schema": "pvclock.watch/1", "kind": kind, "at_s": at_s, "utc": "2026-11-27T12:00:00Z", **fields}


def fleet_found(vm: str, at_s: float = 0.0, **changes: object) -> dict[str, Any]:
    """The first line of a VM of a fleet."""
    return {**found(vm=vm, description=f"QEMU of {vm}", **changes), "at_s": at_s}


def fleet_result(*ends: dict[str, Any], **not_watched: str) -> dict[str, Any]:
    """A fleet's last line: what each watch came to, and why VMs were not watched."""
    left = [{"vm": vm, "why": why} for vm, why in not_watched.items()]
    return {**watch_result(), "result": {"vms": list(ends), "not_watched": left, "host_troubles": []}}


def fleet_end(vm: str, verdict: str, *reasons: str) -> dict[str, Any]:
    """What the watch of a VM of a fleet came to."""
    end: dict[str, Any] = watch_result(verdict, *reasons)["result"]
    return {**end, "vm": vm, "description": f"QEMU of {vm}"}


def host_line(why: str, at_s: float = 0.0, **vm: None) -> dict[str, Any]:
    """A trouble of the host; vm=None: as a fleet tells it."""
    return watch_line("host", at_s, what="clocksource", unstable=False, why=why, **vm)


def paused(at_s: float, vcpus: int = 2) -> list[dict[str, Any]]:
    """STOP, RESUME a second later, and each vCPU's step."""
    steps = [
        step(at_s + 1.02, vcpu, PAUSE_NS, "stop", "resume", seen_ns=-75_800, seen_bound_ns=1100)
        for vcpu in range(vcpus)
    ]
    return [vmm_event(at_s, "stop"), vmm_event(at_s + 1, "resume"), *steps]


def marks(kind: str, *lines: dict[str, Any], tmp_path: Path) -> list[Mark]:
    """The marks of one kind that these lines make."""
    section = section_of(tmp_path / "x", [found(), reading(0, 0.0, 0.0), *lines, reading(99, 0.0, 0.0)])
    return [mark for mark in plot(section, AGAINST).marks if mark.kind == kind]


# Readings


def test_readings_are_lines_with_their_bounds_as_band(tmp_path: Path) -> None:
    """One line a vCPU, in ns over the watch's seconds; broken where the clock is unknown."""
    lines = [found(), reading(1, 0.0, 1.0), reading(2, 5.0, None), reading(3, 9.0, 11.0, bound_ns=3.0)]
    shown = plot(section_of(tmp_path / "x", lines), AGAINST)
    first, second = shown.lines
    assert (first.name, second.name) == ("vCPU 0", "vCPU 1")
    assert list(first.x) == [1, 2, 3]
    assert list(first.y) == [0, 5, 9]
    assert (list(first.low), list(first.high)) == ([-10, -5, 6], [10, 15, 12])
    assert [math.isnan(y) for y in second.y] == [False, True, False]
    assert [math.isnan(y) for y in second.low] == [False, True, False]


def test_vcpus_with_the_same_readings_are_one_line(tmp_path: Path) -> None:
    """They would hide each other; the line's name has all their numbers."""
    lines = [found(), reading(1, 0.0, 1.0, 0.0, 0.0), reading(2, 5.0, 6.0, 5.0, 5.0)]
    shown = plot(section_of(tmp_path / "x", lines), AGAINST)
    assert [line.name for line in shown.lines] == ["vCPUs 0, 2-3", "vCPU 1"]


def test_of_many_vcpus_those_that_went_furthest_are_drawn(tmp_path: Path) -> None:
    """And the note says how many are not."""
    lines = [found(), reading(1, *[0.0] * 40), reading(2, *(float(vcpu) for vcpu in range(40)))]
    shown = plot(section_of(tmp_path / "x", lines), AGAINST)
    assert [line.name for line in shown.lines] == [f"vCPU {vcpu}" for vcpu in range(24, 40)]
    assert "24 more clocks" in shown.note


def test_steps_are_taken_out_where_they_hide_all_else(tmp_path: Path) -> None:
    """A pause of 1 s beside a drift of ns: a second plot has the clock as if it had not been stopped."""
    before = [reading(at_s, -50.0 * at_s, -50.0 * at_s) for at_s in range(5)]
    after = [reading(at_s, PAUSE_NS - 50.0 * at_s, PAUSE_NS - 50.0 * at_s) for at_s in range(6, 10)]
    section = section_of(tmp_path / "x", [found(), *before, *paused(4.2), *after, watch_result()])
    (line,) = plot(section, STEPLESS).lines
    assert list(line.y) == [-50.0 * at_s for at_s in (0, 1, 2, 3, 4, 6, 7, 8, 9)]
    assert min(plot(section, AGAINST).lines[0].y) < PAUSE_NS


def test_without_steps_there_is_one_plot(tmp_path: Path) -> None:
    """A quiet clock is shown once."""
    lines = [found(), *(reading(at_s, -50.0 * at_s, -50.0 * at_s) for at_s in range(5)), watch_result()]
    titles = [part.title for part in section_of(tmp_path / "x", lines).parts if isinstance(part, Plot)]
    assert titles == [AGAINST, ALLAN]


def test_a_step_of_unknown_size_goes_on_at_the_level_of_before(tmp_path: Path) -> None:
    """After a reset the clock counts anew: the line is broken there, and without steps it goes on where it was."""
    lines = [reading(0, 0.0), reading(1, 7.0), vmm_event(1.5, "reset"), step(1.6, 0, None, "reset", basis="changed")]
    lines += [watch_line("found", 1.7, why="in the same places"), reading(2, 0.0), reading(3, 1e9)]
    section = section_of(tmp_path / "x", [found(), *lines, step(3.5, 0, 10**9), reading(4, 2e9 + 3)])
    shown = list(plot(section, AGAINST).lines[0].y)
    assert [math.isnan(y) for y in shown] == [False, False, True, False, False, False, False, False]
    assert shown[-3:] == [pytest.approx(1e9 + 1.5), pytest.approx(2e9 + 1.5), 2e9 + 3]


def test_a_step_stands_upright_at_its_time(tmp_path: Path) -> None:
    """A pause from 4.3 to 5.4 s: the clock drifts until 5.4 s, and is a second behind from then on."""
    lines = [reading(at_s, -60.0 * at_s, bound_ns=5.0 + at_s) for at_s in (4, 5)]
    lines += [step(5.4, 0, PAUSE_NS), step(5.4, 1, 7), reading(6, PAUSE_NS - 360.0, bound_ns=11.0)]
    (line,) = plot(section_of(tmp_path / "x", [found(), *lines]), AGAINST).lines
    assert list(line.x) == [4, 5, 5.4, 5.4, 6]
    assert list(line.y) == pytest.approx([-240, -300, -324, PAUSE_NS - 324, PAUSE_NS - 360], abs=0.01)
    assert [high - y for high, y in zip(line.high, line.y, strict=True)] == pytest.approx([9, 10, 11, 11, 11])


@pytest.mark.parametrize("told", [29.5, 30.0005], ids=["before", "at the same look"])
def test_a_step_that_is_told_late_counts_from_its_time(told: float, tmp_path: Path) -> None:
    """It waits for the VMM's RESUME, while a reading shows it already: the report is as if it had not waited."""
    readings = [reading(at_s, -52.0 * at_s + (PAUSE_NS if at_s >= 30 else 0)) for at_s in range(60)]
    paused_at = vmm_event(28.4, "stop"), vmm_event(29.3, "resume")
    tells = step(told, 0, PAUSE_NS, "stop", "resume")
    in_time = section_of(tmp_path / "x", [found(), *readings[:30], *paused_at, tells, *readings[30:]])
    late = section_of(tmp_path / "x", [found(), *readings[:32], *paused_at, tells, *readings[32:]])
    assert late == in_time
    assert list(plot(late, STEPLESS).lines[0].y) == [-52.0 * at_s for at_s in range(60)]
    assert max(plot(late, ALLAN).lines[0].y) < 23


def test_readings_begin_anew_once_an_unknown_step_is_told(tmp_path: Path) -> None:
    """Late as it is: the reading that showed it is at the level of before, and so are those that count from 0 again."""
    readings = [reading(0, 0.0), reading(1, 5.0), reading(2, 1e9)]
    lines = [*readings, step(1.5, 0, None), reading(3, None), reading(4, 0.0), step(4.5, 0, 10**6), reading(5, 1e6 + 1)]
    shown = plot(section_of(tmp_path / "x", [found(), *lines]), STEPLESS).lines[0].y
    assert [y for y in shown if not math.isnan(y)] == [0, 5, 5, 5, 6]


def test_the_allan_deviation_takes_pauses_for_no_noise(tmp_path: Path) -> None:
    """A clock whose only fault is that it was paused has the deviation of its readings' bounds and no more."""
    source = random.Random(1)  # noqa: S311  # no secret
    ahead = [-50.0 * at_s + source.random() for at_s in range(64)]
    before = [reading(at_s, ns) for at_s, ns in enumerate(ahead[:32])]
    after = [reading(at_s, ns + PAUSE_NS) for at_s, ns in enumerate(ahead) if at_s >= 33]
    shown = plot(section_of(tmp_path / "x", [found(), *before, *paused(31.5, 1), *after]), ALLAN)
    (clock, floor) = shown.lines
    assert list(clock.x) == list(floor.x) == [1, 2, 4, 8]
    assert max(clock.y) < 2
    assert list(floor.y) == [10, 5, 2.5, 1.25]
    assert shown.x.is_log
    assert shown.y.is_log


# Marks


def test_a_pause_is_a_span_and_its_step_a_mark(tmp_path: Path) -> None:
    """From STOP to RESUME; the step of both vCPUs is one mark, which says what the guest saw of it."""
    lines = paused(10)
    (pause,) = marks("pause", *lines, tmp_path=tmp_path)
    assert (pause.x, pause.until, pause.standing) == (10, 11, Standing.PLAIN)
    (one,) = marks("step", *lines, tmp_path=tmp_path)
    assert one.text == (
        "vCPUs 0-1 stepped by -1.000 000 000 s against the TSC, -75.8 us (within 1.1 us) from STOP to RESUME; "
        "STOP, RESUME 1.000 s later"
    )
    assert one.standing is Standing.PLAIN


def test_a_step_without_a_pause_is_bad_and_an_unknown_one_open(tmp_path: Path) -> None:
    """What moves a clock while it runs is a fault, and what cannot be told is not decided."""
    (bad,) = marks("step", step(5, 0, 1500, basis="assumed"), tmp_path=tmp_path)
    assert (bad.standing, bad.size) == (Standing.BAD, 1500)
    assert bad.text == "vCPU 0 stepped by +1.500 us against the TSC (if its TSC was not changed)"
    (unknown,) = marks("unknown step", step(5, 0, None), tmp_path=tmp_path)
    assert unknown.standing is Standing.OPEN
    assert marks("step", step(5, 0, 1), tmp_path=tmp_path) == []


def test_disagreements_stalls_and_the_host(tmp_path: Path) -> None:
    """Each has its kind, its span and its standing."""
    apart = {"ahead": 0, "behind": 1, "by_ns": 115_700_000, "bound_ns": 2, "least_ns": 3_100_000, "events": []}
    lines = [
        watch_line("disagreement", 2, **apart, basis="offsets", is_stale=False),
        watch_line("disagreement", 3, **{**apart, "by_ns": 9}, basis="offsets", is_stale=True),
        watch_line("stall", 5, gap_ns=500_000_000),
        watch_line("stall", 6, gap_ns=1_000_000),
        watch_line("host", 7, what="tsc_unstable", unstable=True, why="the kernel marked the TSC unstable"),
        watch_line("page_lost", 8, vcpu=1, why="its pads are not zero"),
        watch_line("flags", 9, vcpu=1, before=1, after=3),
        watch_line("ended", 10, why="the VM has ended"),
    ]
    section = section_of(tmp_path / "x", [found(), reading(0, 0.0), *lines, watch_result()])
    shown = {mark.kind: mark for mark in plot(section, AGAINST).marks}
    apart_mark, stale = (mark for mark in plot(section, AGAINST).marks if mark.kind == "disagreement")
    assert (apart_mark.standing, stale.standing) == (Standing.BAD, Standing.PLAIN)
    assert (apart_mark.x, apart_mark.until) == (2, 2.0031)
    assert (shown["stall"].x, shown["stall"].until, shown["stall"].standing) == (4.5, 5, Standing.OPEN)
    assert shown["host"].standing is Standing.BAD
    assert shown["flags"].text == "vCPU 1: flags stable -> stable, stopped"
    assert shown["page lost"].standing is Standing.OPEN
    said = (
        "vCPU 0's page gave up to 115.700 000 ms more than vCPU 1's, for at least 3.100 ms: a clock that was read by "
        "it went back by as much"
    )
    assert f"Pages disagreed 1 time; the most: {said}." in section.sentences
    assert "The host: the kernel marked the TSC unstable" in section.sentences
    assert "The VM has ended." in section.sentences


def test_an_event_of_another_name_is_one_of_many(tmp_path: Path) -> None:
    """A file cannot make a legend of its own: what no VMM of ours tells is an event."""
    (mark,) = marks("event", vmm_event(5, "x" * 500), tmp_path=tmp_path)
    assert mark.text == f"the VMM said {'X' * 500}"
    (mark,) = marks("migration", vmm_event(5, "migration"), tmp_path=tmp_path)
    assert mark.text == "the VMM said MIGRATION"


def test_many_marks_are_merged_with_the_greatest_kept(tmp_path: Path) -> None:
    """Of 5,000 steps no more than a page draws are left, the greatest of them; they stand for all, at all times."""
    steps = [step(at / 10, 0, 1000 + (at == 2345) * 10**6, "stop") for at in range(5000)]
    section = section_of(tmp_path / "x", [found(), reading(0, 0.0), *steps, reading(501, 0.0)])
    shown = plot(section, AGAINST).marks
    assert len(shown) <= MARKS_MAX
    assert sum(mark.stands_for for mark in shown) == 5000
    assert max(shown, key=lambda mark: mark.size).x == 234.5
    assert max(after.x - before.x for before, after in pairwise(shown)) < 500 / 100
    said = f"5,000 marks are drawn as {len(shown):,}: of neighbours that are alike, the greatest is shown."
    assert all(part.note.endswith(said) for part in section.parts if isinstance(part, Plot) and part.marks)
    few = plot(section_of(tmp_path / "x", [found(), *steps[:100], reading(501, 0.0)]), AGAINST)
    assert (len(few.marks), "marks" in few.note) == (100, False)


@pytest.mark.parametrize("great", list(Standing))
def test_the_greatest_mark_of_each_standing_is_kept(great: Standing) -> None:
    """A step of 1 s at a pause stands beside any number of small ones that are faults, and the other way round."""
    marks = MarkCollection()
    for at in range(50_000):
        marks.add(Mark(at, "step", "", list(Standing)[at % 4], size=at % 4))
        if at == 31_234:
            marks.add(Mark(at, "step", "", great, size=1e9))
    shown = marks.marks()
    assert len(shown) <= MARKS_MAX
    assert sum(mark.stands_for for mark in shown) == 50_001
    (greatest,) = (mark for mark in shown if mark.size == 1e9)
    assert (greatest.x, greatest.standing) == (31_234, great)
    assert {mark.standing for mark in shown} == set(Standing)


# Steps in a table


def test_steps_stand_greatest_first_and_the_rest_is_counted(tmp_path: Path) -> None:
    """The table has the greatest steps of either direction; how many more there were stands above it."""
    sizes = [(-1) ** place * (100 + 7 * (place * 37 % 200)) for place in range(200)]
    section = section_of(tmp_path / "x", [found(), *(step(at, at % 2, ns) for at, ns in enumerate(sizes))])
    shown = rows(section, f"Steps, the greatest first; {200 - STEPS_SHOWN} smaller ones are not shown")
    greatest = sorted(sizes, key=abs, reverse=True)[:STEPS_SHOWN]
    assert len(shown) == STEPS_SHOWN
    assert [row[2].replace(" us", "").replace(".", "").replace(" ns", "") for row in shown] == [
        f"{ns:+d}" for ns in greatest
    ]


def test_unknown_steps_are_counted_apart_from_smaller_ones(tmp_path: Path) -> None:
    """Of how many ns nobody knows, so they are not the least: they come first, whatever else there was."""
    steps = [step(at, 0, None) for at in range(40)] + [step(50 + at, 0, 5 + at) for at in range(60)]
    title = "Steps, unknown ones and then the greatest; 20 more of unknown size and 10 smaller ones are not shown"
    shown = rows(section_of(tmp_path / "x", [found(), *steps]), title)
    assert [row[2] for row in shown] == ["unknown"] * UNKNOWN_SHOWN + [f"+{64 - at} ns" for at in range(STEPS_SHOWN)]
    few = rows(section_of(tmp_path / "x", [found(), *steps[39:42]]), "Steps, unknown ones and then the greatest")
    assert [row[2] for row in few] == ["unknown", "+6 ns", "+5 ns"]


PAGE = TimeInfo(2, 1, 2, 1 << 31, -1, 1)  # type: ignore[arg-type]  # units
STEP = Step(HostTsc(9), HostTsc(8), 3, PAGE, PAGE, 1, TscBasis.OFFSETS, -1_035_012_345, 2, None, None, ())
PAUSE = VmEvent(VmEventKind.STOP, 10**18), VmEvent(VmEventKind.RESUME, 10**18 + 1_035_000_000)
APART = Disagreement(HostTsc(9), 0, 1, 115_700_000, 2, 3_100_000, (), TscBasis.OFFSETS)


@pytest.mark.parametrize(
    "finding",
    [
        STEP,
        STEP._replace(seen_ns=2_100_000, seen_bound_ns=500_000, events=PAUSE),
        STEP._replace(step_ns=7, basis=TscBasis.ASSUMED, lines=3),
        STEP._replace(step_ns=0),
        STEP._replace(step_ns=None, bound_ns=None, basis=TscBasis.CHANGED),
        STEP._replace(lines=0, step_ns=None, bound_ns=None, basis=TscBasis.CHANGED),
        STEP._replace(lines=0, step_ns=5000),
        APART,
        APART._replace(least_ns=0, events=PAUSE),
        APART._replace(is_stale=True),
        APART._replace(ahead=2, behind=0, is_stale=True),
    ],
)
def test_a_finding_has_the_same_words_as_in_the_watch(finding: Step | Disagreement) -> None:
    """What the watch told people while it went on is what the report of its JSON tells."""
    record = Fields({**finding_record(finding), "at_s": 1.0}, Place("x"))
    words = step_of(record).in_words() if isinstance(finding, Step) else disagreement_in_words(record)
    assert [words] == [sentence for _, sentence in sentences([finding])]


@pytest.mark.parametrize(
    ("utc", "said"),
    [
        ("2026-11-27T14:03:05.035000Z", "STOP, RESUME 1.035 s later"),
        ("2026-11-27T14:03:05.035000", "STOP, RESUME 1.035 s later"),
        ("0001-01-01T00:00:00+14:00", "STOP, RESUME 63 930 000 000 s later"),
        (None, "STOP, RESUME"),
        ("soon", "STOP, RESUME"),
    ],
)
def test_an_events_utc_is_what_can_be_read_of_it(utc: str | None, said: str) -> None:
    """Without a time zone it is UTC as well; where there is none, nothing is said of how much later it was."""
    events = [{"what": "stop", "utc": "2026-11-27T14:03:04.000000Z"}, {"what": "resume", "utc": utc}]
    record = Fields({**finding_record(STEP), "at_s": 1.0, "events": events}, Place("x"))
    assert step_of(record).cause == said


def test_a_steps_row(tmp_path: Path) -> None:
    """When, on which vCPUs, how long, what the guest saw, what the VMM told, and how far that is known."""
    (row,) = rows(section_of(tmp_path / "x", [found(), *paused(10)]), "Steps, the greatest first")
    assert row == (
        "11.020 s",
        "0-1",
        "-1.000 000 000 s",
        "-75.8 us (within 1.1 us)",
        "STOP, RESUME 1.000 s later",
        "by TSC offsets",
    )


# Verdict and promises


@pytest.mark.parametrize(
    ("verdict", "reasons", "said", "standing"),
    [
        ("passed", (), "Within its budgets.", Standing.GOOD),
        ("broken", ("vCPU 0 stepped", "drift"), "A budget is broken: vCPU 0 stepped", Standing.BAD),
        ("undecided", ("a bound",), "Undecided whether it keeps its budgets: a bound", Standing.OPEN),
        (None, (), "No budget was given.  No page got a new line: no step.", Standing.PLAIN),
    ],
)
def test_the_verdict_is_the_watchs_own(
    verdict: str | None, reasons: tuple[str, ...], said: str, standing: Standing, tmp_path: Path
) -> None:
    """With its first reason; the others are sentences."""
    section = section_of(tmp_path / "x", [found(), watch_result(verdict, *reasons)])
    assert (section.verdict, section.standing) == (said, standing)
    assert section.sentences[: len(reasons[1:])] == reasons[1:]
    assert "The rate against raw was -29 ppb, within 16." in section.sentences


def test_without_a_last_line_there_is_no_verdict(tmp_path: Path) -> None:
    """A watch that was killed told what it told until then."""
    section = section_of(tmp_path / "x", [found(), step(5, 0, 700), reading(9, 0.0)])
    assert section.standing is Standing.OPEN
    assert "Watched for 9.000 s, as far as the file goes." in section.sentences
    assert any("+700 ns" in sentence for sentence in section.sentences)


def test_rates_are_a_line_with_bounds(tmp_path: Path) -> None:
    """As the watch told them; broken while they were unknown."""
    rate = {"vcpu": 0, "rate_ppb": -29.0, "bound_ppb": 16.0, "why": None}
    unknown = {"vcpu": 0, "rate_ppb": None, "bound_ppb": None, "why": "stopped"}
    lines = [
        watch_line("rate", at_s, reference="raw", rates=[each]) for at_s, each in ((2, rate), (4, unknown), (8, rate))
    ]
    (line,) = plot(section_of(tmp_path / "x", [found(), *lines]), "Rate against raw").lines
    assert list(line.x) == [2, 4, 8]
    assert (line.y[0], line.low[0], line.high[0]) == (-29, -45, -13)
    assert math.isnan(line.y[1])


def test_promised_and_seen(tmp_path: Path) -> None:
    """What the watch could rest on, and each budget beside what was seen."""
    began = found(why_no_offsets="debugfs is not mounted")
    section = section_of(tmp_path / "x", [began, step(5, 0, 1500), watch_result("broken", "x")])
    shown = {row[0]: row[1:] for row in rows(section, "Promised and seen")}
    assert shown["TSC offsets"][0] == "not readable: debugfs is not mounted"
    assert shown["no step of more than"] == ("1 us", "+1.500 us at 5.000 s")
    assert shown["vCPUs' pages agree"][1] == "no disagreement at any look"
    assert standing_of_agreement(tmp_path, began, watch_result()) is Standing.GOOD
    assert shown["TSC frequency"] == ("2,596.132000 MHz for the guest", "the host's counts 2,596.132000 MHz")


def standing_of_agreement(path: Path, *lines: dict[str, Any]) -> Standing:
    """How it stands with the pages of a watch's vCPUs."""
    table = section_of(path / "x", lines).parts[-1]
    assert isinstance(table, Table)
    return dict(zip((row[0] for row in table.rows), table.standings, strict=True))["vCPUs' pages agree"]


@pytest.mark.parametrize("last", [None, "ended", "left"])
def test_a_disagreement_may_be_amid_where_the_file_ends(last: str | None, tmp_path: Path) -> None:
    """It is told when it ends, or the watch does: without that, that none was told says nothing."""
    end = [] if last is None else [watch_line(last, 5, why="its QEMU is gone")]
    standing = standing_of_agreement(tmp_path, found(), step(3, 0, 7), *end)
    assert standing is (Standing.OPEN if last is None else Standing.GOOD)


def test_stalls_are_counted_with_the_longest(tmp_path: Path) -> None:
    """Most are too short to be marked, and the reader is told so."""
    stalls = [watch_line("stall", at_s, gap_ns=62_000_000 - 10**7 * at_s) for at_s in range(5)]
    section = section_of(tmp_path / "x", [found(), *stalls, watch_result()])
    said = "5 stalls, 62.00 ms the longest; those of 100 ms and more are marked"
    assert f"Watched for 9.000 s, 900 looks; {said}." in section.sentences


# Several watches


def test_appended_watches_are_sections_of_their_own(tmp_path: Path) -> None:
    """`>>` puts one behind the other."""
    one = [found(), reading(1, 0.0), watch_result("passed")]
    report = report_of(tmp_path / "x", [*one, *one, found(vm="another")])
    assert [section.title for section in report.sections] == [
        "Watch of QEMU 7.2.22, process 17, 2 vCPUs",
        "Watch of QEMU 7.2.22, process 17, 2 vCPUs",
        "Watch of another",
    ]


def test_the_vms_of_a_fleet_are_sections_of_their_own(tmp_path: Path) -> None:
    """Their lines come mixed, each with its VM's name; what is about the host is told of each that is watched then."""
    began = [fleet_found(vm, at_s) for at_s, vm in enumerate("ab")]
    mixed = [{**reading(at_s, float(at_s * sign)), "vm": vm} for at_s in range(4) for vm, sign in (("a", 1), ("b", -1))]
    host = host_line("left clocksource tsc", 5, vm=None)
    left = watch_line("left", 6, vm="b", why="its QEMU has ended")
    end = fleet_result(fleet_end("a", "passed"), b="x")
    first, second = report_of(tmp_path / "x", [*began, *mixed, host, left, end]).sections
    assert (first.title, second.title) == ("Watch of a (QEMU of a)", "Watch of b (QEMU of b)")
    assert list(plot(first, AGAINST).lines[0].y) == [0, 1, 2, 3]
    assert list(plot(second, AGAINST).lines[0].y) == [0, -1, -2, -3]
    assert (first.verdict, second.standing) == ("Within its budgets.", Standing.OPEN)
    assert all("The host: left clocksource tsc" in section.sentences for section in (first, second))
    assert second.verdict == "Not watched to the end, so there is no verdict: its QEMU has ended."


@pytest.mark.parametrize("kind", ["metrics", "weather"])
def test_what_stands_before_the_first_line_makes_no_section(kind: str, tmp_path: Path) -> None:
    """Where metrics are served is told before all else; so may be what a newer pvclock tells."""
    first = watch_line(kind, 0, url="http://localhost:9911/metrics")
    section = section_of(tmp_path / "x", [first, found(), reading(1, 0.0), watch_result("passed")])
    assert section.title == "Watch of QEMU 7.2.22, process 17, 2 vCPUs"
    assert any("Passed over" in sentence for sentence in section.sentences) == (kind == "weather")


def test_a_vm_that_was_never_watched_has_its_section(tmp_path: Path) -> None:
    """A fleet tells why, and which one it was; the lines of the next VM are not its."""
    lines = [
        watch_line("left", 0, vm="a", why="its socket is in use"),
        fleet_found("b"),
        {**reading(1, 0.0), "vm": "b"},
    ]
    first, second = report_of(tmp_path / "x", lines).sections
    assert (first.title, second.title) == ("Watch of a", "Watch of b (QEMU of b)")
    assert first.verdict == "Not watched to the end, so there is no verdict: its socket is in use."


def test_a_vm_that_comes_again_begins_anew(tmp_path: Path) -> None:
    """A fleet's VM that was started again is another section; pages that were found again are not."""
    again = watch_line("found", 2, vm="a", why="in the same places")
    lines = [fleet_found("a"), {**reading(1, 0.0), "vm": "a"}, again]
    assert len(report_of(tmp_path / "x", lines).sections) == 1
    assert len(report_of(tmp_path / "x", [*lines, fleet_found("a")]).sections) == 2


def test_each_watch_of_a_vm_has_its_own_verdict(tmp_path: Path) -> None:
    """A fleet's VM that was watched twice, and first broke its budgets: neither verdict is the other's, or is lost."""
    ended = watch_line("ended", 9, vm="web", why="the VM has ended")
    left = watch_line("left", 10, vm="web", why="no greeting")
    ends = fleet_end("web", "broken", "vCPU 0 stepped"), fleet_end("db", "passed"), fleet_end("web", "passed")
    lines = [fleet_found("web"), fleet_found("db"), ended, fleet_found("web", 20), fleet_result(*ends)]
    assert [(section.title, section.verdict) for section in report_of(tmp_path / "x", lines).sections] == [
        ("Watch of web (QEMU of web)", "A budget is broken: vCPU 0 stepped"),
        ("Watch of db (QEMU of db)", "Within its budgets."),
        ("Watch of web (QEMU of web)", "Within its budgets."),
    ]
    tried = [fleet_found("web"), ended, left, fleet_found("web", 20), fleet_result(ends[2])]  # the first entry lacks
    assert [section.standing for section in report_of(tmp_path / "x", tried).sections] == [Standing.OPEN, Standing.GOOD]


def test_one_vms_error_is_not_told_of_another(tmp_path: Path) -> None:
    """What stands before it is the host's: a VM that cannot be watched is a section of its own."""
    left = watch_line("left", 0.1, vm="db", why="no greeting within 2 s")
    lines = [host_line("hpet", vm=None), left, fleet_found("web", 1), fleet_result(fleet_end("web", "passed"))]
    first, second = report_of(tmp_path / "x", lines).sections
    assert (first.title, second.title) == ("Watch of db", "Watch of web (QEMU of web)")
    assert "no greeting" in first.verdict
    assert (second.verdict, second.standing) == ("Within its budgets.", Standing.GOOD)
    assert not [said for said in second.sentences if "greeting" in said]


def test_a_trouble_of_the_host_is_told_of_vms_that_come_later_too(tmp_path: Path) -> None:
    """Its clock is theirs; before the first of them, and between two."""
    lines = [host_line("hpet", vm=None), fleet_found("a"), host_line("steps", 1, vm=None), fleet_found("b", 2)]
    sections = report_of(tmp_path / "x", lines).sections
    assert [section.title for section in sections] == ["Watch of a (QEMU of a)", "Watch of b (QEMU of b)"]
    for section in sections:
        assert [said for said in section.sentences if "host" in said] == ["The host: hpet", "The host: steps"]


def test_a_fleet_of_no_vm_tells_of_the_host_and_of_what_was_named(tmp_path: Path) -> None:
    """Nothing that a file tells is lost for there was no VM to tell it of."""
    (alone,) = report_of(tmp_path / "x", [host_line("hpet", vm=None)]).sections
    assert "The host: hpet" in alone.sentences
    (empty,) = report_of(tmp_path / "x", [host_line("hpet", vm=None), fleet_result()]).sections
    assert empty.verdict == "Not watched to the end, so there is no verdict: there was no VM."
    (named,) = report_of(tmp_path / "x", [host_line("hpet", vm=None), fleet_result(db="no such socket")]).sections
    assert named.title == "Watch of db"
    assert named.verdict == "Not watched to the end, so there is no verdict: no such socket."
    assert "The host: hpet" in named.sentences


def test_an_error_is_told_of_the_last_watch_alone(tmp_path: Path) -> None:
    """A watch that was killed, and another that an error ended, appended: the first was not ended by it."""
    error = {"schema": "pvclock.watch/1", "version": "0", "ok": False, "error": {"kind": "QmpFailed", "message": "boo"}}
    for killed, other in ((found(), found(vm="other")), (fleet_found("a"), found()), (found(), fleet_found("a"))):
        first, second = report_of(tmp_path / "x", [killed, other, error]).sections
        assert first.verdict == "The file does not have the watch's last line: there is no verdict."
        assert second.verdict == "The watch was ended by an error: boo"


@pytest.mark.parametrize("kind", ["{}", "[]", "[[]]", "7"])
def test_a_kind_that_is_no_text_is_refused(kind: str, tmp_path: Path) -> None:
    """By its line, and whatever it is."""
    line = json.dumps(watch_line("KIND", 1)).replace('"KIND"', kind)
    (tmp_path / "x").write_text(f"{json.dumps(found())}\n{line}\n", encoding="utf-8")
    with pytest.raises(ReportSourceError, match=r"line 2: found kind: .*; expected a text"):
        read([str(tmp_path / "x")], lambda _bytes, _name: None)


def test_a_vcpu_beyond_all_machines_is_refused(tmp_path: Path) -> None:
    """A file cannot make the page of a million vCPUs."""
    lines = [found(), step(1, 10**6, 5)]
    with pytest.raises(ReportSourceError, match="line 2: found vCPU 1000000; expected a vCPU from 0 to 4095"):
        read([written(tmp_path / "x", lines)], lambda _bytes, _name: None)


def test_a_real_watch_that_an_error_ended() -> None:
    """What `pvclock watch --json` wrote beside a QEMU whose monitor hung up: its summary has no instant."""
    file = Path(__file__).parents[1] / "reports" / "watch-error.jsonl"
    (section,) = read([str(file)], lambda _bytes, _name: None).sections
    assert section.verdict == "The watch was ended by an error: QMP events: the other end hung up"
    assert section.sentences[0] == "Watched for 4.775 s, as far as the file goes."
    assert not [sentence for sentence in section.sentences if "Passed over" in sentence]
    assert len(rows(section, "Steps, the greatest first")) == 1


def test_all_lines_of_a_real_watch_are_known() -> None:
    """What `pvclock watch --json` wrote beside a QEMU that was stopped, continued and reset."""
    file = Path(__file__).parents[1] / "reports" / "watch.jsonl"
    (section,) = read([str(file)], lambda _bytes, _name: None).sections
    kinds = {json.loads(line).get("kind") for line in file.read_text(encoding="utf-8").splitlines()}
    assert {"found", "reading", "rate", "step", "event", None} <= kinds
    assert not [sentence for sentence in section.sentences if "Passed over" in sentence]
    texts = list(chain.from_iterable(rows(section, "Steps, unknown ones and then the greatest")))
    assert "STOP, RESUME 1.002 s later" in texts
