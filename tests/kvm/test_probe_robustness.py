"""The bare image where a machine is not as it should be: firmware's tables lie, a clock is refused, a port is stuck."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest

from pvclock import Machine
from pvclock.errors import MsrFault
from tests.firmware_tables import LAPIC, POINTER, PROCESSOR, madt, mp_tables, root_pointer, rsdt
from tests.kvm.probe_machine import DONE, FAILED, run_on_machine
from tests.probe_line import Line

pytestmark = [pytest.mark.kvm, pytest.mark.row("E18")]

SYSTEM_TIME: Final = 0x4B564D01
LOCAL_APIC: Final = 0xFEE00000
TABLES: Final = POINTER + 0x1000
FAR_TABLES: Final = 0x800000
"""Beyond the image, with room for large ones."""


def probe(prepare: Callable[[Machine], object], *, vcpus: int = 2, status: int = DONE) -> Line:
    """What the image printed on a machine that `prepare` was called with."""
    return run_on_machine(prepare=prepare, status=status, vcpus=vcpus, timing_leaf=True)


def counts(found: Line) -> tuple[int, int]:
    """How many CPUs there are, and how many were measured."""
    return found["cpus_present"], len(found["cpus"])


# Firmware's tables


def write_root(machine: Machine, at: int, *addresses: int) -> None:
    """Put a root pointer where a guest looks for it, and at `at` an RSDT of those addresses."""
    machine.memory.write(at, rsdt(*addresses))
    machine.memory.write(POINTER, root_pointer(at))


def write_madt(machine: Machine, vcpus: int) -> None:
    """Firmware that tells of so many vCPUs."""
    machine.memory.write(TABLES, madt(LAPIC * vcpus))
    write_root(machine, TABLES + 0x1000, TABLES)


def write_mp_table(machine: Machine, vcpus: int) -> None:
    """An MP floating pointer, and a table that lists so many vCPUs."""
    pointer, table = mp_tables(TABLES, vcpus, PROCESSOR * vcpus)
    machine.memory.write(POINTER, pointer)
    machine.memory.write(TABLES, table)


def test_an_mp_table_lists_some_of_the_vcpus() -> None:
    """One of each package, by some firmware: the others are found all the same."""
    assert counts(probe(lambda machine: write_mp_table(machine, 1), vcpus=3)) == (3, 3)


def test_a_madt_of_one_vcpu_is_believed() -> None:
    """Nobody else is started then."""
    assert counts(probe(lambda machine: write_madt(machine, 1))) == (1, 1)


@pytest.mark.long
@pytest.mark.parametrize("write", [write_madt, write_mp_table])
def test_vcpus_that_never_come_are_not_awaited_for_ever(write: Callable[[Machine, int], None]) -> None:
    """Those that came are measured; a MADT's others are there, and an MP table's may be no vCPUs at all."""
    assert counts(probe(lambda machine: write(machine, 5))) == (5 if write is write_madt else 2, 2)


def test_tables_in_the_local_apic() -> None:
    """Ring 3 may not touch that page: what is said to be there is passed over, and what is behind it is read."""

    def write(machine: Machine) -> None:
        machine.memory.write(TABLES, madt(LAPIC))
        write_root(machine, TABLES + 0x1000, LOCAL_APIC - 8, LOCAL_APIC, LOCAL_APIC + 0x1FFFFF, TABLES)

    assert counts(probe(write)) == (1, 1)


def test_a_root_of_large_tables_without_end() -> None:
    """A table of 1 MiB, listed a quarter of a million times by another one: neither is summed up, and both ignored."""

    def write(machine: Machine) -> None:
        machine.memory.write(FAR_TABLES, madt(bytes((1 << 20) - 44)))
        write_root(machine, FAR_TABLES + (1 << 21), *[FAR_TABLES] * (((1 << 20) - 36) // 4))

    assert counts(probe(write)) == (2, 2)


# Clocks


@pytest.mark.parametrize("refused", [[0], [1], [0, 1, 2]])
def test_a_clock_that_some_vcpus_are_refused_is_none(refused: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a vCPU's record stays empty, and to read it would be to measure nonsense: the line says whom it is of."""

    def refuse(machine: Machine) -> None:
        write = machine.clock_service.write_msr

        def write_or_fault(vcpu: int, index: int, value: int) -> None:
            if index == SYSTEM_TIME and vcpu in refused:
                raise MsrFault(index, value)
            write(vcpu, index, value)

        monkeypatch.setattr(machine.clock_service, "write_msr", write_or_fault)

    found = probe(refuse, vcpus=3)
    assert [each["name"] for each in found["clocks"]] == ["tsc"]
    assert found["console"]["pvclock_refused"] == refused
    assert [page["cpu"] for page in found["pages"]] == [cpu for cpu in range(3) if cpu not in refused]
    assert all(page["mul"] for page in found["pages"])


# Consoles


class StuckUart:
    """A serial port that nobody takes anything from, but for its first byte: its FIFO stays full."""

    name = "COM1"

    def __init__(self) -> None:
        self.sent = b""

    def read(self, offset: int, _length: int) -> bytes:
        """Interrupt identification: FIFOs are on; line status: not empty."""
        return b"\xc1" if offset == 2 else b"\x00"

    def write(self, offset: int, data: bytes) -> None:
        """Keep what is sent."""
        if offset == 0:
            self.sent += data

    def reset(self) -> None:
        """It has no state."""


@pytest.mark.long
def test_a_serial_port_that_never_empties_is_given_up() -> None:
    """The debug console still gets the line; but nobody knows whether there is one, so the run has failed."""
    uart = StuckUart()
    assert probe(lambda machine: machine.bus.add_ports(0x3F8, 8, uart), status=FAILED)["console"]["com1"] == 1
    assert uart.sent == b"\n"
