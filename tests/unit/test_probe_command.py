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
from pathlib import Path
from typing import Any

import pytest

from pvclock.commands import main
from pvclock.commands.probe import CONSOLE_BYTES_MAX
from pvclock.commands.probe_process import run_probe
from pvclock.errors import ProbeNotRun
from pvclock.host.vmm_process import RunningVm
from pvclock.meter.inside import parse_record
from pvclock.probe import bootable_image, linux_executable
from tests.command_line import run_pvclock
from tests.unit.probe_lines import CLEAN, FAULTY, KVM_LEAVES, document, faulty_document, line

pytestmark = pytest.mark.row("E18")

SHELL = Path("/bin/sh").read_bytes()
"""Stands for the probe where it has to misbehave."""

FALSE_FREQUENCY = [0x15, 0, 1, 84, 25_000_000, 0]
WITH_FALSE_FREQUENCY = line(faulty_document() | {"cpuid": [*KVM_LEAVES, FALSE_FREQUENCY]})
"""A fault that no budget decides, beside one that --max-warp does: CPUID says 2.1 GHz."""

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
        (CLEAN, ["--max-warp", "10ns"], "Undecided whether this guest's clock is right: "),
        (line(faulty_document() | {"added_ns": [0, -1_200_000]}), [], "With the fault that --add put in, this guest's"),
    ],
)
def test_first_lines(
    text: str, budgets: list[str], first: str, console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first line says which kind of verdict it is, and names what decides it."""
    main(["probe", "--judge", console(text), *budgets])
    assert capsys.readouterr().out.startswith(first)


def test_the_tables_say_which_cpu_is_behind(console: Console, capsys: pytest.CaptureFixture[str]) -> None:
    """The table of clocks has the window and the CPUs by their sign, and the largest warp with who read less."""
    assert main(["probe", "--judge", console(FAULTY)]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"tsc +CPU 1 less CPU 0: -6\d ns to \+6\d ns", shown)
    assert "CPU 1 less CPU 0: -1.200 0" in shown
    assert "5,000 times, by up to 1.199 ms: CPU 1 after CPU 0" in shown


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
    assert main(["probe", "--judge", console(text)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


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
    ],
)
def test_what_doctor_refuses(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Options of the measurement need --guest, and name CPUs that there are."""
    assert main(["doctor", *arguments]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert said in told


# How it is run


def test_a_fault_that_is_put_in_is_found(console: Console, capsys: pytest.CaptureFixture[str]) -> None:
    """A CPU of this machine that is put ahead by 1 ms is found where there is another; --judge reads that report."""
    *others, last = sorted(os.sched_getaffinity(0))[-2:]
    status = main(["doctor", "--guest", "--json", "--seconds", "0.3", "--add", f"{last}:1000000"])
    text = capsys.readouterr().out
    result = json.loads(text)["result"]
    offsets = [each for each in result["findings"] if each["code"] == "offset"]
    assert bool(offsets) == bool(others)
    assert all(last in each["cpus"] for each in offsets)
    assert status == (1 if others else 0)
    assert "added-fault" in {each["code"] for each in result["findings"]}
    again, told = judged(capsys, console(text))
    assert (again, told["result"]["findings"]) == (status, result["findings"])


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


def test_an_interrupt_ends_it() -> None:
    """Whatever ends the wait ends the executable: no process is left."""

    def interrupt(_percent: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_probe(SHELL, ["-c", "echo 1% >&2; while :; do :; done"], 1, interrupt)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


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
    """A user without rights measures as root does."""
    done = run_pvclock("doctor", "--guest", "--seconds", "0.1", nobody=True)
    assert (done.status in {0, 1}, done.stderr) == (True, "")
    assert "rate against the TSC" in done.stdout


def test_the_executable_runs_by_itself(tmp_path: Path) -> None:
    """What --linux writes runs as a file, and its line is one that --judge takes."""
    file = tmp_path / "probe"
    assert main(["probe", "--linux", "--output", str(file)]) == 0
    done = subprocess.run([file, "--seconds", "0.1"], capture_output=True, check=True)
    assert parse_record(done.stdout).kernel is not None
