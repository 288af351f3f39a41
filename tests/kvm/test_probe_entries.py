"""The probe's image on our runner as its content alone says how to enter it, and again after a reset."""

from __future__ import annotations

from typing import Final

import pytest

from pvclock import Machine
from pvclock.boot import BootSource
from pvclock.probe import bootable_image
from tests.kvm.probe_machine import DONE, LIMIT_S, SHORT, run_on_machine
from tests.probe_image import MULTIBOOT_MAGIC, PVH_NOTE, without
from tests.probe_line import one_line

pytestmark = [pytest.mark.kvm, pytest.mark.row("E18")]

ALONE: Final = f"{SHORT} cpus=1"
"""Nobody else is awaited."""
LONG_MODE: Final = 0x500
"""EFER's LME and LMA."""


@pytest.mark.parametrize(
    ("missing", "long_mode"),
    [((), False), ((MULTIBOOT_MAGIC,), False), ((MULTIBOOT_MAGIC, PVH_NOTE), True)],
    ids=["multiboot", "pvh", "linux64"],
)
def test_the_first_entry_that_is_there_is_taken(missing: tuple[bytes, ...], long_mode: bool) -> None:
    """The header, without it the note, without both the ELF file's own entry, in long mode; each measures."""
    modes = []
    image = without(bootable_image(), *missing)
    found = run_on_machine(ALONE, image=image, prepare=lambda it: modes.append(it.vcpus[0].get_sregs()["efer"]))
    assert modes == [LONG_MODE * long_mode]
    assert found["milliseconds"] == 100


def test_long_mode_is_entered_again_after_a_reset() -> None:
    """What Linux's protocol wants of page tables, GDT and registers is there at every boot."""
    with Machine(BootSource(bootable_image(), ALONE, protocol="linux64")) as machine:
        machine.start()
        assert machine.wait(LIMIT_S) == DONE
        first = machine.console
        machine.reset()
        machine.start()
        assert machine.wait(LIMIT_S) == DONE
        second = machine.console[len(first) :]
    assert one_line(first)["form"] == one_line(second)["form"] == "bare"
