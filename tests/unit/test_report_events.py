"""What a report makes of a clock's events: its timeline against host time, its rate, marks and what is missing."""

from __future__ import annotations

import json
import math
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from pvclock.errors import ReportSourceError
from pvclock.meter.report.model import MARKS_MAX, Standing, Unit
from pvclock.quantities import NS_PER_S
from tests.unit.clocks import a_clock
from tests.unit.report_lines import HZ, event_lines, plot, rows, section_of

pytestmark = pytest.mark.row("E10")

AHEAD, RATE, KINDS = "Guest time less host time", "Rate", "Events by kind"
BEGAN = 10**12


def an_event(sequence: int, ticks: int, guest_ns: int | Fraction, **changes: object) -> dict[str, Any]:
    """An event that changes nothing, so many ticks after the log began."""
    ns = list(Fraction(guest_ns).as_integer_ratio())
    event = {"sequence": sequence, "kind": "start", "cause": "vmm", "why": "x", "policy": None, "provider": "KVM"}
    event |= {"tsc_hz": HZ, "host_tsc": BEGAN + ticks, "raw_ns": None, "real_ns": None, "jump_ns": [0, 1]}
    event |= {"guest_ns_before": ns, "guest_ns_after": ns, "rate_before": [1, 1], "rate_after": [1, 1]}
    return event | changes


def refused(lines: list[dict[str, Any]], tmp_path: Path) -> ReportSourceError:
    """The error that lines bring."""
    with pytest.raises(ReportSourceError) as caught:
        section_of(tmp_path / "x", lines)
    return caught.value


@pytest.mark.parametrize("seed", range(8))
def test_the_line_is_guest_time_less_host_time(seed: int, tmp_path: Path) -> None:
    """At each event, before and after it: exact to the float that it becomes at the end."""
    events, _ = event_lines(seed=seed)
    (line,) = plot(section_of(tmp_path / "x", events), AHEAD).lines
    wanted = []
    for event in events:
        host_ns = Fraction((event["host_tsc"] - BEGAN) * NS_PER_S, HZ)
        before, after = (Fraction(*event[f"guest_ns_{when}"]) for when in ("before", "after"))
        wanted += [(float(host_ns) / NS_PER_S, float(ns - host_ns)) for ns in dict.fromkeys((before, after))]
    assert list(line.x) == pytest.approx([x for x, _ in wanted], rel=1e-15)
    assert list(line.y) == [y for _, y in wanted]
    assert len(wanted) > len(events)


def test_the_rate_is_stepped(tmp_path: Path) -> None:
    """Each rate holds until the next event that changes it; the last one to the end."""
    clock, backend, _ = a_clock(HZ, tsc=BEGAN)
    backend.advance(ns=NS_PER_S)
    clock.dilate(3, 2)
    backend.advance(ns=NS_PER_S)
    clock.pause()
    backend.advance(ns=NS_PER_S)
    clock.resume()
    backend.advance(ns=NS_PER_S)
    clock.skip(5)
    shown = plot(section_of(tmp_path / "x", list(map(json.loads, clock.events.json_lines().splitlines()))), RATE)
    (line,) = shown.lines
    assert shown.y.unit is Unit.RATE
    assert line.is_stepped
    assert [round(x) for x in line.x] == [0, 1, 2, 3, 4]
    assert list(line.y) == [1, 1.5, 0, 1.5, 1.5]


def test_rates_near_1_are_shown_by_their_difference(tmp_path: Path) -> None:
    """In ppb, exactly, and broken while the clock was paused."""
    events = [an_event(1, 0, 0), an_event(2, HZ, NS_PER_S, kind="rate", rate_after=[10**9 - 52, 10**9])]
    guest_ns = 2 * NS_PER_S - 52
    events.append(an_event(3, 2 * HZ, guest_ns, kind="pause", rate_after=[0, 1]))
    events.append(an_event(4, 3 * HZ, guest_ns, kind="resume"))
    section = section_of(tmp_path / "x", events)
    shown = plot(section, RATE)
    assert shown.y.unit is Unit.PPB
    assert list(shown.lines[0].y[:2]) == [0, -52]
    assert math.isnan(shown.lines[0].y[2])
    assert "While it ran, its rate was -52 to +0 ppb off the nominal one." in section.sentences


def test_pauses_are_spans_and_the_rest_is_marked_by_kind(tmp_path: Path) -> None:
    """From pause to resume, with what the policy did; the discipline's rates are in the rate's own line."""
    clock, backend, _ = a_clock(HZ, tsc=BEGAN)
    backend.advance(ns=NS_PER_S)
    clock.pause()
    backend.advance(ns=NS_PER_S // 2)
    clock.resume("advance")
    clock.skip(1500)
    lines = list(map(json.loads, clock.events.json_lines().splitlines()))
    lines.append(
        {
            **lines[-1],
            "sequence": lines[-1]["sequence"] + 1,
            "kind": "rate",
            "guest_ns_before": lines[-1]["guest_ns_after"],
        }
    )
    section = section_of(tmp_path / "x", lines)
    marks = {mark.kind: mark for mark in plot(section, AHEAD).marks}
    assert set(marks) == {"start", "page", "pause", "skip"}
    assert (marks["pause"].x, marks["pause"].until) == (1, 1.5)
    assert marks["pause"].text.startswith("paused for 500.0 ms: advance")
    assert marks["skip"].text.endswith("; guest time stepped by +1.500 us")
    assert rows(section, "Missed time, by policy") == (("advance", "1", "+500.0 ms", "1.500 s", "1.500 s"),)


def test_kinds_are_counted(tmp_path: Path) -> None:
    """A row a kind, the most frequent first, with what they stepped in all."""
    events, _ = event_lines(steps=200)
    shown = {row[0]: row for row in rows(section_of(tmp_path / "x", events), KINDS)}
    counted = Counter(event["kind"].replace("_", " ") for event in events)
    assert {kind: int(row[1]) for kind, row in shown.items()} == counted
    assert shown["pause"][2] == "-"
    assert shown["skip"][2].startswith("+")


def test_an_open_pause_reaches_to_the_end(tmp_path: Path) -> None:
    """A clock that was never resumed is shown as paused."""
    events = [an_event(1, 0, 0, kind="pause", rate_after=[0, 1]), an_event(2, HZ, 0, kind="refused", rate_after=[0, 1])]
    marks = plot(section_of(tmp_path / "x", events), AHEAD).marks
    assert [(mark.kind, mark.x, mark.until) for mark in marks] == [("pause", 0, 1), ("refused", 1, None)]


# What is missing, or another numbering


def test_missing_events_break_the_line(tmp_path: Path) -> None:
    """Between their neighbours guest time is unknown; how many are missing is said."""
    events = [an_event(1, 0, 0), an_event(2, HZ, NS_PER_S), an_event(9, 2 * HZ, 5 * NS_PER_S)]
    section = section_of(tmp_path / "x", events)
    (line,) = plot(section, AHEAD).lines
    assert [math.isnan(y) for y in line.y] == [False, False, True, False]
    assert line.y[3] == 3 * NS_PER_S
    assert section.standing is Standing.OPEN
    assert "Missing between others: 6 numbers; the lines are broken there." in section.sentences


@pytest.mark.parametrize(
    ("changes", "gap_s"),
    [
        ({"host_tsc": BEGAN - HZ, "kind": "tsc_step"}, 0),
        ({"tsc_hz": HZ // 2}, 0),
        ({"guest_ns_before": [7 * NS_PER_S, 1], "guest_ns_after": [7 * NS_PER_S, 1], "kind": "restore"}, 0),
        ({"sequence": 1}, 0),
        ({"host_tsc": 5, "kind": "restore", "real_ns": 60 * NS_PER_S}, 58),
    ],
)
def test_another_numbering_of_the_tsc_breaks_the_line(changes: dict[str, Any], gap_s: int, tmp_path: Path) -> None:
    """A TSC that went back, another host, another log: host time goes on by the time of day if it is known."""
    events = [an_event(1, 0, 0), an_event(2, 2 * HZ, 2 * NS_PER_S, real_ns=2 * NS_PER_S)]
    events.append(an_event(3, 2 * HZ, 2 * NS_PER_S) | changes)
    section = section_of(tmp_path / "x", events)
    (line,) = plot(section, AHEAD).lines
    assert [math.isnan(y) for y in line.y] == [False, False, True, False]
    assert line.x[3] == 2 + gap_s
    guest_s = Fraction(*events[-1]["guest_ns_before"]) / NS_PER_S
    assert line.y[3] == (guest_s - 2 - gap_s) * NS_PER_S
    assert any("became another one 1 time" in sentence for sentence in section.sentences)


def test_a_stamp_of_another_cpu_may_be_a_little_earlier(tmp_path: Path) -> None:
    """TSCs of two CPUs may differ by some ticks: that is no other numbering, and x does not go back."""
    guest_ns = Fraction(NS_PER_S) - Fraction(3 * NS_PER_S, HZ)
    events = [an_event(1, 0, 0), an_event(2, HZ, NS_PER_S), an_event(3, HZ - 3, guest_ns)]
    section = section_of(tmp_path / "x", events)
    (line,) = plot(section, AHEAD).lines
    assert list(line.y) == [0, 0, 0]
    assert list(line.x) == [0, 1, 1]
    assert section.standing is Standing.GOOD


def test_events_without_a_place_are_counted(tmp_path: Path) -> None:
    """An event without a host TSC stands where the one before it does."""
    events = [an_event(1, 0, 0), an_event(2, HZ, NS_PER_S), an_event(3, 0, NS_PER_S, host_tsc=None, kind="crash")]
    section = section_of(tmp_path / "x", events)
    assert section.verdict == "There was trouble: crash."
    assert section.standing is Standing.BAD
    assert "Without a host TSC: 1 event, shown where the event before stands." in section.sentences
    assert plot(section, AHEAD).marks[-1].x == 1


def test_guest_time_that_went_back_is_bad(tmp_path: Path) -> None:
    """Whatever else there was."""
    event = an_event(2, HZ, NS_PER_S, kind="offset", guest_ns_after=[NS_PER_S - 1500, 1], jump_ns=[-1500, 1])
    section = section_of(tmp_path / "x", [an_event(1, 0, 0), event])
    assert section.verdict == "Guest time went back, by up to 1.500 us."
    assert section.standing is Standing.BAD


@pytest.mark.parametrize(
    "changes",
    [
        {"guest_ns_after": [-3 * NS_PER_S, 1], "kind": "warp"},
        {"guest_ns_before": [-3 * NS_PER_S, 1], "guest_ns_after": [-3 * NS_PER_S, 1]},
        {"guest_ns_before": [-3 * NS_PER_S, 1], "guest_ns_after": [-3 * NS_PER_S, 1], "sequence": 7},
        {"guest_ns_before": [-3 * NS_PER_S, 1], "guest_ns_after": [-3 * NS_PER_S, 1], "tsc_hz": HZ - 1},
        {"guest_ns_before": [-3 * NS_PER_S, 1], "guest_ns_after": [-3 * NS_PER_S, 1], "host_tsc": BEGAN - 3 * HZ},
    ],
)
def test_a_fall_of_guest_time_is_bad_wherever_it_is(changes: dict[str, Any], tmp_path: Path) -> None:
    """In an event of an unknown kind, between two, where some are missing, and where the TSC became another one."""
    event = an_event(2, 0, 0) | changes
    section = section_of(tmp_path / "x", [an_event(1, 0, 0), event])
    assert section.verdict == "Guest time went back, by up to 3.000 s."
    assert section.standing is Standing.BAD
    (mark,) = [mark for mark in plot(section, AHEAD).marks if mark.standing is Standing.BAD]
    assert (mark.kind, mark.text) == ("went back", "guest time went back by 3.000 s")


@pytest.mark.parametrize("changes", [{"kind": "restore"}, {"sequence": 1}])
def test_another_guest_time_may_be_an_earlier_one(changes: dict[str, Any], tmp_path: Path) -> None:
    """A clock that was restored, and another log, owe nothing to the guest time of before."""
    events = [an_event(1, 0, 5 * NS_PER_S), an_event(2, HZ, NS_PER_S) | changes]
    assert section_of(tmp_path / "x", events).standing is Standing.GOOD


def test_without_a_place_nothing_is_sure(tmp_path: Path) -> None:
    """Guest time cannot be compared with that of an event of which nobody knows when it was."""
    events = [an_event(1, 0, 5 * NS_PER_S), an_event(2, HZ, NS_PER_S, host_tsc=None)]
    section = section_of(tmp_path / "x", events)
    assert section.verdict == "Guest time never went back, as far as is known: 1 event without a host TSC."
    assert section.standing is Standing.OPEN


@pytest.mark.parametrize(
    ("changes", "line", "found"),
    [
        ({"sequence": "7"}, 2, "sequence: '7'"),
        ({"host_tsc": 1.5}, 2, "host_tsc: 1.5"),
        ({"why": None}, 2, "why: null"),
        ({"kind": ["x"]}, 2, "kind: a list of 1"),
        ({"guest_ns_after": [1, 0]}, 2, "an object that is no event"),
        ({"guest_ns_after": 1.0}, 2, "an object that is no event"),
        ({"rate_after": [10**400, 1]}, 2, "an object that is no event"),
        ({"guest_ns_after": [10**400, 1]}, 2, "an object that is no event"),
        ({"host_tsc": -1}, 2, "an object that is no event"),
        ({"tsc_hz": 0}, 2, "an object that is no event"),
    ],
)
def test_a_line_that_is_no_event_is_named(changes: dict[str, Any], line: int, found: str, tmp_path: Path) -> None:
    """By its number, and by the field that is wrong."""
    error = refused([an_event(1, 0, 0), an_event(2, HZ, NS_PER_S) | changes], tmp_path)
    assert error.line == line
    assert error.found.startswith(found)


def test_a_field_that_is_missing_is_named(tmp_path: Path) -> None:
    """A line of another kind in a log is an error."""
    event = an_event(2, 1, 1)
    del event["why"]
    assert refused([an_event(1, 0, 0), event], tmp_path).found == "why: nothing"


def test_events_of_unknown_kinds_are_passed_over(tmp_path: Path) -> None:
    """A newer engine may have more; the timeline goes through them."""
    events = [an_event(1, 0, 0), an_event(2, HZ, NS_PER_S, kind="warp"), an_event(3, 2 * HZ, 2 * NS_PER_S)]
    section = section_of(tmp_path / "x", events)
    assert "Passed over: 1 event of kinds that this pvclock does not know." in section.sentences
    assert len(plot(section, AHEAD).lines[0].x) == 3
    assert section.standing is Standing.GOOD


def test_names_do_not_fill_memory(tmp_path: Path) -> None:
    """Of thousands of policies, providers and marks few are kept, and all are counted."""
    events = [
        an_event(n, n * HZ, n * NS_PER_S, kind="skip", policy=f"policy {n}", provider=f"provider {n}")
        for n in range(1, 3001)
    ]
    section = section_of(tmp_path / "x", events)
    policies = rows(section, "Missed time, by policy")
    assert len(policies) <= 65
    assert sum(int(row[1].replace(",", "")) for row in policies) == 3000
    marks = plot(section, AHEAD).marks
    assert len(marks) <= MARKS_MAX
    assert sum(mark.stands_for for mark in marks) == 3000
