"""`pvclock run --qmp` as a VMM that this process launches: as it should be, and where it ends otherwise."""

from __future__ import annotations

import os
import signal

import pytest

from pvclock import StateError
from pvclock.meter.observe import wait_until_all_read
from pvclock.payloads import probe
from qemu_glue import QemuExited
from qemu_glue.errors import QmpFailed
from qemu_glue.guest import own_guest
from qemu_glue.peer.own_machine import OwnMachine
from tests.kvm.guests import out
from tests.waiting import HANG_S

pytestmark = [pytest.mark.kvm, pytest.mark.row("E13", "E15")]

LOOP = bytes.fromhex("ebfe")
WAIT = bytes.fromhex("a0 00 80 84 c0 74 f9")  # 1: mov 0x8000, %al; test %al, %al; jz 1b


def test_a_guest_that_ends_by_itself() -> None:
    """Its exit code and what it said on the debug console, once it has ended."""
    image = out(0xE9, ord("!")) + WAIT + out(0xF4, 7)
    with OwnMachine(image) as machine:
        machine.check_running()
        assert machine.console == ""
        machine.memory.write(0x8000, b"\1")  # what the guest waits for
        assert machine.wait(HANG_S) == 7
        assert machine.console == "!"
        with pytest.raises(QemuExited, match="pvclock run ended with exit code 1"):
            machine.check_running()


def test_a_guest_that_does_not_end() -> None:
    """It is told that it has not; at the end it is asked to quit."""
    with OwnMachine(LOOP) as machine:
        with pytest.raises(StateError, match=r"the guest has not ended after 0.01 s"):
            machine.wait(0.01)
        machine.close()


def test_killed() -> None:
    """Each call says so."""
    with OwnMachine(LOOP) as machine:
        os.kill(machine.pid, signal.SIGKILL)
        for ask in (machine.pause, lambda: machine.wait(HANG_S), machine.check_running):
            with pytest.raises(QemuExited, match="pvclock run ended with SIGKILL"):
                ask()


def test_what_cannot_start() -> None:
    """Its own words, and nothing is left."""
    with pytest.raises(QemuExited, match=r"pvclock run ended with exit code 2\noutput: .*give it more by --memory"):
        OwnMachine(b"\0" * (2 << 20), memory_bytes=1 << 20)


def test_it_is_reset_and_not_saved() -> None:
    """The guest boots again and reads on; a save is refused in words."""
    with own_guest(1) as guest:
        guest.start()
        guest.reset()
        wait_until_all_read(guest)
        guest.pause()
        with pytest.raises(QmpFailed, match="The command migrate has not been found"):
            guest.save_and_load()
        guest.resume()
        assert guest.finish()[0].state == probe.State.DONE
