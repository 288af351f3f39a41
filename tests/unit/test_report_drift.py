"""What a report makes of a drift: each clock against the reference, its rate, its steps, and new anchors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from pvclock.errors import ReportSourceError
from pvclock.meter.report.model import Interval, Intervals, Plot, Standing
from pvclock.meter.report.sources import read
from tests.unit.report_lines import drift_begin, drift_reading, drift_result, of_kind, plot, report_of, rows, section_of

pytestmark = pytest.mark.row("E10")

READINGS = [drift_reading(at_s, {"engine": 0.5 * (at_s % 3), "kernel": -52.0 * at_s}) for at_s in range(12)]
DRIFT = [drift_begin(), *READINGS, drift_result()]


def error_of(lines: list[dict[str, Any]], tmp_path: Path) -> ReportSourceError:
    """The error that lines bring."""
    with pytest.raises(ReportSourceError) as caught:
        section_of(tmp_path / "x", lines)
    return caught.value


def test_each_clock_is_a_line_with_its_bounds(tmp_path: Path) -> None:
    """By the names that the drift gave them, over its seconds; what settles is marked."""
    section = section_of(tmp_path / "x", DRIFT)
    shown = plot(section, "Clock against raw")
    engine, kernel = shown.lines
    assert (engine.name, kernel.name) == ("engine", "kernel")
    assert list(kernel.y) == [-52.0 * at_s for at_s in range(12)]
    assert list(kernel.low) == [-52.0 * at_s - 20 for at_s in range(12)]
    assert [(mark.kind, mark.x, mark.until) for mark in shown.marks] == [("settling", 0, 2)]
    assert section.title == "Drift of engine and kernel"


@pytest.mark.parametrize(
    ("words", "title"),
    [(["kernel"], "kernel"), (["engine", "kernel", "qemu"], "engine, kernel and QEMU")],
)
def test_the_title_has_the_clocks(words: list[str], title: str, tmp_path: Path) -> None:
    """One, or several, by their short names."""
    clocks = [{"clock": word, "name": word} for word in words]
    assert section_of(tmp_path / "x", [drift_begin(clocks=clocks)]).title == f"Drift of {title}"


def test_the_result_is_told_and_drawn_with_its_bounds(tmp_path: Path) -> None:
    """Rates as intervals and in words; the least and greatest step, and those at new anchors, in tables."""
    section = section_of(tmp_path / "x", DRIFT)
    assert section.verdict == ("Against raw: engine +0.2 ppb, within 0.5; kernel -52.0 ppb, within 0.5.")
    rates = of_kind(section, Intervals, "Rate against raw")
    assert rates.rows == (Interval("engine", -0.25, 0.75, 0.25), Interval("kernel", -52.5, -51.5, -52.0))
    assert rows(section, "The clocks")[1] == ("kernel", "kernel kvmclock", "-52.0 ppb, within 0.5", "-1 ns", "+1 ns")
    assert rows(section, "Steps at a new anchor") == (
        ("MSR written again", "+1 ns", "-1.400 us"),
        ("KVM_SET_CLOCK", "-", "+12 ns"),
    )


def test_steps_between_readings_are_a_plot(tmp_path: Path) -> None:
    """With their bounds; a step is no noise of the clock, and is taken out where it hides all else."""
    later = [
        drift_reading(at_s, {"kernel": -52.0 * at_s + 10**6}, 10**6 if at_s == 12 else 0) for at_s in range(12, 24)
    ]
    section = section_of(tmp_path / "x", [drift_begin(), *READINGS, *later])
    steps = {line.name: line for line in plot(section, "Steps between readings").lines}
    assert max(steps["kernel"].y) == 10**6
    assert max(steps["kernel"].high) == 10**6 + 2
    stepless = {line.name: line for line in plot(section, "Clock against raw, without its steps").lines}
    assert list(stepless["kernel"].y) == [-52.0 * at_s for at_s in range(24)]


def test_a_step_that_is_sure_is_marked_and_said(tmp_path: Path) -> None:
    """Those that are more than their bound; one from before the clocks settled is marked and does not count."""
    lines = [drift_begin(), *(drift_reading(at_s, {"kernel": -52.0 * at_s}) for at_s in range(12))]
    for at_s, step_ns in ((1, -7), (4, 2), (6, -66), (8, 3)):
        lines[at_s + 1] = drift_reading(at_s, {"kernel": 0.0}, step_ns)
    section = section_of(tmp_path / "x", lines)
    marks = [mark for mark in plot(section, "Clock against raw").marks if mark.kind == "step"]
    assert [(mark.x, mark.text) for mark in marks] == [
        (1, "kernel stepped by -7 ns; not counted, for the clocks settled"),
        (6, "kernel stepped by -66 ns"),
        (8, "kernel stepped by +3 ns"),
    ]
    assert section.sentences[1:] == ("kernel: 2 steps, the greatest -66 ns.",)


def test_without_a_step_that_is_said(tmp_path: Path) -> None:
    """If any is known."""
    said = "No clock stepped by more than the bound of its step."
    assert said in section_of(tmp_path / "x", DRIFT).sentences
    assert said not in section_of(tmp_path / "x", [drift_begin(), *READINGS[:2]]).sentences


def test_steps_are_no_noise(tmp_path: Path) -> None:
    """The Allan deviation is that of the clock without its steps: a pause of a minute does not show in it."""
    lines = [drift_begin(settle_s=0)]
    lines += [
        drift_reading(at_s, {"kernel": at_s % 3 - 66e9 * (at_s >= 20)}, -66e9 if at_s == 20 else 0)
        for at_s in range(60)
    ]
    kernel, _ = plot(section_of(tmp_path / "x", lines), "Allan deviation").lines
    assert max(kernel.y) < 3


def test_a_rate_that_is_unknown_is_told_with_the_reason(tmp_path: Path) -> None:
    """If that of no clock is known, nothing is decided."""
    why = "the reference was set meanwhile, by +3.600 s"
    unknown = {"clock": "qemu", "name": "qemu-system-x86, process 18504, 2 vCPUs", "rate_ppb": None, "bound_ppb": None}
    unknown |= {"why": why, "least_step_ns": None, "most_step_ns": None}
    known = drift_result()["result"]["clocks"][0]
    begin = drift_begin(clocks=[{key: clock[key] for key in ("clock", "name")} for clock in (known, unknown)])
    section = section_of(tmp_path / "x", [begin, drift_result(clocks=[known, unknown])])
    assert section.title == "Drift of engine and QEMU 18504"
    assert section.verdict == f"Against raw: engine +0.2 ppb, within 0.5; QEMU 18504 unknown: {why}."
    assert section.standing is Standing.PLAIN
    told = rows(section, "The clocks")[1]
    assert told == ("QEMU 18504", unknown["name"], f"unknown: {why}", "-", "-")
    assert [row.name for row in of_kind(section, Intervals, "Rate against raw").rows] == ["engine"]
    section = section_of(tmp_path / "x", [begin, drift_result(clocks=[unknown])])
    assert section.standing is Standing.OPEN


def test_the_allan_deviation_is_of_settled_readings(tmp_path: Path) -> None:
    """What a clock does while it settles does not count."""
    wild = [drift_reading(at_s, {"engine": 1e9 * at_s**2, "kernel": 0.0}) for at_s in range(2)]
    after = [drift_reading(at_s, {"engine": at_s % 3, "kernel": 0.0}) for at_s in range(2, 30)]
    section = section_of(tmp_path / "x", [drift_begin(), *wild, *after, drift_result()])
    engine, floor = plot(section, "Allan deviation").lines
    assert engine.name == "engine"
    assert max(engine.y) < 3
    assert list(floor.x) == [1, 2, 4, 8]
    assert list(floor.y) == [20, 10, 5, 2.5]


def test_a_reading_that_is_missing_breaks_the_line(tmp_path: Path) -> None:
    """A guest that could not be read has nan."""
    lines = [*DRIFT[:3], drift_reading(2, {"engine": None, "kernel": 1.0}), *DRIFT[4:]]
    engine, kernel = plot(section_of(tmp_path / "x", lines), "Clock against raw").lines
    assert [math.isnan(y) for y in engine.y[:4]] == [False, False, True, False]
    assert not any(map(math.isnan, kernel.y))


def test_without_a_result_there_is_none(tmp_path: Path) -> None:
    """A drift that was killed is drawn to there."""
    section = section_of(tmp_path / "x", DRIFT[:6])
    assert section.standing is Standing.OPEN
    assert [part.title for part in section.parts if isinstance(part, Plot)] == [
        "Clock against raw",
        "Steps between readings",
    ]
    assert section.sentences[0] == "5 readings, one in 1 s, in 4.000 s, of which the first 2 s do not count."


def test_appended_drifts_are_sections_of_their_own(tmp_path: Path) -> None:
    """`>>` puts one behind the other."""
    assert len(report_of(tmp_path / "x", [*DRIFT, *DRIFT]).sections) == 2


def test_a_drift_that_failed_hides_no_other(tmp_path: Path) -> None:
    """Of `drift --json >>file`, whichever failed, each is a section of its own; one that an error ended is one."""
    failed = {"schema": "pvclock.drift/1", "version": "0.1.0", "ok": False, "error": {"kind": "x", "message": "no KVM"}}
    sections = report_of(tmp_path / "x", [failed, *DRIFT, failed, failed, *DRIFT[:9], failed]).sections
    could_not = "pvclock drift could not do its work: no KVM"
    rates = "Against raw: engine +0.2 ppb, within 0.5; kernel -52.0 ppb, within 0.5."
    assert [section.verdict for section in sections] == [
        could_not,
        rates,
        could_not,
        could_not,
        "The drift was ended by an error: no KVM",
    ]


@pytest.mark.parametrize(
    ("lines", "line", "found"),
    [
        ([drift_begin()] * 1001, 1001, "more than 1000 drifts"),
        (READINGS, 1, "a line before a drift began"),
        ([drift_begin(clocks=[])], 1, "0 clocks"),
        ([drift_begin(interval_s=0)], 1, "an interval of 0 s"),
        ([drift_begin(), drift_reading(0, {"third": 0})], 2, "a reading of clock third"),
        ([drift_begin(), {**READINGS[0], "schema": "pvclock.watch/1"}], 2, "schema 'pvclock.watch/1'"),
        ([drift_begin(), {**READINGS[0], "at_s": "1"}], 2, "at_s: '1'"),
    ],
)
def test_what_is_wrong_is_named(lines: list[dict[str, Any]], line: int, found: str, tmp_path: Path) -> None:
    """The line, and what stands there."""
    error = error_of(lines, tmp_path)
    assert error.line == line
    assert error.found.startswith(found)


def test_all_lines_of_a_real_drift_are_known() -> None:
    """What `pvclock drift --json` wrote on a host: the engine's clock stays with raw, the kernel's does not."""
    file = Path(__file__).parents[1] / "reports" / "drift.jsonl"
    (section,) = read([str(file)], lambda _bytes, _name: None).sections
    assert not [sentence for sentence in section.sentences if "Passed over" in sentence]
    engine, kernel = plot(section, "Clock against raw").lines
    assert max(map(abs, engine.y)) < 100
    assert kernel.y[-1] < -1000
    assert len(rows(section, "Steps at a new anchor")) == 7
