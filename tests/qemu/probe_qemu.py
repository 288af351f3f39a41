"""A QEMU/KVM that runs the probe's image to its end, as docs/probe-vmms.md says: `-kernel`, a serial port, an exit."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final, NamedTuple

from qemu_glue.peer.launch import CPU_MODEL, LAUNCHER, PROGRAM
from tests.waiting import HANG_S

__all__ = ["DEBUG_EXIT", "Ended", "run_in_qemu"]

DEBUG_EXIT: Final = ("-device", "isa-debug-exit,iobase=0xf4,iosize=1")


class Ended(NamedTuple):
    """status: QEMU's exit status.  said: what QEMU said.  serial: what came out of the serial port."""

    status: int
    said: str
    serial: str


def run_in_qemu(place: Path, image: bytes, *arguments: str, cmdline: str = "seconds=0.1", vcpus: int = 2) -> Ended:
    """Run `image` in a QEMU with these arguments, among them its `-machine`, until that ends; files are in `place`."""
    kernel, serial = place / "probe.img", place / "serial"
    kernel.write_bytes(image)
    command = [
        *(LAUNCHER[0], "--pdeathsig", "KILL", "--", PROGRAM),
        *("-nodefaults", "-no-user-config", "-display", "none", "-accel", "kvm", "-cpu", CPU_MODEL),
        *("-m", "32M", "-smp", str(vcpus), "-serial", f"file:{serial}"),
        *("-kernel", str(kernel), "-append", cmdline, *arguments),
    ]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=HANG_S, check=False
    )
    return Ended(done.returncode, done.stderr, serial.read_text(errors="replace"))
