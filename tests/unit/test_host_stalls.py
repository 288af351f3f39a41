"""A watch on this host: what the kernel says, and a real process that is stopped or frozen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from pvclock.host import linux
from pvclock.host.linux import LinuxHost
from pvclock.host.watch import HostWatch, StallCause, TroubleKind
from tests.waiting import HANG_S

ROOT = Path(__file__).parents[2]
MS = 10**6
NS_PER_S = 10**9


@pytest.mark.row("E9")
def test_reading_this_host() -> None:
    """A reading of the real host is between what the kernel says before it and after it, and as the kernel's files."""
    before, asleep_ns = kernels_clocks(), asleep_bounds()
    found = LinuxHost().read()
    after = kernels_clocks()
    of_it = found.raw_ns, found.monotonic_ns, found.real_ns, found.process_cpu_ns
    assert all(low <= ns <= high for low, ns, high in zip(before, of_it, after, strict=True))
    assert found.asleep_least_ns <= asleep_ns[1]
    assert asleep_ns[0] <= found.asleep_most_ns
    clocksources = Path("/sys/devices/system/clocksource/clocksource0")
    assert found.clocksource == (clocksources / "current_clocksource").read_text().strip()
    assert found.clocksources == set((clocksources / "available_clocksource").read_text().split())


def kernels_clocks() -> list[int]:
    """RAW, MONOTONIC, REALTIME and this process's CPU time, now."""
    clocks = time.CLOCK_MONOTONIC_RAW, time.CLOCK_MONOTONIC, time.CLOCK_REALTIME, time.CLOCK_PROCESS_CPUTIME_ID
    return [time.clock_gettime_ns(clock) for clock in clocks]


def asleep_bounds() -> tuple[int, int]:
    """Least and most of what this host slept since boot: BOOTTIME, read between two readings of MONOTONIC."""
    earlier_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    boottime_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    later_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    return boottime_ns - later_ns - 1, boottime_ns - earlier_ns + 1


@pytest.mark.row("E9")
@pytest.mark.skipif(not Path(linux.SCHEDSTAT).exists(), reason="no run delay: needs a kernel with CONFIG_SCHED_INFO")
def test_run_delay_is_the_kernels() -> None:
    """The second number of the thread's schedstat is what a reading says, between one look at it and another."""
    before_ns, read_ns, after_ns = (
        int(Path(linux.SCHEDSTAT).read_text().split()[1]),
        LinuxHost().read().run_delay_ns,
        int(Path(linux.SCHEDSTAT).read_text().split()[1]),
    )
    assert read_ns is not None
    assert before_ns <= read_ns <= after_ns


@pytest.mark.row("E9", "E13")
def test_a_host_without_those_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where /sys and /proc do not say, readings say that it is unknown, and a watch works with the rest."""
    for name in ("AVAILABLE_CLOCKSOURCES", "SCHEDSTAT", "OWN_CGROUPS"):
        monkeypatch.setattr(linux, name, tmp_path / "absent")
    monkeypatch.setattr("pvclock.host.linux.CURRENT_CLOCKSOURCE", tmp_path / "absent")
    reading = LinuxHost().read()
    assert (reading.run_delay_ns, reading.frozen_ns) == (None, None)
    assert (reading.clocksource, reading.clocksources) == ("unknown", frozenset())
    host_watch = HostWatch(10**9, interval_ns=10 * NS_PER_S)
    assert not {trouble.kind for trouble in host_watch.check()} & {TroubleKind.CLOCKSOURCE, TroubleKind.TSC_UNSTABLE}
    assert not host_watch.tsc_trusted


CHILD_INTERVAL_NS, CHILD_STALL_NS, CHILD_SECONDS = 10 * MS, 200 * MS, 60
CHILD = f"""
import sys, time
from pvclock.host.this_host import measure_tsc_hz
from pvclock.host.watch import HostWatch, TroubleKind
sys.stdin.readline()
watch = HostWatch(measure_tsc_hz(), interval_ns={CHILD_INTERVAL_NS}, stall_ns={CHILD_STALL_NS})
print("looking", flush=True)
end = time.monotonic() + {CHILD_SECONDS}
while time.monotonic() < end:
    time.sleep({CHILD_INTERVAL_NS} / 1e9)
    for trouble in watch.check():
        if trouble.kind is TroubleKind.STALL:
            print(trouble.amount_ns, trouble.cause, flush=True)
"""


@contextmanager
def a_looking_child(cgroup: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """A process that looks every 10 ms, from within `cgroup`, and prints its stalls of more than 200 ms."""
    command = [sys.executable, "-c", CHILD]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            if cgroup:
                (cgroup / "cgroup.procs").write_text(str(child.pid))
            child.stdin.write("\n")
            child.stdin.flush()
            assert child.stdout.readline() == "looking\n"
            yield child
        finally:
            child.kill()


def told_stall(child: subprocess.Popen[str], least_ns: int) -> str:
    """The cause that the child tells of its first stall of `least_ns` or more; shorter ones are the machine's own."""
    assert child.stdout is not None
    for line in child.stdout:
        amount_ns, cause = line.split()
        if int(amount_ns) >= least_ns:
            return cause
    pytest.fail(f"the child told of no stall of {least_ns} ns within {CHILD_SECONDS} s")


@pytest.mark.row("E9", "E15")
def test_a_process_that_is_stopped_tells_its_stall() -> None:
    """A process under SIGSTOP for half a second finds, when it goes on, that it did not run for at least that long."""
    with a_looking_child() as child:
        time.sleep(10 * CHILD_INTERVAL_NS / NS_PER_S)
        child.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED)
        begin_ns = time.monotonic_ns()
        time.sleep(0.5)
        stopped_ns = time.monotonic_ns() - begin_ns
        child.send_signal(signal.SIGCONT)
        assert told_stall(child, stopped_ns) == StallCause.HALTED


class Freezer:
    """One of the kernel's two ways to freeze a cgroup: `folder`, the file that orders it, its words, and the proof."""

    def __init__(self, folder: Path, order: str, words: tuple[str, str], proof: str, frozen: str) -> None:
        self.folder = folder
        self.proof = folder / proof
        self.frozen = frozen
        self._order = folder / order
        self._freeze, self._thaw = words

    def freeze(self) -> None:
        """Freeze all processes in the cgroup, and wait until they are."""
        self._order.write_text(self._freeze)
        end = time.monotonic() + HANG_S
        while self.frozen not in self.proof.read_text():
            assert time.monotonic() < end, f"{self.proof}: not frozen after {HANG_S} s"
            time.sleep(0.001)

    def thaw(self) -> None:
        """Let them go on."""
        self._order.write_text(self._thaw)


def freezer_v1() -> Freezer | None:
    """The freezer of cgroup v1 in a folder still to be made; None where it is not mounted or not writable."""
    mount = Path("/sys/fs/cgroup/freezer")
    if not (mount / "cgroup.procs").exists() or not os.access(mount, os.W_OK):
        return None
    folder = mount / f"pvclock-test-{os.getpid()}"
    return Freezer(folder, "freezer.state", ("FROZEN", "THAWED"), "freezer.state", "FROZEN")


def freezer_v2() -> Freezer | None:
    """The freezer of cgroup v2, likewise."""
    for mount in map(Path, linux.CGROUP2_MOUNTS):
        if (mount / "cgroup.controllers").exists() and os.access(mount, os.W_OK):
            folder = mount / f"pvclock-test-{os.getpid()}"
            return Freezer(folder, "cgroup.freeze", ("1", "0"), "cgroup.events", "frozen 1")
    return None


@pytest.fixture(params=[freezer_v2, freezer_v1], ids=["v2", "v1"])
def freezer(request: pytest.FixtureRequest) -> Iterator[Freezer]:
    """A cgroup that can be frozen, and is gone afterwards."""
    found = request.param()
    if found is None:
        pytest.skip("no writable cgroup hierarchy of this version under /sys/fs/cgroup: run as root, with it mounted")
    try:
        found.folder.mkdir()
    except OSError as error:
        pytest.skip(f"cannot make a cgroup, {error}: run as root, outside of containers that mount it read-only")
    try:
        yield found
    finally:
        # A killed process leaves its cgroup when it is reaped, some ms later.
        for _ in range(1000):
            with suppress(OSError):
                found.folder.rmdir()
                break
            time.sleep(0.01)


@pytest.mark.row("E9", "E15")
def test_a_process_in_a_frozen_cgroup_tells_its_stall(freezer: Freezer) -> None:
    """After half a second in a frozen cgroup a process tells its stall, and why where the kernel keeps the record."""
    stat = freezer.folder / "cgroup.stat.local"
    is_recorded = stat.exists() and "frozen_usec" in stat.read_text()
    with a_looking_child(freezer.folder) as child:
        time.sleep(10 * CHILD_INTERVAL_NS / NS_PER_S)
        freezer.freeze()
        try:
            begin_ns = time.monotonic_ns()
            time.sleep(0.5)
            frozen_ns = time.monotonic_ns() - begin_ns
        finally:
            freezer.thaw()
        assert told_stall(child, frozen_ns) == (StallCause.FROZEN if is_recorded else StallCause.HALTED)
