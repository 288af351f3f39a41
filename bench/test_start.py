"""From Machine() to the guest's first exit, beside the bare ioctls in C; and from a process's start, beside QEMU's.

The guest's first instruction writes a port, so what is measured holds one exit more.  In a process of its own it writes
a byte to its serial port, and what is measured ends when the byte arrives here.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.c_twins import FILTER_AT_LAST, BareVm, Step, Twins
from bench.comparison import Comparison
from bench.first_byte import MULTIBOOT_IMAGE, microvm, wait_for_byte
from pvclock import Machine
from pvclock.kvm import Kvm

UNUSED_PORT = 0x80
GRACE_PERIODS_S = 0.03
WRITE_PORT_AND_HALT = bytes([0xE6, UNUSED_PORT, 0xF4])  # out %al, $port; hlt
ROUNDS = 40
PROCESS_ROUNDS = 10


class StartedMachine:
    """A Machine that has come to its guest's first exit."""

    def __init__(self, **options: Any) -> None:  # noqa: ANN401  # Machine's
        exited = threading.Lock()
        exited.acquire()
        self.machine = Machine(WRITE_PORT_AND_HALT, on_exit=lambda _vcpu, _exit: exited.release(), **options)
        self.machine.start()
        exited.acquire()


class Kept:
    """What one side made, to be closed when nothing is timed."""

    def __init__(self) -> None:
        self.made: list[BareVm | Machine] = []

    def close(self) -> tuple[()]:
        """Close it; what is timed next is given nothing of it."""
        for each in self.made:
            each.close()
        self.made.clear()
        return ()


@pytest.fixture
def kept() -> Iterator[Kept]:
    """Return a place for what is to be closed."""
    kept = Kept()
    yield kept
    kept.close()


OPTIONS: dict[str, dict[str, Any]] = {
    "engine": {},
    "engine, no ticker": {"tick_interval_s": None},
    "kernel": {"clock": "kernel"},
    "engine, PC": {"platform": "pc"},
}


@pytest.mark.kvm
@pytest.mark.usefixtures("kvm")
@pytest.mark.parametrize("clock", OPTIONS)
def test_machine_to_first_exit(comparison: Comparison, twins: Twins, kept: Kept, clock: str) -> None:
    """In a process that has made a machine before: what is found out about the host once is known."""
    comparison.measure(
        f"Machine() to the first exit: {clock}",
        lambda: kept.made.append(StartedMachine(**OPTIONS[clock]).machine),
        ("bare ioctls in C", lambda: kept.made.append(BareVm(twins.library, WRITE_PORT_AND_HALT))),
        operations=1,
        rounds=ROUNDS,
        prepare=kept.close,
        finish=kept.close,
    )


@pytest.mark.kvm
@pytest.mark.usefixtures("kvm")
def test_order_of_the_ioctls(comparison: Comparison, twins: Twins, kept: Kept) -> None:
    """The same ioctls with the filter at last: what waiting for a grace period costs on this host's kernel."""
    comparison.measure(
        "bare ioctls in C, the MSR filter at last",
        lambda: kept.made.append(BareVm(twins.library, WRITE_PORT_AND_HALT, FILTER_AT_LAST)),
        ("the filter first", lambda: kept.made.append(BareVm(twins.library, WRITE_PORT_AND_HALT, tuple(Step)))),
        operations=1,
        rounds=ROUNDS,
        prepare=kept.close,
        finish=kept.close,
    )


@pytest.mark.kvm
def test_close(comparison: Comparison, kvm: Kvm, twins: Twins) -> None:
    """Of VMs that are older than what their making has left behind; bench/start_phases.py has younger ones."""
    bare = [BareVm(twins.library, WRITE_PORT_AND_HALT)]

    def prepare() -> tuple[Machine]:
        bare.append(BareVm(twins.library, WRITE_PORT_AND_HALT))
        machine = StartedMachine(kvm=kvm).machine
        time.sleep(GRACE_PERIODS_S)
        return (machine,)

    comparison.measure(
        "close()",
        Machine.close,
        ("bare ioctls in C", lambda: bare.pop().close()),
        operations=1,
        rounds=ROUNDS,
        prepare=prepare,
    )
    bare.pop().close()


@pytest.mark.kvm
def test_reset(comparison: Comparison, kvm: Kvm, twins: Twins) -> None:
    """Of a machine that has run and stands."""
    machine = StartedMachine(kvm=kvm).machine
    machine.pause()
    with machine:
        comparison.measure(
            "reset()",
            machine.reset,
            ("a new bare VM in C, to its end", lambda: BareVm(twins.library, WRITE_PORT_AND_HALT).close()),
            operations=1,
            rounds=ROUNDS,
        )


@pytest.mark.kvm
@pytest.mark.usefixtures("kvm")
def test_process_to_first_byte(comparison: Comparison, tmp_path: Path) -> None:
    """`pvclock run IMAGE`, beside QEMU's microvm with the same multiboot image."""
    image = tmp_path / "first_byte.img"
    image.write_bytes(MULTIBOOT_IMAGE)
    ours = [sys.executable, "-m", "pvclock", "run", str(image)]
    theirs = microvm("-kernel", str(image))
    if theirs is None:
        pytest.skip("no QEMU to compare with: apt-get install qemu-system-x86")
    comparison.measure(
        "pvclock run IMAGE to the first byte",
        lambda: wait_for_byte(ours),
        ("QEMU microvm", lambda: wait_for_byte(theirs)),
        operations=1,
        rounds=PROCESS_ROUNDS,
    )


@pytest.mark.parametrize("statement", ["from pvclock import Machine; Machine", "import pvclock.commands.run"])
def test_what_of_it_is_python(comparison: Comparison, statement: str) -> None:
    """From start to end of a process that imports what the machine, or the command, is made of."""

    def interpreter(text: str) -> None:
        subprocess.run([sys.executable, "-c", text], check=True)

    comparison.measure(
        f"python -c '{statement}'",
        lambda: interpreter(statement),
        ("python -c pass", lambda: interpreter("pass")),
        operations=1,
        rounds=PROCESS_ROUNDS,
    )
