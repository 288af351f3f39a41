"""The probe for Linux as a program: its line, its options, and what it does where it may do little."""

from __future__ import annotations

import errno
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

import pvclock
from pvclock.probe import linux_executable
from tests.probe_line import Line, clock_of, slices_ns
from tests.unit.probe_program import Result, line_of, run_executable
from tests.waiting import HANG_S, alarm_after

pytestmark = pytest.mark.row("E18")

ROOT = Path(__file__).parents[2]
CPUS = sorted(os.sched_getaffinity(0))
BRIEF = "0.1"
TRIES = 50
SLICES = 8

needs_two_cpus = pytest.mark.skipif(len(CPUS) < 2, reason="this process may run on one CPU only")

CLOCK_GETTIME, SCHED_SETAFFINITY = 228, 203


def without_the_system_call(number: int, error: int) -> str:
    """What a process does first so that a system call fails from then on; what the vDSO does in its place goes on."""
    return f"""
import ctypes, struct, time
LOAD, EQUAL, RETURN, ERRNO, ALLOW = 0x20, 0x15, 0x06, 0x50000 | {error}, 0x7fff0000
code = b"".join(struct.pack("HBBI", *each) for each in (
    (LOAD, 0, 0, 0), (EQUAL, 0, 1, {number}), (RETURN, 0, 0, ERRNO), (RETURN, 0, 0, ALLOW)))
held = ctypes.create_string_buffer(code)
program = struct.pack("HxxxxxxQ", 4, ctypes.addressof(held))
prctl = ctypes.CDLL(None, use_errno=True).prctl
if prctl(38, 1, 0, 0, 0) or prctl(22, 2, ctypes.c_char_p(program), 0, 0):  # no new privileges, then the filter
    sys.exit("no seccomp")
"""


@pytest.fixture(scope="module")
def program() -> Iterator[Path]:
    """The executable, in a folder that everybody may look into."""
    with TemporaryDirectory(prefix="pvclock-probe-") as folder:
        Path(folder).chmod(0o755)
        path = Path(folder, "probe")
        path.write_bytes(linux_executable())
        path.chmod(0o755)
        yield path


@pytest.fixture(scope="module")
def measured(program: Path) -> Line:
    """What a brief measurement of this machine printed."""
    return line_of(measure(program))


def measure(program: Path, *options: str) -> Result:
    """Run the probe until each clock has been exchanged, which a busy machine may not let it do in a brief run."""
    for _ in range(TRIES):
        result = run_executable(program, f"--seconds={BRIEF}", *options)
        line = line_of(result)
        if len(line["cpus"]) == 1 or all(slices_ns(line, name) for name in ("tsc", "monotonic")):
            return result
    raise AssertionError(f"in {TRIES} runs no CPU has answered another: {result.stdout}")


def keys_of_the_contract() -> tuple[set[str], set[str]]:
    """The keys that docs/probe.md has of the whole line, without those of the bare form, and those of each clock."""
    text = (ROOT / "docs" / "probe.md").read_text(encoding="utf-8")
    whole, of_clocks = text.partition("## The line")[2].split("Of `clocks`:")
    rows = [set(re.findall(r"^\| `(\w+)` \| (?!bare: )", part, re.MULTILINE)) for part in (whole, of_clocks)]
    return rows[0] - {"added_ns"}, rows[1]


# The line


def test_the_line_has_every_key_of_the_contract_and_no_other(measured: Line) -> None:
    """docs/probe.md's tables, key by key."""
    whole, of_clocks = keys_of_the_contract()
    assert len(whole) > 10
    assert measured.keys() == whole
    assert all(each.keys() == of_clocks for each in measured["clocks"])
    assert [each["name"] for each in measured["clocks"]] == ["tsc", "monotonic", "monotonic_raw"]
    assert measured["kernel"].keys() == {"release", "clocksource", "available", "command_line", "complaints"}
    page = {"cpu", "version", "mul", "shift", "flags", "looks", "stopped_looks"}
    assert all(each.keys() == page for each in measured["pages"])


def test_what_the_line_says_of_this_machine(measured: Line) -> None:
    """Version, CPUs, CPUID and kernel are this one's; its rate is that of CLOCK_MONOTONIC_RAW."""
    assert (measured["schema"], measured["version"]) == ("pvclock.probe-record/1", pvclock.__version__)
    assert (measured["form"], measured["tsc_hz_from"]) == ("linux", "monotonic_raw")
    assert measured["milliseconds"] == 100
    assert [each["cpu"] for each in measured["cpus"]] == CPUS[:64]
    assert measured["cpus_present"] == os.cpu_count()  # of those that are online, whatever this process may run on
    leaves = {leaf: (eax, ebx, ecx, edx) for leaf, _, eax, ebx, ecx, edx in measured["cpuid"]}
    vendor = b"".join(leaves[0][at].to_bytes(4, "little") for at in (1, 3, 2)).decode()
    assert re.search(rf"^vendor_id\s*: {vendor}$", Path("/proc/cpuinfo").read_text(encoding="ascii"), re.MULTILINE)
    assert {1, 0x80000000} < leaves.keys()
    assert (0x40000000 in leaves) == bool(leaves[1][2] >> 31)
    release = os.uname().release
    command_line = Path("/proc/cmdline").read_text(encoding="utf-8").strip()
    assert (measured["kernel"]["release"], measured["kernel"]["command_line"]) == (release, command_line)
    assert measured["kernel"]["clocksource"] in measured["kernel"]["available"]


def test_apic_ids_are_the_kernels(measured: Line) -> None:
    """Each CPU's own: it was read there."""
    found = re.findall(
        r"^(processor|apicid)\s*: (\d+)$", Path("/proc/cpuinfo").read_text(encoding="ascii"), re.MULTILINE
    )
    numbers = [int(value) for _, value in found]
    kernels = dict(zip(numbers[::2], numbers[1::2], strict=True))
    assert {each["cpu"]: each["apic_id"] for each in measured["cpus"]} == {cpu: kernels[cpu] for cpu in CPUS[:64]}


def test_the_rate_is_that_of_the_samples(measured: Line) -> None:
    """The TSC's frequency is within 1% of what its samples beside monotonic_raw say."""
    first, *_, last = clock_of(measured, "monotonic_raw")["samples"]
    rate = (last[0] - first[0]) / (last[1] - first[1]) * 10**9
    assert rate == pytest.approx(measured["tsc_hz"], rel=0.01)
    assert len(clock_of(measured, "tsc")["samples"]) == SLICES + 1


@needs_two_cpus
def test_a_sound_machine_shows_no_fault(measured: Line) -> None:
    """No warp, no window without 0, and no step: each would be proof."""
    for name in ("tsc", "monotonic"):
        assert clock_of(measured, name)["warps"] == []
        found = slices_ns(measured, name)
        assert found
        assert all(low <= 0 <= high for low, high in found), found
        assert clock_of(measured, name)["steps"]["count"] == 0
        assert clock_of(measured, name)["cell_reads"] > 0
    assert clock_of(measured, "monotonic_raw")["pairs"] == []


@needs_two_cpus
@pytest.mark.parametrize(("place", "ns"), [(1, 10**9), (0, 10**9), (1, -(10**9))])
def test_an_added_offset_is_found(program: Path, place: int, ns: int) -> None:
    """With its sign and its CPU: by all windows of both clocks, and as a warp from who is ahead to who is behind.

    A second is longer than an exchange takes on any busy machine; bench/test_probe.py is for idle ones.
    """
    cpus = CPUS[:2]
    result = measure(program, f"--cpus={cpus[0]},{cpus[1]}", f"--add={cpus[place]}:{ns}")
    line = line_of(result)
    expected = ns if place == 1 else -ns
    ahead = 1 if expected > 0 else 0
    assert line["added_ns"] == [ns if at == place else 0 for at in (0, 1)]
    for name in ("tsc", "monotonic"):
        found = slices_ns(line, name)
        assert all(low - 1 <= expected <= high + 1 for low, high in found), found
        assert all(low > 0 or high < 0 for low, high in found), found
        assert {(warp["from"], warp["to"]) for warp in clock_of(line, name)["warps"]} <= {(ahead, 1 - ahead)}
    assert f"{BRIEF} s (with --add): " in result.stderr
    assert f" of CPU {cpus[ahead]} is ahead of CPU {cpus[1 - ahead]}'s by at least" in result.stderr


# What it may do


def test_one_cpu_of_a_cpuset(program: Path) -> None:
    """It measures on that alone, and says that it has no other to compare it with."""
    result = run_executable(program, f"--seconds={BRIEF}", first=f"os.sched_setaffinity(0, {{{CPUS[-1]}}})")
    line = line_of(result)
    assert [each["cpu"] for each in line["cpus"]] == [CPUS[-1]]
    assert all(each["pairs"] == each["warps"] == [] for each in line["clocks"])
    assert all(each["steps"]["reads"] > 0 for each in line["clocks"])
    assert "one CPU has no other to differ from" in result.stderr


def test_without_any_right(program: Path) -> None:
    """As nobody it measures all the same; what the kernel complains of may be kept from it."""
    line = line_of(run_executable(program, f"--seconds={BRIEF}", nobody=True))
    assert len(line["cpus"]) == min(len(CPUS), 64)
    if Path("/proc/sys/kernel/dmesg_restrict").read_text(encoding="ascii").strip() == "1":
        assert line["kernel"]["complaints"] is None


def test_no_system_call_reads_the_clock(program: Path) -> None:
    """It measures where clock_gettime(2) is refused: the vDSO reads the clock, as in any program."""
    refusing = without_the_system_call(CLOCK_GETTIME, errno.ENOSYS)
    trial = f"{refusing}\nif time.monotonic() > 0: print('by the vDSO'); sys.exit()"
    first = run_executable(program, first=trial)
    if "by the vDSO" not in first.stdout:
        pytest.skip("no seccomp, or a clocksource that the vDSO does not read: boot with clocksource=tsc or kvm-clock")
    line = line_of(run_executable(program, f"--seconds={BRIEF}", first=refusing))
    assert clock_of(line, "monotonic")["samples"][-1][1] > clock_of(line, "monotonic")["samples"][0][1] > 0


@needs_two_cpus
def test_a_cpu_that_is_lost_meanwhile_ends_it(program: Path) -> None:
    """A thread that another moves from its CPU, as unplugging does, ends the run with that CPU's number."""
    kept, lost = CPUS[:2]
    command = [str(program), "--seconds=5", f"--cpus={kept},{lost}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + HANG_S
        while process.poll() is None and time.monotonic() < deadline:
            move_threads(process.pid, kept)
        process.kill()
        stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (2, "")
    assert stderr.startswith(f"pvclock probe: CPU {lost} was not to be had to the end")
    assert len(stderr.splitlines()) == 1


def test_threads_that_may_not_be_pinned(program: Path) -> None:
    """It says that they are refused, and by which call; no CPU is said to be lost."""
    result = run_executable(program, first=without_the_system_call(SCHED_SETAFFINITY, errno.EPERM))
    assert (result.status, result.stdout) == (2, "")
    refused = "no thread may be pinned to a CPU here (sched_setaffinity: Operation not permitted)"
    assert result.stderr == f"pvclock probe: {refused}; a seccomp filter may be why\n"


def move_threads(process: int, cpu: int) -> None:
    """Pin a process' threads to one CPU, all but its first; those that end meanwhile are not there any more."""
    for thread in {int(each.name) for each in Path(f"/proc/{process}/task").glob("*")} - {process}:
        try:
            os.sched_setaffinity(thread, {cpu})
        except ProcessLookupError:
            continue


# Its parent

A_DAY_S = 86400
"""The first percent of that takes longer than any test waits: nothing but the kernel ends the probe before."""
STARTS_IT = """
import os, subprocess, sys
print(subprocess.Popen([*sys.argv[1:], "--parent", str(os.getpid())]).pid, flush=True)
sys.stdin.read()
"""


def test_it_ends_with_its_parent(program: Path) -> None:
    """A parent that is killed leaves no measurement behind that has begun."""
    starter = [sys.executable, "-c", STARTS_IT, str(program), "--seconds=20", "--progress"]
    pipe = subprocess.PIPE
    with subprocess.Popen(starter, stdin=pipe, stdout=pipe, stderr=pipe) as parent:
        assert parent.stdout is not None
        assert parent.stderr is not None
        tasks = Path(f"/proc/{int(parent.stdout.readline())}/task")
        with alarm_after(HANG_S):
            while len(list(tasks.iterdir())) < 2:  # it has no thread before it knows its parent
                pass
        parent.kill()
        said = parent.stderr.read()  # until both have ended
    assert b"100%" not in said


def test_it_ends_with_a_doctor_that_is_killed() -> None:
    """`pvclock doctor --guest` leaves no probe behind that would keep the CPUs busy until its next percent."""
    with subprocess.Popen(
        [sys.executable, "-m", "pvclock", "doctor", "--guest", f"--seconds={A_DAY_S}"], cwd=ROOT
    ) as doctor:
        children = Path(f"/proc/{doctor.pid}/task/{doctor.pid}/children")
        with alarm_after(HANG_S):
            while not (probe := children.read_text(encoding="ascii").split()):
                pass
            descriptor = os.pidfd_open(int(probe[0]))
            while len(list(Path(f"/proc/{probe[0]}/task").iterdir())) < 2:
                pass
        doctor.kill()
        with os.fdopen(descriptor, "rb") as ended:
            assert select.select([ended], [], [], HANG_S)[0]


def test_a_parent_that_has_ended_before(program: Path) -> None:
    """It does not begin then: nobody waits for what it would print."""
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    result = run_executable(program, f"--parent={ended.pid}")
    said = f"--parent {ended.pid}: has ended, or did not start this process"
    assert result == (2, "", f"pvclock probe: {said}\n")


# The program


def test_it_needs_no_library(program: Path) -> None:
    """Static: neither an interpreter nor a library is named in it."""
    shown = subprocess.run(["readelf", "-W", "-l", "-d", program], capture_output=True, text=True, check=True).stdout
    assert "LOAD" in shown
    assert "INTERP" not in shown
    assert "NEEDED" not in shown


def test_it_runs_from_memory() -> None:
    """From a memfd, without a file system that executables may be written to."""
    descriptor = os.memfd_create("probe")
    with os.fdopen(descriptor, "wb") as memory:
        memory.write(linux_executable())
        memory.flush()
        command = [f"/proc/self/fd/{descriptor}", f"--seconds={BRIEF}"]
        done = subprocess.run(command, pass_fds=[descriptor], capture_output=True, text=True, check=False)
    assert line_of(Result(done.returncode, done.stdout, done.stderr))["form"] == "linux"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--seconds", "0"], "--seconds 0: a number from 0.1 to 86400"),
        (["--seconds", "nan"], "--seconds nan: a number from 0.1 to 86400"),
        (["--seconds", "1s"], "--seconds 1s: a number from 0.1 to 86400"),
        (["--cpus", "0-"], "--cpus 0-: a list such as 0,2-3"),
        (["--cpus", "3-2"], "--cpus 3-2: a list such as 0,2-3"),
        (["--cpus", "0,"], "--cpus 0,: a list such as 0,2-3"),
        (["--cpus", "65535"], "--cpus: CPU 65535 is offline, or this process may not run on it"),
        (["--cpus", "99999999999999999999"], "--cpus 99999999999999999999: a list such as 0,2-3"),
        (["--add", "65535:1"], "--add 65535:1: CPU 65535 is not measured"),
        (["--add", "0"], "--add 0: CPU:NS, such as 1:250, and no more than 1000000000000 ns"),
        (
            ["--add", "0:1000000000001"],
            "--add 0:1000000000001: CPU:NS, such as 1:250, and no more than 1000000000000 ns",
        ),
        (["--parent", "0"], "--parent 0: the number of a process"),
        (["--parent", "1x"], "--parent 1x: the number of a process"),
        (["--output", "x"], "--output: no option, or one without its value; --help says which there are"),
        (["--seconds"], "--seconds: no option, or one without its value; --help says which there are"),
        (["probe"], "probe: there are options only; --help says which"),
    ],
)
def test_an_option_that_cannot_be_followed(program: Path, options: list[str], said: str) -> None:
    """One line says which and why, and the exit status is 2."""
    assert run_executable(program, *options) == (2, "", f"pvclock probe: {said}\n")


def test_help_names_every_option(program: Path) -> None:
    """On standard output, with exit status 0."""
    result = run_executable(program, "--help")
    assert (result.status, result.stderr) == (0, "")
    assert set(re.findall(r"^  (--\w+)", result.stdout, re.MULTILINE)) == {
        *("--seconds", "--cpus", "--add", "--progress", "--parent", "--help")
    }


def test_progress_and_how_to_judge_it(program: Path) -> None:
    """Percents rise to 100 on standard error; the two lines after them are for a person, with the command to type."""
    result = run_executable(program, f"--seconds={BRIEF}", "--progress")
    *percents, finding, judge = result.stderr.splitlines()
    numbers = [int(each.removesuffix("%")) for each in percents]
    assert numbers == sorted(numbers)
    assert (len(numbers) > SLICES - 1, numbers[-1]) == (True, 100)
    assert finding.startswith(f"pvclock probe: {min(len(CPUS), 64)} CPU")
    assert judge.endswith("pvclock probe --judge FILE")
    assert len(run_executable(program, f"--seconds={BRIEF}").stderr.splitlines()) == 2


def test_an_output_that_takes_nothing(program: Path) -> None:
    """A full standard output is said in a line, with exit status 2."""
    to_full = "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)"
    result = run_executable(program, f"--seconds={BRIEF}", first=to_full)
    assert result == (2, "", "pvclock probe: standard output: No space left on device\n")
