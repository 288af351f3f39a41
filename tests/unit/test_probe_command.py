"""`pvclock probe` and `pvclock doctor --guest`: what they write, run, refuse and show; their JSON and exit statuses."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import stat
import subprocess
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from pvclock.commands import main
from pvclock.commands.doctor_guest import doctor_rerun
from pvclock.commands.guest_next import Options
from pvclock.commands.probe_files import CONSOLE_BYTES_MAX
from pvclock.commands.probe_process import run_probe
from pvclock.errors import ProbeNotRun
from pvclock.host.vmm_process import RunningVm
from pvclock.meter.inside import parse_record
from pvclock.probe import bootable_image, linux_executable
from tests.command_line import run_pvclock
from tests.unit.inside_records import a_clock, a_kernel
from tests.unit.probe_lines import CLEAN, FAULTY, KVM_LEAVES, clock, document, faulty_document, line, one_cpu_document

pytestmark = pytest.mark.row("E18")

SHELL = Path("/bin/sh").read_bytes()
"""Stands for the probe where it has to misbehave."""

FALSE_FREQUENCY = [0x15, 0, 1, 84, 25_000_000, 0]
WITH_FALSE_FREQUENCY = line(
    faulty_document() | {"cpuid": [*KVM_LEAVES, FALSE_FREQUENCY], "kernel": a_kernel(clocksource="acpi_pm")}
)
"""A fault that no budget decides, beside one that --max-warp does: CPUID says 2.1 GHz."""

ADDED = faulty_document() | {"added_ns": [0, -1_200_000]}
UNDECIDED = "Undecided whether this guest's clock is right:"

FOUR_CPUS = [{"cpu": cpu, "apic_id": cpu} for cpu in range(4)]
FOUR_CLOCKS = [a_clock("tsc"), clock("pvclock", 10**9, pairs=[])]
LONGEST_S = 30
"""The longest run that has to end a round on a busy machine."""

Console = Callable[[str], str]


@pytest.fixture
def console(tmp_path: Path) -> Console:
    """Writes a console's capture, and gives its name."""

    def write(text: str) -> str:
        file = tmp_path / "console.log"
        file.write_text(text)
        return str(file)

    return write


def judged(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit status of `probe --judge` and its JSON."""
    status = main(["probe", "--json", "--judge", *arguments])
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return status, told


# What is written


@pytest.mark.parametrize(
    ("options", "program", "mode"), [([], bootable_image, 0o644), (["--linux"], linux_executable, 0o755)]
)
def test_what_is_written(
    options: list[str], program: Callable[[], bytes], mode: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--output writes the image, or with --linux the executable, over what was there, and says what next."""
    file = tmp_path / "probe"
    file.write_bytes(b"older, and private")
    file.chmod(0o600)
    assert main(["probe", "--output", str(file), *options]) == 0
    assert file.read_bytes() == program()
    assert stat.S_IMODE(file.stat().st_mode) == mode
    assert [each.name for each in tmp_path.iterdir()] == ["probe"]
    shown = capsys.readouterr().out
    assert "pvclock probe --judge -" in shown
    assert ("qemu-system-x86_64" in shown) == (not options)


def test_what_was_written_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The JSON of --output names the file, its form and its size."""
    file = tmp_path / "a probe"
    assert main(["probe", "--json", "--linux", "--output", str(file)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["schema"] == "pvclock.probe/1"
    result = told["result"]
    assert (result["file"], result["form"], result["size_bytes"]) == (str(file), "linux", file.stat().st_size)
    assert f"'{file}'" in result["next"][0]["command"]


# How it is judged


@pytest.mark.parametrize(
    ("text", "budgets", "status", "word"),
    [
        (CLEAN, [], 0, "passed"),
        (FAULTY, [], 1, "broken"),
        (CLEAN, ["--max-warp", "200ns"], 0, "passed"),
        (CLEAN, ["--max-warp", "10ns"], 2, "undecided"),
        (FAULTY, ["--max-warp", "200ns"], 1, "broken"),
        (FAULTY, ["--max-warp", "2ms"], 0, "passed"),
        (CLEAN, ["--max-step", "1us"], 0, "passed"),
        (CLEAN, ["--max-step", "1ns"], 2, "undecided"),
        (CLEAN, ["--max-drift", "0.001ppb"], 2, "undecided"),
    ],
)
def test_exit_statuses(
    text: str, budgets: list[str], status: int, word: str, console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    """0: right, as far as can be told, or within its budgets; 1: proven wrong; 2: finer than the measurement."""
    found, told = judged(capsys, console(text), *budgets)
    assert (found, told["ok"], told["result"]["status"]) == (status, status == 0, word)


def test_the_verdict_comes_first(console: Console, capsys: pytest.CaptureFixture[str]) -> None:
    """The first line is the verdict; what is wrong, what software sees and what to change follow, then the tables."""
    assert main(["probe", "--judge", console(FAULTY)]) == 1
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("This guest's clock is wrong: CPU 0's CLOCK_MONOTONIC is 1.1999")
    labels = ["what is wrong", "software sees", "what to change", "clock ", "promise", "Type next:"]
    places = [next(at for at, each in enumerate(rest) if each.startswith(label)) for label in labels]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("text", "budgets", "first"),
    [
        (FAULTY, ["--max-warp", "200ns"], "This guest's clock breaks a budget: "),
        (FAULTY, ["--max-warp", "2ms"], "This guest's clock keeps the budgets given; "),
        (WITH_FALSE_FREQUENCY, ["--max-warp", "2ms"], "This guest's clock is wrong: CPUID 0x15 says "),
        (CLEAN, ["--max-warp", "10ns"], f"{UNDECIDED} TSC: CPUs 0 and 1 may be "),
        (line(ADDED), [], "With the fault that --add put in, this guest's clock is wrong: CPU 0's CLOCK_MONOTONIC"),
        (line(ADDED), ["--max-warp", "2ms"], "With the fault that --add put in, this guest's clock keeps"),
        (line(ADDED), ["--max-warp", "1ms"], "With the fault that --add put in, this guest's clock breaks a budget"),
        (line(document(added_ns=[0, 5])), [], "With the fault that --add put in, nothing is wrong"),
        (line(document(added_ns=[0, 5])), ["--max-warp", "1ns"], "With the fault that --add put in, undecided"),
        (line(one_cpu_document()), ["--max-warp", "200ns"], f"{UNDECIDED} only CPU 0 was measured, "),
    ],
)
def test_first_lines(
    text: str, budgets: list[str], first: str, console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first line says which kind of verdict it is, and names what decides it."""
    main(["probe", "--judge", console(text), *budgets])
    assert capsys.readouterr().out.startswith(first)


def test_the_first_line_has_the_fault(console: Console, capsys: pytest.CaptureFixture[str]) -> None:
    """A frequency's headline ends with by how much it is off; one CPU alone is told with any verdict."""
    main(["probe", "--judge", console(WITH_FALSE_FREQUENCY), "--max-warp", "2ms"])
    assert re.search(r"which is off by -27\.59 to -27\.58 %", capsys.readouterr().out.splitlines()[0])
    assert main(["probe", "--judge", console(line(one_cpu_document()))]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("no CPUs were compared; only CPU 0 was measured.")
    one_of_two = line({**one_cpu_document(), "cpus_present": 2})
    assert main(["probe", "--judge", console(one_of_two)]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("no CPUs were compared; 1 of 2 CPUs was measured.")


def test_a_clean_verdict_is_short(console: Console, capsys: pytest.CaptureFixture[str]) -> None:
    """Who finds nothing wrong reads a dozen lines; what no clock goes by is in --json."""
    assert main(["probe", "--judge", console(CLEAN)]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 13
    assert "CLOCKSOURCE2" not in shown
    assert "CLOCKSOURCE2" in judged(capsys, console(CLEAN))[1]["result"]["promises"]["kvm_features"]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, "nothing independent here"),
        ({"kernel": a_kernel(clocksource="tsc-early")}, "nothing independent here"),
        ({"kernel": a_kernel(clocksource="acpi_pm")}, "-27.5"),
        ({"kernel": None, "form": "bare"}, "nothing independent here"),
    ],
)
def test_a_frequency_is_held_against_what_does_not_go_by_it(
    changes: dict[str, object], found: str, console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    """CLOCK_MONOTONIC_RAW goes by a frequency that the guest is told, unless the kernel counts another oscillator."""
    clocks = [*document()["clocks"], clock("monotonic_raw", 10**9, pairs=[])]
    text = line(document(cpuid=[*KVM_LEAVES, FALSE_FREQUENCY], clocks=clocks, **changes))
    main(["probe", "--judge", console(text)])
    (row,) = [each for each in capsys.readouterr().out.splitlines() if each.startswith("TSC frequency by CPUID 0x15")]
    assert found in row


# What to type next


@pytest.mark.parametrize(
    ("text", "budgets", "commands"),
    [
        (CLEAN, ["--max-warp", "10ns"], ["--seconds 60 | pvclock probe --judge - --max-warp 10ns"]),
        (CLEAN, ["--max-step", "1ns"], ["--seconds 10 | pvclock probe --judge - --max-step 1ns"]),
        (CLEAN, ["--max-drift", "0.1ppb"], [" | pvclock probe --judge - --max-drift 0.1ppb"]),
        (line(one_cpu_document()), ["--max-warp", "0.2us"], ["| pvclock probe --judge - --max-warp 200ns"]),
        (
            line(document(form="bare")),
            ["--max-warp", "1.5ns"],
            ["seconds=60 | pvclock probe --judge - --max-warp 1.5ns"],
        ),
        (line(ADDED), ["--max-step", "1ms"], ["--seconds 10 | pvclock probe --judge - --max-step 1ms"]),
    ],
)
def test_what_to_type_next_is_a_command(
    text: str, budgets: list[str], commands: list[str], console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is chosen by what is open, has the budgets again, and can be typed; a longer run finds no smaller step."""
    _, told = judged(capsys, console(text), *budgets)
    typed = [each["command"] for each in told["result"]["next"] if "watch" not in each["command"]]
    assert all(each.endswith(command) for each, command in zip(typed, commands, strict=True))
    for each in typed:
        assert each.startswith("pvclock probe ")
        subprocess.run(["sh", "-n", "-c", each], check=True)


@pytest.mark.parametrize(("milliseconds", "seconds"), [(0, "0.1"), (10**9, "86400")])
def test_a_probe_is_asked_for_no_time_that_it_refuses(
    milliseconds: int, seconds: str, console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line may hold any length of a run; what is typed next may not."""
    text = line(document(milliseconds=milliseconds))
    _, told = judged(capsys, console(text), "--max-step", "1ns")
    assert f"./probe --seconds {seconds} |" in told["result"]["next"][0]["command"]


def test_an_image_is_booted_with_as_many_cpus(console: Console, capsys: pytest.CaptureFixture[str]) -> None:
    """Two at least, for one has none to be compared with."""
    for text, cpus in ((document(form="bare"), 2), (document(form="bare", cpus=FOUR_CPUS, clocks=FOUR_CLOCKS), 4)):
        _, told = judged(capsys, console(line(text)), "--max-step", "1ns")
        assert f" -smp {cpus} " in told["result"]["next"][0]["command"]


def test_the_options_are_typed_again() -> None:
    """What doctor suggests has the user's own options, and keeps a fault that it has found."""
    budgets = (Fraction(200), None, Fraction(1, 10))
    options = Options(2.5, (0, 1), ((1, 500),), budgets)
    rerun = doctor_rerun(options, None)
    base = "pvclock doctor --guest --seconds 2.5 --cpus 0,1 --add 1:500 --max-warp 200ns --max-drift 0.1ppb"
    assert rerun.command(options) == base
    assert rerun.of_a_fault is not None
    assert rerun.of_a_fault.command == f"{base} --save guest-clock.json"
    saved = doctor_rerun(options, "a clock.json").of_a_fault
    assert saved is not None
    assert saved.command == "pvclock probe --judge 'a clock.json' --max-warp 200ns --max-drift 0.1ppb"


def test_a_fault_that_was_put_in_is_for_nobody(console: Console, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is to be changed, and nobody is sent to the host's people."""
    assert main(["probe", "--judge", console(line(ADDED))]) == 1
    shown = capsys.readouterr().out
    assert "what to change" not in shown
    assert "pvclock watch" not in shown
    assert "the fault was found; without --add it measures this guest's own clock" in shown


def test_the_tables_say_which_cpu_is_behind(console: Console, capsys: pytest.CaptureFixture[str]) -> None:
    """The table of clocks has the window and the CPUs by their sign, and the largest warp with who read less."""
    assert main(["probe", "--judge", console(FAULTY)]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"tsc +CPU 1 minus CPU 0: -60 ns to \+64\.9 ns", shown)
    assert "CPU 1 minus CPU 0: -1.20007 ms to -1.19993 ms" in shown
    assert "5,000 times, by up to 1.199 ms: CPU 1 after CPU 0" in shown


def test_a_bound_is_one_number(console: Console, capsys: pytest.CaptureFixture[str]) -> None:
    """The first line, what software sees and the table round it alike; the guest's own way out comes last."""
    assert main(["probe", "--judge", console(FAULTY)]) == 1
    first, *rest = capsys.readouterr().out.splitlines()
    told = [first, *(each for each in rest if each.startswith(("software sees", "monotonic ")))]
    assert all("1.20007 ms" in each for each in told)
    changes = [each for each in rest if each.startswith("what to change")]
    assert [each for each in changes if "guest, until then" in each] == changes[-1:]


def test_remedies_are_told_once(console: Console, capsys: pytest.CaptureFixture[str]) -> None:
    """Faults of one cause have one remedy: each stands in one line, and what software sees of them, too."""
    assert main(["probe", "--judge", console(FAULTY)]) == 1
    lines = capsys.readouterr().out.splitlines()
    for label in ("what to change", "what is wrong", "software sees"):
        told = [each for each in lines if each.startswith(label)]
        assert len(told) > 1
        assert len(set(told)) == len(told)


def test_a_clean_verdict_says_its_floor(console: Console, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is called clean below the floor: the first line has it."""
    assert main(["probe", "--judge", console(CLEAN)]) == 0
    assert re.search(r"apart by less than 6\d", capsys.readouterr().out.splitlines()[0])


def test_a_row_is_a_line_in_a_pipe(console: Console) -> None:
    """In a pipe nothing is drawn or wrapped, whatever COLUMNS is: each finding's sentence stands in one line."""
    file = console(FAULTY)
    shown = run_pvclock("probe", "--judge", file, COLUMNS="40")
    told = json.loads(run_pvclock("probe", "--json", "--judge", file).stdout)
    assert shown.status == 1
    lines = shown.stdout.splitlines()
    for finding in told["result"]["findings"]:
        assert any(finding["what"] in each for each in lines)
    assert not set("┃│━┏┓") & set(shown.stdout)


def test_the_numbers_of_a_verdict(console: Console, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON has findings with bounds, each clock in numbers, promises, and what to type next."""
    _, told = judged(capsys, console(FAULTY))
    result = told["result"]
    fault = next(each for each in result["findings"] if each["weight"] == "fault")
    assert fault["clock"] == "monotonic"
    assert fault["low_ns"] <= 1_200_000 <= fault["high_ns"]
    assert fault["change"]
    tsc, monotonic, _raw = result["clocks"]
    assert tsc["apart_cpus"] == [0, 1]
    assert (tsc["apart_low_ns"], tsc["apart_high_ns"]) == pytest.approx((-60, 65), abs=1)
    assert tsc["rate_low_ppb"] is None
    assert monotonic["rate_low_ppb"] <= 0 <= monotonic["rate_high_ppb"]
    assert (monotonic["largest_warp_cpus"], monotonic["largest_warp_ns"]) == ([0, 1], 1_199_950)
    assert result["promises"]["hypervisor"] == "KVM"
    assert result["next"][0]["command"].startswith("pvclock ")


def test_a_machine_that_is_no_guest(console: Console, capsys: pytest.CaptureFixture[str]) -> None:
    """Where CPUID shows no hypervisor nobody is sent to its host."""
    assert main(["probe", "--judge", console(line(document(cpuid=[[1, 0, 0x50654, 0x20800, 0x01202000, 0]])))]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Nothing is wrong with this machine's clock")
    assert "pvclock watch" not in shown


def test_standard_input_is_judged(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`--judge -` takes what a pipe brings, a console's other lines around it."""
    text = f"SeaBIOS\r\n\x1b[2J{FAULTY}\r\nReboot\r\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert main(["probe", "--judge", "-"]) == 1
    assert "CLOCK_MONOTONIC" in capsys.readouterr().out


# What is refused


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "one of the arguments --output --judge is required"),
        (["--output", "a", "--judge", "b"], "not allowed with"),
        (["--output", "-"], "name of a file"),
        (["--output", "x", "--max-warp", "1us"], "--max-warp goes with --judge"),
        (["--judge", "x", "--linux"], "--linux goes with --output"),
        (["--judge", "x", "--max-warp", "1"], "'1' is not a length of time"),
        (["--judge", "x", "--max-drift", "1us"], "'1us' is not a rate"),
        (["--output", "/nonexistent/probe"], "/nonexistent/probe: No such file or directory"),
        (["--output", "/proc"], "/proc: a directory"),
        (["--judge", "/nonexistent"], "/nonexistent: No such file or directory"),
        (["--judge", "/proc"], "/proc: a directory"),
        (["--judge", "/dev/zero"], "/dev/zero: a character device"),
    ],
)
def test_what_probe_refuses(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be is told in one line, and the exit status is 2."""
    assert main(["probe", *arguments]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert said in told


def test_a_file_of_any_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a file without an end no more is read than a console says, and that is told."""
    file = tmp_path / "huge"
    with file.open("wb") as sparse:
        sparse.truncate(1 << 40)
    assert main(["probe", "--judge", str(file)]) == 2
    assert f"more than {CONSOLE_BYTES_MAX >> 20} MiB" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    ["", "\n", "no probe here\n", "{}", "[" * 100_000, CLEAN[:-100], '{"schema":"pvclock.other/1"}', "\0" * 1000],
)
def test_what_no_probe_printed(text: str, console: Console, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever a file holds, what is not a probe's whole line is an error in one line."""
    file = console(text)
    assert main(["probe", "--judge", file]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"pvclock probe: {file}: ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "nothing was printed: see what the VMM said"),
        ("\r\n\0", "nothing was printed: see what the VMM said"),
        ("login:", "its one line is not a probe's; did the run end?"),
        ("root\n" * 25, "none of its 25 lines is a probe's; did the run end?"),
        (CLEAN.replace('"tsc_hz":2900000000', '"tsc_hz":0'), "tsc_hz: found 0"),
        (CLEAN[:-100], "found the output's end in the record that begins at line 1"),
    ],
)
def test_why_there_is_no_record(text: str, said: str, console: Console, capsys: pytest.CaptureFixture[str]) -> None:
    """The error names the file, and says what to look for."""
    file = console(text)
    assert main(["probe", "--judge", file]) == 2
    assert f"{file}: {said}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seconds", "1"], "--seconds goes with --guest"),
        (["--max-step", "1us"], "--max-step goes with --guest"),
        (["--add", "0:100"], "--add goes with --guest"),
        (["--guest", "--seconds", "0.01"], "0.1 s is the least"),
        (["--guest", "--cpus", "1-0"], "no list of CPUs"),
        (["--guest", "--cpus", "0-64"], "65 CPUs"),
        (["--guest", "--cpus", "65000"], "CPU 65000 is not there"),
        (["--guest", "--add", "0"], "is not CPU:NS"),
        (["--guest", "--add", "65000:1"], "CPU 65000 is not measured"),
        (["--save", "x"], "--save goes with --guest"),
        (["--guest", "--save", "-"], "--save takes the name of a file"),
        (["--guest", "--seconds", "0.1", "--save", "/nonexistent/x"], "/nonexistent/x: No such file or directory"),
    ],
)
def test_what_doctor_refuses(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Options of the measurement need --guest, and name CPUs that there are."""
    assert main(["doctor", *arguments]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert said in told


# How it is run


def until_a_round_ended(*arguments: str) -> tuple[int, dict[str, Any], str]:
    """The exit status, the result and the text of `doctor --guest --json`; on a busy machine no round may end."""
    seconds = 0.3
    while True:
        done = run_pvclock("doctor", "--guest", "--json", "--seconds", str(seconds), *arguments)
        result = json.loads(done.stdout)["result"]
        if done.status != 2 or seconds > LONGEST_S:
            return done.status, result, done.stdout
        seconds *= 4


def test_a_fault_that_is_put_in_is_found(console: Console, capsys: pytest.CaptureFixture[str]) -> None:
    """A CPU of this machine that is put ahead by 1 s is found where there is another; --judge reads that report."""
    *others, last = sorted(os.sched_getaffinity(0))[-2:]
    status, result, text = until_a_round_ended("--add", f"{last}:1000000000")
    offsets = [each for each in result["findings"] if each["code"] == "offset"]
    assert bool(offsets) == bool(others)
    assert all(last in each["cpus"] for each in offsets)
    assert status == (1 if others else 0)
    assert "added-fault" in {each["code"] for each in result["findings"]}
    again, told = judged(capsys, console(text))
    assert (again, told["result"]["findings"]) == (status, result["findings"])


def test_a_measurement_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--save has the line that --judge reads, for its owner alone, whatever the verdict is."""
    file = tmp_path / "clock.json"
    main(["doctor", "--guest", "--json", "--seconds", "0.1", "--save", str(file)])
    result = json.loads(capsys.readouterr().out)["result"]
    assert json.loads(file.read_text()) == result["record"]
    assert file.read_text().count("\n") == 1
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["clock.json"]
    _, told = judged(capsys, str(file))
    assert told["result"]["findings"] == result["findings"]


def test_what_the_executable_prints_is_heard() -> None:
    """Its standard output is the result; how far it is comes through while it runs."""
    heard: list[int] = []
    said = run_probe(SHELL, ["-c", "echo 0% >&2; echo 100% >&2; echo line"], 1, heard.append)
    assert (said, heard) == (b"line\n", [0, 100])


@pytest.mark.parametrize(
    ("script", "status", "said"),
    [
        ("echo 10% >&2; echo CPU 7 went away >&2; exit 2", 2, "CPU 7 went away"),
        ("kill -SYS $$", -31, "seccomp"),
        ("kill -KILL $$", -9, "signal 9"),
    ],
)
def test_an_executable_that_fails(script: str, status: int, said: str) -> None:
    """Its end without a result is an error with its status and what it said."""
    with pytest.raises(ProbeNotRun, match=said) as failure:
        run_probe(SHELL, ["-c", script], 1)
    assert failure.value.status == status
    assert "10%" not in str(failure.value)


def test_an_interrupt_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends the wait ends the executable: its process is gone."""
    started: list[int] = []

    class Noted(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401  # those of Popen
            super().__init__(*arguments, **options)
            started.append(self.pid)

    monkeypatch.setattr(subprocess, "Popen", Noted)

    def interrupt(_percent: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_probe(SHELL, ["-c", "echo 1% >&2; while :; do :; done"], 1, interrupt)
    (process,) = started
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_one_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """An executable that goes on for much longer than it was to is ended, and that is told."""
    monkeypatch.setattr("pvclock.commands.probe_process.GRACE_S", 0.1)
    with pytest.raises(ProbeNotRun, match="did not end"):
        run_probe(SHELL, ["-c", "while :; do :; done"], 0.1)


@pytest.mark.parametrize("call", ["os.memfd_create", "subprocess.Popen"])
def test_where_no_program_may_run_from_memory(
    call: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """vm.memfd_noexec, a noexec mount or seccomp: the error says what to type instead."""

    def refuse(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(call, refuse)
    assert main(["doctor", "--guest", "--seconds", "0.1"]) == 2
    told = capsys.readouterr().err
    assert "EACCES" in told
    assert "pvclock probe --linux --output" in told


def test_a_kernel_that_knows_no_executable_memfds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 6.3 MFD_EXEC is EINVAL, and not needed."""
    create = os.memfd_create

    def create_as_before(name: str, flags: int) -> int:
        if flags & ~os.MFD_CLOEXEC:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return create(name, flags)

    monkeypatch.setattr(os, "memfd_create", create_as_before)
    assert run_probe(SHELL, ["-c", "echo line"], 1) == b"line\n"


# What doctor says of a host that is a guest


@pytest.mark.parametrize("is_guest", [True, False])
def test_doctor_in_a_vm_names_the_measurement(
    is_guest: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a VM doctor says that doctor --guest judges its clock, and nowhere else."""
    monkeypatch.setattr("pvclock.commands.doctor.cpu_flags", lambda: frozenset({"hypervisor"} if is_guest else ()))
    main(["doctor"])
    assert ("pvclock doctor --guest" in capsys.readouterr().out) == is_guest


@pytest.mark.parametrize("vms", [[RunningVm(4711, "qemu", 2)], []])
def test_doctor_where_a_vm_runs_names_the_watch(
    vms: list[RunningVm], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a VM runs doctor says that its clock can be watched, and nowhere else."""
    monkeypatch.setattr("pvclock.commands.doctor.running_vms", lambda: vms)
    main(["doctor", "--json"])
    also = json.loads(capsys.readouterr().out)["result"]["also"]
    assert ("pvclock watch --pid" in [each["command"] for each in also]) == bool(vms)


def test_no_right_is_needed() -> None:
    """A user without rights measures as root does; 2: busy CPUs had no time to be compared."""
    done = run_pvclock("doctor", "--guest", "--seconds", "0.1", nobody=True)
    assert (done.status in {0, 1, 2}, done.stderr) == (True, "")
    assert "rate against the TSC" in done.stdout


def test_the_executable_runs_by_itself(tmp_path: Path) -> None:
    """What --linux writes runs as a file, and its line is one that --judge takes."""
    file = tmp_path / "probe"
    assert main(["probe", "--linux", "--output", str(file)]) == 0
    done = subprocess.run([file, "--seconds", "0.1"], capture_output=True, check=True)
    assert parse_record(done.stdout).kernel is not None
