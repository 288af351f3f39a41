"""Machines that nobody closes: dropped in any state, on any thread, or left to the end of the process."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import pytest

from pvclock import Machine
from pvclock.errors import StateError
from pvclock.kvm.exits import Exit
from pvclock.machine import EXIT_PORT
from tests.kvm.guests import HLT, out
from tests.kvm.leaks import Held, held
from tests.waiting import HANG_S

pytestmark = [pytest.mark.kvm, pytest.mark.row("E9")]


KVM: Final = ("/dev/kvm", "anon_inode:kvm")
SPIN: Final = bytes.fromhex("ebfe")
DONE: Final = out(EXIT_PORT, 0)


def eventually(condition: Callable[[], bool]) -> None:
    """Return once `condition` holds; a failure if that takes for ever."""
    deadline = time.monotonic() + HANG_S
    while True:
        with suppress(FileNotFoundError):  # a descriptor that was closed while they were looked at
            if condition():
                return
        assert time.monotonic() < deadline, "it never came true"


def comes_back_to(before: Held) -> None:
    """Return once no more is held than before; a failure if that takes for ever."""
    eventually(lambda: held().is_no_more_than(before))


def paused(machine: Machine) -> None:
    """Have it started and paused."""
    machine.start()
    machine.pause()


def ended(machine: Machine) -> None:
    """Have it stopped."""
    machine.start()
    machine.stop()


@pytest.mark.parametrize(
    "prepare", [lambda _: None, Machine.start, paused, ended], ids=["made", "started", "paused", "stopped"]
)
@pytest.mark.parametrize("clock", ["engine", "kernel"])
def test_a_machine_that_is_dropped(clock: str, prepare: Callable[[Machine], object]) -> None:
    """Its vCPUs stop, and RAM, descriptors and threads are given back, without a collection of garbage."""
    gc.collect()
    before = held()
    gc.disable()
    try:
        for _ in range(5):
            machine = Machine(SPIN, vcpus=2, clock=clock)  # type: ignore[arg-type]
            prepare(machine)
            del machine
            comes_back_to(before)
    finally:
        gc.enable()


def test_a_machine_in_a_garbage_cycle() -> None:
    """A subscriber that refers to the machine: it goes when the cycle is found."""
    before = held()
    machine = Machine(SPIN, vcpus=2)
    machine.circle = machine  # type: ignore[attr-defined]
    machine.start()
    del machine
    gc.collect()
    comes_back_to(before)


def test_a_machine_that_its_own_vcpu_drops() -> None:
    """The thread that drops it cannot wait for its own end, and need not; close() there says so."""
    before = held()
    box: list[Machine] = []
    refused: list[str] = []
    dropped = threading.Event()

    def drop(_vcpu: int, _reason: Exit) -> bool:
        try:
            box[0].close()
        except StateError as error:
            refused.append(str(error))  # whose traceback has the machine
        box.clear()
        dropped.set()
        return True

    box.append(Machine(DONE + HLT, vcpus=2))
    box[0].runner._handler = drop
    box[0].start()
    assert dropped.wait(HANG_S)
    comes_back_to(before)
    assert "close() the machine on another" in refused[0]


def test_a_machine_dropped_under_a_lock_that_its_vcpu_waits_for() -> None:
    """The drop does not wait for the vCPUs: it comes at any moment, also while a lock is held."""
    before = held()
    lock, waits = threading.Lock(), threading.Event()

    def wait_for_the_lock(_vcpu: int, _reason: Exit) -> bool:
        waits.set()
        with lock:
            return True

    machine = Machine(DONE + HLT)
    machine.runner._handler = wait_for_the_lock
    with lock:
        machine.start()
        assert waits.wait(HANG_S)
        del machine
    comes_back_to(before)


def test_a_dropped_machine_whose_memory_somebody_looks_at() -> None:
    """All else is given back at once, and the memory with the last view of it."""
    before = held()
    machine = Machine(SPIN)
    view = memoryview(machine._hardware.ram.buffer)
    machine.start()
    del machine
    eventually(lambda: not any(name.startswith(KVM) for name in held().descriptors))
    assert bytes(view[0x7C00:0x7C02]) == SPIN
    view.release()
    comes_back_to(before)


PROGRAM: Final = """
import sys, threading, pvclock
machine = pvclock.Machine({image!r}, vcpus=2)
machine.start()
{last_words}
"""


@pytest.mark.parametrize(
    "last_words",
    [
        "",
        "machine.pause()",
        "del machine",
        "sys.exit(0)",
        "machine.circle = machine",
        "threading.Thread(target=machine.runner.join).start(); machine.stop()",
    ],
)
def test_a_process_that_ends_with_a_machine(last_words: str) -> None:
    """It ends, without a word, whatever its machine does."""
    program = PROGRAM.format(image=SPIN, last_words=last_words)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=HANG_S, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
