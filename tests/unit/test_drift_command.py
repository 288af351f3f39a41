"""`pvclock drift` with simulated clocks: its arguments, what it shows and prints, and how it ends."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from pvclock.commands import main
from pvclock.commands.screen import _drawn
from pvclock.commands.tables import Table
from pvclock.errors import KvmUnavailable, StateError
from pvclock.meter import drift
from pvclock.meter.drift import DriftingClock, HostReference, take_readings
from pvclock.meter.series import Reanchor
from pvclock.readings import Reference
from qemu_glue.drift import command
from qemu_glue.drift.records import DriftRecords
from qemu_glue.drift.views import LiveView
from tests.unit.drifting_guest import DriftingGuest, clock_of

pytestmark = pytest.mark.row("E10")

BRIEF = ["drift", "--seconds", "0.2", "--interval", "0.01", "--settle", "0"]


@pytest.fixture(autouse=True)
def as_in_a_terminal() -> Iterator[None]:
    """A shell's background job ignores SIGINT, and so would its tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Clocks:
    """The engine's clock and the kernel's, simulated; `check` is called before each reading of the engine's."""

    def __init__(self) -> None:
        self.guests = {"engine": DriftingGuest(), "kernel": DriftingGuest(ppb=10**8)}
        self.check: Callable[[], object] = int

    def made(self, word: str) -> Callable[[HostReference, float, ExitStack], DriftingClock]:
        """What takes the place of engine_clock() or kernel_clock()."""
        guest = self.guests[word]

        def make(_host: HostReference, settle_s: float, _resources: ExitStack) -> DriftingClock:
            def check() -> None:
                guest.pass_s(0.05)
                if word == "engine":
                    self.check()

            ways = [Reanchor(f"{word} anew", lambda: guest.step(3))]
            return clock_of(word, guest, settle_s)._replace(check=check, ways=ways)

        return make


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    """Have the command take these."""
    made = Clocks()
    monkeypatch.setattr(command, "INTERVAL_LEAST_S", 0.01)
    for word in made.guests:
        monkeypatch.setattr(drift, f"{word}_clock", made.made(word))
    return made


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["other"], "'other' is none of engine, kernel, qemu"),
        (["engine", "engine"], "each clock once, not engine engine"),
        (["qemu"], "which guest is qemu? Give --qmp, --pid or --libvirt"),
        (["--pid", "1"], "which is none of the clocks"),
        (["engine", "--qmp", "socket"], "which is none of the clocks"),
        (["--seconds", "19"], "19 s are too short for 10 readings at either end: at least 20 s"),
        (["--interval", "0.01"], "--interval 0.01 is too short: at least 0.05 s"),
        (["--interval", "9", "--seconds", "179"], "at least 180 s"),
        (["--interval", "0.8", "--seconds", "86400"], "more than 100,000 readings; take a longer --interval"),
        (["--settle", "-1"], "'-1' is not a duration"),
        (["--reference", "tai"], "invalid choice: 'tai'"),
        (["qemu", "--pid", "x"], "'x' is not a process ID"),
        (["qemu", "--pid", "9" * 5000], "is not a process ID"),
        (["--output", "drift.png"], "'drift.png' is none of FILE.html, FILE.svg, FILE.jsonl"),
        (["--output", "not/there/drift.jsonl"], "its folder is not there"),
        (["--output", "x" * 5000 + "/drift.jsonl"], "its folder is not there"),
        (["--qmp", "a", "--pid"], "not allowed with argument"),
    ],
)
def test_what_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line, before anything is started."""
    assert main(["drift", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in shown.err
    assert shown.err.count("\n") == 1


@pytest.mark.usefixtures("clocks")
def test_the_lines_of_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The beginning, a line for each round, and what it came to; a file has the same."""
    output = tmp_path / "drift.jsonl"
    assert main([*BRIEF, "kernel", "engine", "--json", "--output", str(output)]) == 0
    text = capsys.readouterr().out
    assert output.read_text(encoding="ascii") == text
    begin, *readings, report = map(json.loads, text.splitlines())
    assert {each["schema"] for each in (begin, *readings, report)} == {"pvclock.drift/1"}
    assert begin.pop("utc").endswith("Z")
    assert begin == {
        "schema": "pvclock.drift/1",
        "kind": "begin",
        "at_s": 0.0,
        "reference": "raw",
        "interval_s": 0.01,
        "settle_s": 0.0,
        "clocks": [{"clock": "kernel", "name": "the kernel"}, {"clock": "engine", "name": "the engine"}],
    }
    assert len(readings) >= 2
    assert readings[0].keys() == {"schema", "kind", "at_s", "utc", "readings"}
    assert {each["kind"] for each in readings} == {"reading"}
    for each in readings:
        assert [reading["clock"] for reading in each["readings"]] == ["kernel", "engine"]
        keys = {"clock", "ahead_ns", "bound_ns", "step_ns", "step_bound_ns"}
        assert all(reading.keys() == keys for reading in each["readings"])
    at_s = [each["at_s"] for each in readings]
    assert at_s == sorted(at_s)
    assert at_s[-1] >= 0.2
    kernel, engine = report["result"].pop("clocks")
    assert report["result"] == {"reference": "raw", "seconds": at_s[-1], "settle_s": 0.0}
    assert kernel["rate_ppb"] == pytest.approx(-1e8 / 1.1, rel=0.01)
    assert abs(engine["rate_ppb"]) <= engine["bound_ppb"]
    assert (engine["least_step_ns"], engine["most_step_ns"]) == (0, 0)
    assert (kernel["reanchors_ns"], engine["reanchors_ns"]) == ({"kernel anew": 3}, {"engine anew": 3})
    assert (kernel["clock"], kernel["name"]) == ("kernel", "the kernel")


@pytest.mark.usefixtures("clocks")
def test_files_that_draw_it(tmp_path: Path) -> None:
    """A page of all of it and a picture of how far ahead each clock was, from the lines that a third file has."""
    files = [tmp_path / f"drift{suffix}" for suffix in (".html", ".svg", ".jsonl")]
    outputs = [argument for file in files for argument in ("--output", str(file))]
    assert main([*BRIEF, *outputs]) == 0
    page, picture, lines = (file.read_text(encoding="utf-8") for file in files)
    assert page.startswith("<!DOCTYPE html>")
    assert "engine anew" in page
    drawing = ET.fromstring(picture)  # noqa: S314  # our own
    words = "".join(drawing.itertext())
    assert all(name in words for name in ("the engine", "the kernel", "Ahead of raw"))
    assert json.loads(lines.splitlines()[-1])["ok"] is True


def test_a_step_is_in_its_reading(clocks: Clocks, capsys: pytest.CaptureFixture[str]) -> None:
    """In `step_ns` once, and in `ahead_ns` from then on; the report has the greatest."""
    rounds = iter(range(10**6))
    clocks.check = lambda: clocks.guests["engine"].step(5_000_000) if next(rounds) == 3 else None
    assert main([*BRIEF, "engine", "--json"]) == 0
    _, *readings, report = map(json.loads, capsys.readouterr().out.splitlines())
    steps = [each["readings"][0]["step_ns"] for each in readings]
    ahead = [each["readings"][0]["ahead_ns"] for each in readings]
    assert steps == [0, 0, 0, 5_000_000, *[0] * (len(steps) - 4)]
    assert all(abs(ns - 5_000_000 * (place >= 3)) <= 20 for place, ns in enumerate(ahead))
    (clock,) = report["result"]["clocks"]
    assert (clock["least_step_ns"], clock["most_step_ns"]) == (0, 5_000_000)


@pytest.mark.usefixtures("clocks")
def test_what_people_see(capsys: pytest.CaptureFixture[str]) -> None:
    """In a pipe the summary at the end: a column a clock."""
    assert main(BRIEF) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["against", "raw", "the", "engine", "the", "kernel"]
    assert [line.split("  ")[0] for line in lines[1:]] == [
        *("rate", "in a day", "steps meanwhile"),
        *("engine anew", "kernel anew"),
    ]
    assert lines[3].count("+0 ns to +0 ns, true to 1 ns") == 2
    assert lines[4].split()[2:] == lines[5].split()[2:] == ["+3", "ns"]


def test_an_interrupt_is_a_normal_end(clocks: Clocks, capsys: pytest.CaptureFixture[str]) -> None:
    """The report of what there is, without the new anchors that nobody waits for."""
    clocks.check = lambda: os.kill(os.getpid(), signal.SIGINT)
    assert main(["drift", "engine", "--json"]) == 0
    begin, reading, report = map(json.loads, capsys.readouterr().out.splitlines())
    assert (begin["settle_s"], reading["kind"]) == (20.0, "reading")
    assert report["result"]["seconds"] == 0
    (clock,) = report["result"]["clocks"]
    assert (clock["rate_ppb"], clock["bound_ppb"], clock["reanchors_ns"]) == (None, None, {})


def test_a_guest_that_ends(clocks: Clocks, capsys: pytest.CaptureFixture[str]) -> None:
    """Is an error, after what was found so far."""

    def end() -> None:
        raise StateError("read on", "the guest has ended", "start it")

    clocks.check = end
    assert main(["drift", "kernel", "engine"]) == 2
    shown = capsys.readouterr()
    assert shown.out.startswith("against raw")
    assert "not settled" in shown.out
    assert shown.err == "pvclock drift: read on: the guest has ended; start it\n"


def test_without_kvm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The error says so, as that of any command."""

    def fail(*_: object) -> DriftingClock:
        raise KvmUnavailable("/dev/kvm", 2)

    monkeypatch.setattr(drift, "engine_clock", fail)
    assert main(["drift", "engine"]) == 2
    assert "/dev/kvm" in capsys.readouterr().err


def test_a_table_that_is_redrawn() -> None:
    """In a terminal: each clock's newest reading, and how it goes on."""
    guest = DriftingGuest()
    clock = clock_of("qemu", guest)
    drawn: list[tuple[Any, ...]] = []
    view = LiveView([clock], DriftRecords([clock], "raw", 1.0, 0.0), "raw", lambda *parts: drawn.append(parts))
    clock.series.take()
    view.show(0.0)
    guest.step(2500)
    clock.series.take()
    view.show(1.5)
    tables = [_drawn(table, None) for table, _ in drawn if isinstance(table, Table)]
    assert "not settled" in tables[0]
    assert "+2.5" in tables[1].splitlines()[1]
    assert "+0 ns to +2.500 us" in tables[1]
    assert str(drawn[1][1]) == "measured for 1.500 s; Ctrl-C ends"


def test_rounds_are_an_interval_apart() -> None:
    """Until the time is over, or the wait says so; a clock that follows is corrected before each of its readings."""
    corrected: list[int] = []
    clock = clock_of("engine", DriftingGuest())
    following = clock._replace(correct=lambda: corrected.append(len(clock.series.points)))
    waited: list[float] = []

    def wait(seconds: float) -> bool:
        waited.append(seconds)
        return len(waited) == 5

    passed = list(take_readings([following], seconds=3600.0, interval_s=60.0, wait=wait))
    assert (len(passed), corrected) == (5, [0, 1, 2, 3, 4])
    assert all(60 * place - 10 < seconds <= 60 * place for place, seconds in enumerate(waited, 1))
    assert len(list(take_readings([clock], seconds=0.0, interval_s=60.0, wait=wait))) == 1


def test_a_step_of_a_correction_is_against_the_page_just_before() -> None:
    """What the clock did in the second before is no part of it."""
    guest = DriftingGuest()
    clock = clock_of("engine", guest)._replace(check=lambda: guest.step(700), correct=lambda: guest.step(1))
    list(take_readings([clock], seconds=0.0, interval_s=1.0, wait=lambda _seconds: True))
    assert clock.series.steps_ns == [1]


def test_each_reference_of_the_host() -> None:
    """Any of them can be what clocks are held against."""
    for reference in Reference:
        series = HostReference(reference).series("a guest", DriftingGuest(), 0.0)
        series.take()
        assert series.points[0].ahead_ns == 0
    assert set(command.CLOCKS) == {"engine", "kernel", "qemu"}
