"""The probe's image on our runner as its content alone says how to enter it, and again after a reset."""

from __future__ import annotations

import struct
from typing import Final

import pytest

from pvclock import Machine
from pvclock.boot import BootSource
from pvclock.probe import bootable_image
from tests.probe_line import one_line
from tests.waiting import HANG_S

pytestmark = [pytest.mark.kvm, pytest.mark.row("E18")]

DONE: Final = 0
MULTIBOOT_MAGIC: Final = struct.pack("<I", 0x1BADB002)
PVH_NOTE: Final = struct.pack("<I", 18) + b"Xen\0"
"""Its type and name."""
LONG_MODE: Final = 0x500
"""EFER's LME and LMA."""


def without(image: bytes, *parts: bytes) -> bytes:
    """A copy with zeroes in place of each part, which is in it once."""
    for part in parts:
        assert image.count(part) == 1
        image = image.replace(part, bytes(len(part)))
    return image


@pytest.mark.parametrize(
    ("missing", "long_mode"),
    [((), False), ((MULTIBOOT_MAGIC,), False), ((MULTIBOOT_MAGIC, PVH_NOTE), True)],
    ids=["multiboot", "pvh", "linux64"],
)
def test_the_first_entry_that_is_there_is_taken(missing: tuple[bytes, ...], long_mode: bool) -> None:
    """The header, without it the note, without both the ELF file's own entry, in long mode; each measures."""
    with Machine(BootSource(without(bootable_image(), *missing), "seconds=0.1 cpus=1")) as machine:
        assert machine.vcpus[0].get_sregs()["efer"] == LONG_MODE * long_mode
        machine.start()
        assert machine.wait(HANG_S) == DONE
        assert one_line(machine.console)["milliseconds"] == 100


def test_long_mode_is_entered_again_after_a_reset() -> None:
    """What Linux's protocol wants of page tables, GDT and registers is there at every boot."""
    with Machine(BootSource(bootable_image(), "seconds=0.1 cpus=1", protocol="linux64")) as machine:
        machine.start()
        assert machine.wait(HANG_S) == DONE
        first = machine.console
        machine.reset()
        machine.start()
        assert machine.wait(HANG_S) == DONE
        second = machine.console[len(first) :]
    assert one_line(first)["form"] == one_line(second)["form"] == "bare"
