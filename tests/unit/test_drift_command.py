"""`pvclock drift` with simulated clocks: its arguments, what it shows and prints, and how it ends."""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from pvclock.commands import READER_GONE, main
from pvclock.commands.screen import _drawn
from pvclock.commands.tables import Table
from pvclock.errors import KvmUnavailable, StateError, VmEnded
from pvclock.meter.drift import clocks as drift_clocks
from pvclock.meter.drift.clocks import DriftingClock, take_readings
from pvclock.meter.drift.host_reference import HostReference
from pvclock.meter.drift.readings import Reanchor
from pvclock.readings import Reference
from pvclock.state import atomic_file
from qemu_glue.drift import command
from qemu_glue.drift.plan import DriftPlan, plan_of
from qemu_glue.drift.records import DriftRecords
from qemu_glue.drift.views import LiveView
from qemu_glue.watch.interrupts import Interrupts
from qemu_glue.watch.target import Target
from tests.unit.drifting_guest import DriftingGuest, clock_of

pytestmark = pytest.mark.row("E10")

BRIEF = ["drift", "--seconds", "20", "--settle", "0"]
ROUNDS = 21
IN_LEGEND = "M1 7H35"
"""The path of a line's sample there."""


@pytest.fixture(autouse=True)
def as_in_a_terminal() -> Iterator[None]:
    """A shell's background job ignores SIGINT, and so would its tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Clocks:
    """The engine's clock and the kernel's, simulated; `check` is called before each reading of the engine's.

    now_s: the time that passes, as long as rounds are waited for.
    """

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.guests = {"engine": DriftingGuest(), "kernel": DriftingGuest(ppb=10**8)}
        self.check: Callable[[], object] = int

    def made(self, word: str) -> Callable[[HostReference, float, ExitStack], DriftingClock]:
        """What takes the place of engine_clock() or kernel_clock()."""
        guest = self.guests[word]

        def make(_host: HostReference, settle_s: float, _resources: ExitStack) -> DriftingClock:
            def check() -> None:
                guest.pass_s(1)
                if word == "engine":
                    self.check()

            ways = [Reanchor(f"{word} anew", lambda: guest.step(3))]
            return clock_of(word, guest, settle_s)._replace(check=check, ways=ways)

        return make


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    """Have the command take these."""
    made = Clocks()

    def wait(interrupts: Interrupts, seconds: float) -> bool:
        made.now_s += seconds
        return interrupts.came

    monkeypatch.setattr(Interrupts, "wait", wait)
    monkeypatch.setattr(drift_clocks, "monotonic", lambda: made.now_s)
    for word in made.guests:
        monkeypatch.setattr(drift_clocks, f"{word}_clock", made.made(word))
    return made


def outputs_to(files: Iterable[Path]) -> list[str]:
    """The arguments that have them written."""
    return [argument for file in files for argument in ("--output", str(file))]


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
        (["--output", "not/there/drift.jsonl"], "cannot be written: in its folder: No such file"),
        (["--output", "x" * 5000 + "/drift.jsonl"], "in its folder: File name too long"),
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
        "interval_s": 1.0,
        "settle_s": 0.0,
        "clocks": [{"clock": "kernel", "name": "the kernel"}, {"clock": "engine", "name": "the engine"}],
    }
    assert len(readings) == ROUNDS
    assert readings[0].keys() == {"schema", "kind", "at_s", "utc", "readings"}
    assert {each["kind"] for each in readings} == {"reading"}
    for each in readings:
        assert [reading["clock"] for reading in each["readings"]] == ["kernel", "engine"]
        keys = {"clock", "ahead_ns", "bound_ns", "step_ns", "step_bound_ns", "is_stopped"}
        assert all(reading.keys() == keys for reading in each["readings"])
    assert [each["at_s"] for each in readings] == [*range(ROUNDS)]
    kernel, engine = report["result"].pop("clocks")
    assert report["result"] == {"reference": "raw", "seconds": 20.0, "settle_s": 0.0}
    assert kernel["rate_ppb"] == pytest.approx(-1e8 / 1.1, rel=0.01)
    assert abs(engine["rate_ppb"]) <= engine["bound_ppb"]
    assert (engine["least_step_ns"], engine["most_step_ns"]) == (0, 0)
    assert (engine["steps"], engine["stepped_ns"], engine["stopped_readings"], engine["why"]) == (0, 0, 0, None)
    assert (kernel["reanchors_ns"], engine["reanchors_ns"]) == ({"kernel anew": 3}, {"engine anew": 3})
    assert (kernel["clock"], kernel["name"]) == ("kernel", "the kernel")


@pytest.mark.usefixtures("clocks")
def test_files_that_draw_it(tmp_path: Path) -> None:
    """A page of all of it and a picture of how far ahead each clock was, from the lines that a third file has."""
    files = [tmp_path / f"drift{suffix}" for suffix in (".html", ".svg", ".jsonl")]
    assert main([*BRIEF, *outputs_to(files)]) == 0
    page, picture, lines = (file.read_text(encoding="utf-8") for file in files)
    assert page.startswith("<!DOCTYPE html>")
    assert "engine anew" in page
    drawing = ET.fromstring(picture)  # noqa: S314  # our own
    words = "".join(drawing.itertext())
    assert all(name in words for name in ("engine", "kernel", "Ahead of raw"))
    assert json.loads(lines.splitlines()[-1])["ok"] is True


@pytest.mark.usefixtures("clocks")
def test_a_clock_that_looks_flat_is_drawn_closer(tmp_path: Path) -> None:
    """Beside one that goes far, and in the same colour; one alone is drawn once."""
    file = tmp_path / "drift.svg"
    engine, kernel = "line colour-0 dash-0", "line colour-1 dash-1"
    for words, titles, looks in (
        (("kernel", "engine"), ["Clock against raw", "engine, closer"], [engine, kernel, engine]),
        (("engine",), ["Clock against raw"], [engine]),
    ):
        assert main([*BRIEF, *words, "--output", str(file)]) == 0
        drawing = ET.fromstring(file.read_text(encoding="utf-8"))  # noqa: S314  # our own
        headings = ((each.text or "").removeprefix("the ") for each in drawing.iter() if each.get("class") == "heading")
        assert [*headings] == titles
        lines = [each for each in drawing.iter() if each.get("class", "").startswith("line ")]
        assert [each.get("class") for each in lines if each.get("d") != IN_LEGEND] == looks
        names = [each.get("id") for each in drawing.iter() if each.get("id")]
        assert len(set(names)) == len(names)


def test_a_guest_that_never_was_read(clocks: Clocks, tmp_path: Path) -> None:
    """Has a picture and a page without readings, as it has lines of JSON."""

    def end() -> None:
        raise VmEnded(1)

    clocks.check = end
    files = [tmp_path / f"drift{suffix}" for suffix in (".html", ".svg", ".jsonl")]
    assert main([*BRIEF, "engine", *outputs_to(files)]) == 2
    assert all(file.stat().st_size > 100 for file in files)
    assert "No readings" in files[1].read_text(encoding="utf-8")


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
    assert (clock["steps"], clock["stepped_ns"]) == (1, 5_000_000)
    assert abs(clock["rate_ppb"]) <= clock["bound_ppb"]


@pytest.mark.usefixtures("clocks")
def test_what_people_see(capsys: pytest.CaptureFixture[str]) -> None:
    """In a pipe the summary at the end: a column a clock."""
    assert main(BRIEF) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["against", "raw", "the", "engine", "the", "kernel"]
    assert [line.split("  ")[0] for line in lines[1:]] == [
        *("rate", "in a day", "steps", "each reading's step"),
        *("engine anew", "kernel anew"),
    ]
    assert lines[3].split() == ["steps", "none", "none"]
    assert lines[4].count("+0 ns to +0 ns, true to 1 ns") == 2
    assert lines[5].split()[2:] == lines[6].split()[2:] == ["+3", "ns"]


def test_an_interrupt_is_a_normal_end(clocks: Clocks, capsys: pytest.CaptureFixture[str]) -> None:
    """The report of what there is, without the new anchors that nobody waits for."""
    clocks.check = lambda: os.kill(os.getpid(), signal.SIGINT)
    assert main(["drift", "engine", "--json"]) == 0
    begin, reading, report = map(json.loads, capsys.readouterr().out.splitlines())
    assert (begin["settle_s"], reading["kind"]) == (20.0, "reading")
    assert report["result"]["seconds"] == 0
    (clock,) = report["result"]["clocks"]
    assert (clock["rate_ppb"], clock["bound_ppb"], clock["reanchors_ns"]) == (None, None, {})
    assert (clock["why"], clock["least_step_ns"], clock["steps"]) == ("not settled", None, 0)


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


def test_what_was_found_is_kept_when_a_guest_ends(
    clocks: Clocks, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A day's readings are in the files, with the error as their last line."""
    left = iter(range(16))

    def end_at_last() -> None:
        if next(left, None) is None:
            raise VmEnded(1)

    clocks.check = end_at_last
    files = [tmp_path / f"drift{suffix}" for suffix in (".html", ".svg", ".jsonl")]
    assert main([*BRIEF, "--json", *outputs_to(files)]) == 2
    page, picture, lines = (file.read_text(encoding="utf-8") for file in files)
    assert lines == capsys.readouterr().out
    begin, *readings, last = map(json.loads, lines.splitlines())
    assert (begin["kind"], len(readings), last["error"]["kind"]) == ("begin", 16, "VmEnded")
    assert "The drift was ended by an error" in page
    assert "engine" in picture


@pytest.mark.usefixtures("clocks")
def test_a_reader_that_goes_away_takes_no_file_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of the lines of JSON on standard output: the files have those that there were."""
    written: list[str] = []

    def write_some(text: str) -> None:
        written.append(text)
        if len(written) == 5:
            raise BrokenPipeError(32, "Broken pipe", "standard output")

    monkeypatch.setattr("qemu_glue.drift.views.write", write_some)
    file = tmp_path / "drift.jsonl"
    assert main([*BRIEF, "--json", "--output", str(file)]) == READER_GONE
    assert file.read_text(encoding="utf-8").splitlines(keepends=True)[:5] == written


@pytest.mark.usefixtures("clocks")
def test_each_output_is_tried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One that cannot be written takes neither the next one nor the result with it, and leaves what was there."""
    full, fine = tmp_path / "full.jsonl", tmp_path / "fine.jsonl"
    full.write_text("of yesterday\n", encoding="utf-8")
    replace = atomic_file.replace

    def replace_one(path: str, content: Iterable[bytes], mode: int | None) -> None:
        def cut_off() -> Iterator[bytes]:
            yield from content
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        replace(path, cut_off() if path == str(full) else content, mode)

    monkeypatch.setattr(atomic_file, "replace", replace_one)
    assert main([*BRIEF, "--json", *outputs_to([full, fine])]) == 2
    shown = capsys.readouterr()
    assert shown.err == f"pvclock drift: {full}: No space left on device\n"
    assert full.read_text(encoding="utf-8") == "of yesterday\n"
    assert len(fine.read_text(encoding="utf-8").splitlines()) == ROUNDS + 2
    last = json.loads(shown.out.splitlines()[-1])
    assert (last["ok"], len(last["result"]["clocks"])) == (False, 2)


@pytest.mark.parametrize("name", ["gone/drift.jsonl", "folder.jsonl", "pipe.jsonl", "to-proc.jsonl", "loop.svg"])
def test_an_output_that_cannot_be_written_is_told_at_once(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Before a day is measured: no folder, a folder, what is no file, and a folder that takes none."""
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "to-proc.jsonl").symlink_to("/proc/self/drift.jsonl")
    (tmp_path / "loop.svg").symlink_to(tmp_path / "loop.svg")
    before = sorted(tmp_path.iterdir())
    assert main(["drift", "engine", "--output", str(tmp_path / name)]) == 2
    assert f"{name}' cannot be written: " in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_a_stopped_guest(clocks: Clocks, capsys: pytest.CaptureFixture[str]) -> None:
    """Has no drift, and the summary says why."""
    clocks.guests["engine"].is_stopped = True
    assert main([*BRIEF, "engine"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("  the guest was stopped all the while")
    assert lines[5].split() == ["stopped", "all", "the", "while"]
    assert main([*BRIEF, "engine", "--json"]) == 0
    (clock,) = json.loads(capsys.readouterr().out.splitlines()[-1])["result"]["clocks"]
    assert (clock["rate_ppb"], clock["stopped_readings"]) == (None, ROUNDS)
    assert clock["why"] == "the guest was stopped all the while"


def test_without_kvm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The error says so, as that of any command."""

    def fail(*_: object) -> DriftingClock:
        raise KvmUnavailable("/dev/kvm", 2)

    monkeypatch.setattr(drift_clocks, "engine_clock", fail)
    assert main(["drift", "engine"]) == 2
    assert "/dev/kvm" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "pid"), [(["--pid"], 4711), (["--pid", "4712"], 4712)])
def test_which_process_qemu_is(words: list[str], pid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only VM here, where --pid does not say which."""
    monkeypatch.setattr("qemu_glue.watch.beginning.running_vms", lambda: [SimpleNamespace(pid=4711)])
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    arguments = parser.parse_args(["qemu", *words], argparse.Namespace(json=False))
    assert plan_of(arguments).target == Target(pid=pid)


def test_a_table_that_is_redrawn() -> None:
    """In a terminal: each clock's newest reading, and how it goes on."""
    guest = DriftingGuest()
    clock = clock_of("qemu", guest)
    drawn: list[tuple[Any, ...]] = []
    plan = DriftPlan(("qemu",), Target(pid=1), Reference.RAW, 60.0, 0.0, 1.0, (), as_json=False)
    view = LiveView(DriftRecords([clock], plan), lambda *parts: drawn.append(parts))
    clock.readings.take()
    view.show(0.0)
    guest.step(2500)
    clock.readings.take()
    view.show(1.5)
    tables = [_drawn(table, None) for table, _ in drawn if isinstance(table, Table)]
    assert "not settled" in tables[0]
    assert "+2.5" in tables[1].splitlines()[1]
    assert "1, in all +2.500 us" in tables[1]
    assert str(drawn[1][1]) == "measured for 1.500 s; Ctrl-C ends"


def test_rounds_are_an_interval_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long one took, until the time is over or the wait says so; a clock that follows is corrected first."""
    corrected: list[int] = []
    clock = clock_of("engine", DriftingGuest())
    following = clock._replace(correct=lambda: corrected.append(len(clock.readings.points)))
    waited: list[float] = []
    now_s = 0.0
    monkeypatch.setattr(drift_clocks, "monotonic", lambda: now_s)

    def wait(seconds: float) -> bool:
        nonlocal now_s
        waited.append(seconds)
        now_s += seconds
        return len(waited) == 6

    passed = []
    for passed_s in take_readings([following], seconds=3600.0, interval_s=60.0, wait=wait):
        passed.append(passed_s)
        now_s += {1: 7, 3: 100}.get(len(passed), 0)
    assert passed == [0, 60, 120, 220, 280, 340]
    assert (waited, corrected) == ([53, 60, 0, 60, 60, 60], [0, 1, 2, 3, 4, 5])
    waited.clear()
    assert list(take_readings([clock], seconds=120.0, interval_s=60.0, wait=wait)) == [0, 60, 120]


def test_a_step_of_a_correction_is_against_the_page_just_before() -> None:
    """What the clock did in the second before is no part of it."""
    guest = DriftingGuest()
    clock = clock_of("engine", guest)._replace(check=lambda: guest.step(700), correct=lambda: guest.step(1))
    list(take_readings([clock], seconds=0.0, interval_s=1.0, wait=lambda _seconds: True))
    assert clock.readings.steps_ns == [1]


def test_each_reference_of_the_host() -> None:
    """Any of them can be what clocks are held against."""
    for reference in Reference:
        readings = HostReference(reference).readings("a guest", DriftingGuest(), 0.0)
        readings.take()
        assert readings.points[0].ahead_ns == 0
    assert set(command.CLOCKS) == {"engine", "kernel", "qemu"}
