"""Steal time on real vCPUs: what the host's scheduler took from them, in the guest's own record."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pvclock import KvmFeature, Machine
from pvclock.machine import EXIT_PORT
from tests.waiting import HANG_S

pytestmark = pytest.mark.kvm

RECORD = 0x6000
MSR_KVM_STEAL_TIME = 0x4B564D03
STOP = 0x5000
# mov $MSR, %ecx; mov $RECORD | 1, %eax; xor %edx, %edx; wrmsr; 1: cmpb $0, STOP; je 1b; mov $0, %al; out %al, $EXIT
GUEST = (
    b"\x66\xb9"
    + MSR_KVM_STEAL_TIME.to_bytes(4, "little")
    + b"\x66\xb8"
    + (RECORD | 1).to_bytes(4, "little")
    + bytes.fromhex("6631d20f30 803e005000 74f9 b000e6")
    + bytes([EXIT_PORT])
)
IDLE_GUEST = GUEST[: GUEST.index(b"\x0f\x30") + 2] + bytes.fromhex("f4 ebfd")  # ...; wrmsr; 1: hlt; jmp 1b
FEATURES = KvmFeature.CLOCKSOURCE2 | KvmFeature.STEAL_TIME


def record(machine: Machine) -> tuple[int, int]:
    """The guest's steal time in ns, and the version."""
    steal, version = struct.unpack("<QI", machine.memory.read(RECORD, 12))
    return steal, version


def account(task: str) -> tuple[int, int]:
    """How long the task at this place in /proc ran, and how long it waited for a CPU, in ns, as the kernel has it."""
    ran, waited, _ = Path("/proc", task, "schedstat").read_text().split()
    return int(ran), int(waited)


def is_asleep(thread: int) -> bool:
    """Does that thread of this process wait for something else than a CPU?"""
    return Path(f"/proc/self/task/{thread}/stat").read_text().rpartition(")")[2].split()[0] == "S"


@contextmanager
def competitor(cpu: int) -> Iterator[int]:
    """A process that wants all of `cpu`; its id."""
    program = f"import os; os.sched_setaffinity(0, {{{cpu}}})\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        try:
            yield process.pid
        finally:
            process.kill()


@pytest.mark.row("K-26", "K-27", "K-28", "K-29")
def test_stolen_time_reaches_the_guest() -> None:
    """A vCPU that shares its CPU with another process: its guest's record says how long it waited, by the kernel."""
    with Machine(GUEST, memory_bytes=1 << 20, features=FEATURES, tick_interval_s=None) as machine:
        clock = machine.clock
        assert clock is not None
        machine.start()
        deadline = time.monotonic() + HANG_S
        while record(machine)[1] == 0:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        thread = machine.runner.thread_id(0)
        assert thread is not None
        cpu = min(os.sched_getaffinity(0))
        os.sched_setaffinity(thread, {cpu})
        clock.tick()
        before, version = record(machine)
        with competitor(cpu):
            while account(f"self/task/{thread}")[1] < before + 10**8:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        _, least_ns = account(f"self/task/{thread}")
        clock.tick()
        _, most_ns = account(f"self/task/{thread}")
        after, later = record(machine)
        assert before + 10**8 <= least_ns <= after <= most_ns
        assert (later - version) % 2 == 0 < later - version
        machine.memory.write(STOP, b"\1")
        assert machine.wait(HANG_S) == 0


@pytest.mark.row("K-28")
def test_an_idle_vcpu_loses_nothing() -> None:
    """A halted vCPU's CPU is another process's for 200 ms: its guest is told of no more than the kernel counted.

    That may be a few ms for a wake-up, and on a host that is itself out of its CPUs more: then once more.
    """
    with Machine(IDLE_GUEST, memory_bytes=1 << 20, features=FEATURES, tick_interval_s=None) as machine:
        clock = machine.clock
        assert clock is not None
        machine.start()
        deadline = time.monotonic() + HANG_S
        thread = machine.runner.thread_id(0)
        assert thread is not None
        while record(machine)[1] == 0 or not is_asleep(thread):
            assert time.monotonic() < deadline
        cpu = min(os.sched_getaffinity(0))
        os.sched_setaffinity(thread, {cpu})
        lost_ns = 10**9
        while lost_ns >= 10**8:
            assert time.monotonic() < deadline
            clock.tick()
            before, _ = record(machine)
            with competitor(cpu) as other:
                while account(str(other))[0] < 2 * 10**8:
                    assert time.monotonic() < deadline
            _, least_ns = account(f"self/task/{thread}")
            clock.tick()
            _, most_ns = account(f"self/task/{thread}")
            after, _ = record(machine)
            assert least_ns <= after <= most_ns
            lost_ns = after - before


@pytest.mark.row("K-26", "K-09")
def test_who_is_not_offered_steal_time_has_none() -> None:
    """Without the feature the MSR faults, here as in Linux, and nothing is written."""
    with Machine(GUEST, memory_bytes=1 << 20) as machine:
        machine.memory.write(4 * 13, (0x700).to_bytes(4, "little"))
        machine.memory.write(0x700, b"\xb0\x0d\xe6" + bytes([EXIT_PORT]))  # mov $13, %al; out %al, $EXIT_PORT
        machine.start()
        assert machine.wait(HANG_S) == 13
        assert record(machine) == (0, 0)
