"""The probe's image on our runner, entered by each boot protocol: the same measurement whatever way led to it."""

from __future__ import annotations

import pytest

from pvclock import Machine
from pvclock.boot import BootSource
from pvclock.boot.source import Protocol
from pvclock.probe import bootable_image
from tests.probe_line import clock_of, one_line, windows
from tests.waiting import HANG_S

pytestmark = [pytest.mark.kvm, pytest.mark.row("E18")]

DONE = 0


@pytest.mark.parametrize("protocol", [None, "multiboot", "pvh", "linux64"])
def test_each_entry_leads_to_the_measurement(protocol: Protocol | None) -> None:
    """By multiboot and PVH in protected mode, by Linux's in long mode: two vCPUs, and the time that was asked for."""
    with Machine(BootSource(bootable_image(), "seconds=0.1", protocol=protocol), vcpus=2) as machine:
        machine.start()
        assert machine.wait(HANG_S) == DONE
        line = one_line(machine.console)
    assert (line["form"], line["milliseconds"]) == ("bare", 100)
    assert [cpu["apic_id"] for cpu in line["cpus"]] == [0, 1]
    assert list(windows(line)) == [(0, 1)]
    assert clock_of(line)["cell_reads"] > 0


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
    assert one_line(first)["clocks"][0]["name"] == one_line(second)["clocks"][0]["name"] == "tsc"
