"""The probe's image in a QEMU that is not as it should be: firmware without ACPI, a reader that takes a break."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Final

import pytest

from pvclock.probe import bootable_image
from qemu_glue.peer.launch import CPU_MODEL, LAUNCHER, PROGRAM
from tests.probe_line import one_line
from tests.qemu.probe_qemu import DEBUG_EXIT
from tests.waiting import HANG_S

pytestmark = [pytest.mark.qemu, pytest.mark.kvm, pytest.mark.row("E18")]

DONE: Final = 1
FAILED: Final = 3
"""isa-debug-exit makes 2v + 1 of the image's v."""
PIPE_BYTES: Final = 4096
"""The least that there is: the line does not fit."""
BREAK_S: Final = 1.0
"""How long the reader is away, at least: the image gave up after a tenth of that, once."""
KVM: Final = ("-accel", "kvm", "-cpu", CPU_MODEL)
EMULATED: Final = ("-accel", "tcg")
"""A PC's own firmware takes ten seconds in some KVMs, and a second here."""


def command(image: Path, *arguments: str) -> list[str]:
    """A QEMU with these arguments, its serial port on standard output."""
    image.write_bytes(bootable_image())
    return [
        *(LAUNCHER[0], "--pdeathsig", "KILL", "--", PROGRAM, "-nodefaults", "-no-user-config", "-display", "none"),
        *("-m", "32M", "-serial", "stdio", *DEBUG_EXIT, "-kernel", str(image), "-append", "seconds=0.1", *arguments),
    ]


def test_firmware_without_acpi(tmp_path: Path) -> None:
    """Its MP table lists one CPU of each package, and all cores are found."""
    qemu = command(tmp_path / "probe.img", *EMULATED, "-machine", "pc", "-no-acpi", "-smp", "4,sockets=2,cores=2")
    done = subprocess.run(qemu, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == DONE, done
    line = one_line(done.stdout)
    assert (line["cpus_present"], [cpu["apic_id"] for cpu in line["cpus"]]) == (4, [0, 1, 2, 3])


def kept_bytes(pipe: int) -> int:
    """How many a pipe has for its reader."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def unread(image: Path) -> tuple[subprocess.Popen[bytes], int]:
    """A QEMU that prints into a pipe which is full; and where to read."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    qemu = command(image, *KVM, "-machine", "microvm", "-smp", "4")
    process = subprocess.Popen(qemu, stdin=subprocess.DEVNULL, stdout=writing)
    os.close(writing)
    deadline = time.monotonic() + HANG_S
    while kept_bytes(reading) < PIPE_BYTES:
        assert time.monotonic() < deadline, "the pipe was never full"
        time.sleep(0.01)
    return process, reading


def test_a_reader_that_takes_a_break(tmp_path: Path) -> None:
    """The image waits for the serial port's reader, and the line is whole."""
    process, reading = unread(tmp_path / "probe.img")
    with process, os.fdopen(reading, "rb") as pipe:
        time.sleep(BREAK_S)
        assert process.poll() is None
        line = one_line(pipe.read().decode())
    assert process.returncode == DONE
    assert len(line["cpus"]) == 4


@pytest.mark.long
def test_a_reader_that_never_comes_back(tmp_path: Path) -> None:
    """QEMU ends, and its status says that there is no whole line."""
    process, reading = unread(tmp_path / "probe.img")
    with process, os.fdopen(reading, "rb") as pipe:
        assert process.wait(HANG_S) == FAILED
        assert b"\n" not in pipe.read().lstrip()
