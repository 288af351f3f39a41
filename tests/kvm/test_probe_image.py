"""The probe's bare image on real vCPUs: what it finds of the machine, what it is told, and what it prints."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from threading import Event
from typing import Final

import pytest

from pvclock import Machine
from pvclock.boot.source import Protocol
from pvclock.probe import bootable_image
from tests.kvm.probe_machine import DONE, FAILED, LIMIT_S, SHORT, run_on_machine
from tests.probe_line import Line, clock_of, one_line, slices

pytestmark = [pytest.mark.kvm, pytest.mark.row("E18")]

SYSTEM_TIME: Final = 0x4B564D01
REFERENCE_TSC: Final = 0x40000021
GUEST_STOPPED: Final = 1 << 1
RSDP: Final = 0xF0000
"""In the BIOS area, where a guest looks for it; other tables follow."""
PAGE_BYTES: Final = 0x200000
PAGE_ENTRY: Final = 0xE7
"""Of the image's page tables: 2 MiB, present, writable, user."""
PIT_HZ: Final = 1193182
PM_TIMER_HZ: Final = 3579545
PM_TIMER_PORT: Final = 0x608


def keeps_time(found: Line, it: Line) -> bool:
    """Whether as many of the clock's seconds went by between its first and last sample as of the TSC's."""
    (first_before, first, first_after), (last_before, last, last_after) = it["samples"][0], it["samples"][-1]
    seconds = (last - first) / it["hz"]
    shortest, longest = (ticks / found["tsc_hz"] for ticks in (last_before - first_after, last_after - first_before))
    rounding = 1 / it["hz"] + 1e-6 * longest
    return bool(shortest - rounding <= seconds <= longest + rounding)


# What it finds


@pytest.mark.parametrize("vcpus", [1, 3, pytest.param(4, marks=pytest.mark.long)])
def test_every_vcpu_takes_part(vcpus: int) -> None:
    """All vCPUs are in the line, by their APIC ids, with their pvclock records, each pair and each clock's samples."""
    found = run_on_machine(vcpus=vcpus)
    assert found["cpus"] == [{"cpu": number, "apic_id": number} for number in range(vcpus)]
    assert [page["cpu"] for page in found["pages"]] == [*range(vcpus)]
    assert all(page["mul"] > 0 and page["looks"] > page["stopped_looks"] == 0 for page in found["pages"])
    assert [each["name"] for each in found["clocks"]] == ["tsc", "pvclock"]
    for each in found["clocks"]:
        assert [pair["cpus"] for pair in each["pairs"]] == [[a, b] for a in range(vcpus) for b in range(a + 1, vcpus)]
        assert len(each["samples"]) == 9
        assert all(before < after for before, _, after in each["samples"])


@pytest.mark.parametrize("protocol", ["multiboot", "pvh", "linux64"])
def test_it_boots_by_three_protocols(protocol: Protocol) -> None:
    """By each it finds its command line and its vCPUs, and ends."""
    found = run_on_machine(SHORT, protocol=protocol, vcpus=2)
    assert (found["milliseconds"], len(found["cpus"])) == (100, 2)


def test_cpuid_is_the_guests_own() -> None:
    """The leaves of the line are those that the machine gives its vCPUs, whatever the host's ring 3 would see."""
    leaves = {}

    def keep_leaves(machine: Machine) -> None:
        assert machine.clock is not None
        leaves.update(machine.clock.cpuid_leaves)

    found = run_on_machine(prepare=keep_leaves, timing_leaf=True)
    seen = {leaf: tuple(registers) for leaf, _, *registers in found["cpuid"]}
    assert leaves
    assert {leaf: seen[leaf] for leaf in leaves} == {leaf: tuple(registers) for leaf, registers in leaves.items()}


@pytest.mark.parametrize(
    ("provider", "hz_from", "clocks", "msrs"),
    [
        ("HyperV", "hyperv", ["tsc", "hyperv"], (0, REFERENCE_TSC)),
        ("HyperV+KVM", "pvclock", ["tsc", "pvclock", "hyperv"], (SYSTEM_TIME, REFERENCE_TSC)),
        ("Minimal", "cpuid_40000010", ["tsc"], (0, 0)),
    ],
)
def test_clocks_are_those_that_cpuid_offers(
    provider: str, hz_from: str, clocks: list[str], msrs: tuple[int, int]
) -> None:
    """The paravirtual clocks that CPUID offers are enabled and read, and the TSC's frequency is the host's word."""
    hz = []

    def keep_hz(machine: Machine) -> None:
        assert machine.clock is not None
        hz.append(machine.clock.tsc_hz)

    found = run_on_machine(vcpus=2, provider=provider, prepare=keep_hz)
    assert found["tsc_hz_from"] == hz_from
    assert found["tsc_hz"] == pytest.approx(hz[0], rel=1e-6)  # MSRs and leaves are in kHz
    assert [each["name"] for each in found["clocks"]] == clocks
    assert all(keeps_time(found, each) for each in found["clocks"])
    assert (found["console"]["pvclock_msr"], found["console"]["hyperv_msr"]) == msrs


def test_without_a_frequency_it_fails() -> None:
    """Where neither CPUID nor a timer tells the TSC's frequency, that is what the line says."""
    assert "frequency" in run_on_machine(provider="None", status=FAILED)["error"]


class Speaker:
    """The port that gates the PIT: its first write, behind which the measurement begins, waits for a pause to end."""

    name = "speaker"

    def __init__(self) -> None:
        self.is_reached, self.may_go_on = Event(), Event()

    def read(self, _offset: int, _length: int) -> bytes:
        """Nothing is on."""
        return b"\x00"

    def write(self, _offset: int, _data: bytes) -> None:
        """Wait; the vCPU is out of the guest meanwhile."""
        self.is_reached.set()
        assert self.may_go_on.wait(LIMIT_S)

    def reset(self) -> None:
        """It has no state."""


def test_a_pause_shows_in_the_records() -> None:
    """Every look at a record whose GUEST_STOPPED flag is set and never cleared counts it."""
    speaker = Speaker()
    with Machine(bootable_image(), vcpus=2, cmdline=SHORT) as machine:
        machine.bus.add_ports(0x61, 1, speaker)
        machine.start()
        assert speaker.is_reached.wait(LIMIT_S)
        machine.pause()
        machine.resume()
        speaker.may_go_on.set()
        assert machine.wait(LIMIT_S) == DONE
        found = one_line(machine.console)
    for page in found["pages"]:
        assert page["flags"] & GUEST_STOPPED
        assert page["looks"] == page["stopped_looks"] > 1


# What it is told


def test_it_measures_on_as_many_cpus_as_it_is_told() -> None:
    """With cpus=2 those with the lowest APIC ids take part."""
    found = run_on_machine(f"{SHORT} cpus=2", vcpus=3)
    assert [cpu["apic_id"] for cpu in found["cpus"]] == [0, 1]


def test_an_added_offset_is_found() -> None:
    """A second that one vCPU's readings are behind by is in every window, and in no window of the others."""
    ns = -1_000_000_000
    found = run_on_machine(f"{SHORT} add=1:{ns}", vcpus=3)
    assert found["added_ns"] == [0, ns, 0]
    for each in found["clocks"]:
        added = ns * each["hz"] // 1_000_000_000
        for pair, windows in slices(found, each["name"]).items():
            expected = {(0, 1): added, (1, 2): -added}.get(pair, 0)
            assert all(expected in window for window in windows)


GARBAGE: Final = (
    "seconds= seconds=x seconds=-1 seconds=0 seconds=99999999999999999999 seconds=1e9 seconds=0.00001 seconds=1.5s "
    "cpus= cpus=0 cpus=65 cpus=-1 cpus=1x add= add=1 add=1: add=:5 add=99:1 add=1:- add=1:5x add=-1:5 "
    "add=1:99999999999999999999 === \x01\x7f\N{SNOWMAN} quiet xseconds=9 "
)


def test_garbage_on_the_command_line_is_passed_over() -> None:
    """Words that it does not know, values that make no sense, and what is beyond 2047 bytes, change nothing.

    The line has the words, each byte as the character of its number, and at their end the fault of a vCPU that is not
    there.
    """
    found = run_on_machine(f"{SHORT} add=2:5 {GARBAGE} {'x' * 2000} cpus=1", vcpus=2)
    assert (found["milliseconds"], len(found["cpus"])) == (100, 2)
    assert "added_ns" not in found
    *words, cut, of_nobody = found["ignored_options"]
    assert words == [word.encode().decode("latin-1") for word in GARBAGE.split()]
    assert set(cut) == {"x"}
    assert of_nobody == "add=2:5"


# Faults


def page_entries(first: int, count: int = 2) -> bytes:
    """Entries of the image's page tables, from that of page `first` on."""
    return struct.pack(f"<{count}Q", *(page * PAGE_BYTES + PAGE_ENTRY for page in range(first, first + count)))


def test_a_fault_is_told() -> None:
    """A vCPU that faults prints which fault it was and where, in place of the result, and the run ends as failed."""
    image = bootable_image()
    assert image.count(page_entries(0)) == 1
    unmapped = image.replace(page_entries(0), bytes(8) + page_entries(1, 1))  # where the boot information lies
    error = run_on_machine(image=unmapped, status=FAILED)["error"]
    assert "fault 0xe, error code 0x4" in error
    assert "address 0x9000" in error


# Consoles


class Uart:
    """A serial port as far as a sender sees it: with a FIFO that is always empty, or never."""

    name = "COM1"

    def __init__(self, *, is_stuck: bool = False) -> None:
        self.is_stuck = is_stuck
        self.sent = b""

    def read(self, offset: int, _length: int) -> bytes:
        """Interrupt identification: FIFOs are on; line status: empty."""
        return {2: b"\xc1", 5: b"\x00" if self.is_stuck else b"\x60"}.get(offset, b"\x00")

    def write(self, offset: int, data: bytes) -> None:
        """Keep what is sent."""
        if offset == 0:
            self.sent += data

    def reset(self) -> None:
        """It has no state."""


def test_the_line_goes_to_a_serial_port_too() -> None:
    """What COM1 gets is the debug console's line, after the end of a line that firmware may have left open."""
    uart = Uart()
    found = run_on_machine(prepare=lambda machine: machine.bus.add_ports(0x3F8, 8, uart))
    assert uart.sent.startswith(b"\n{")
    assert uart.sent.endswith(b"}\n")
    assert json.loads(uart.sent) == found
    assert found["console"]["com1"] == 1


def test_a_serial_port_that_never_empties_is_given_up() -> None:
    """The debug console still gets the line."""
    uart = Uart(is_stuck=True)
    assert run_on_machine(prepare=lambda machine: machine.bus.add_ports(0x3F8, 8, uart))["clocks"]
    assert uart.sent == b"\n"


# Firmware's tables and old timers


def with_checksum(table: bytes, at: int) -> bytes:
    """A table whose bytes sum to 0."""
    return table[:at] + bytes([-sum(table) & 0xFF]) + table[at + 1 :]


def acpi_table(signature: bytes, body: bytes) -> bytes:
    """An ACPI table with its header."""
    header = struct.pack("<4sIBB6s8sI4sI", signature, 36 + len(body), 1, 0, b"", b"", 0, b"", 0)
    return with_checksum(header + body, 9)


def madt(*is_enabled: bool) -> bytes:
    """A MADT with a local APIC for each of them."""
    entries = (struct.pack("<BBBBI", 0, 8, number, number, flag) for number, flag in enumerate(is_enabled))
    return acpi_table(b"APIC", bytes(8) + b"".join(entries))


def fadt() -> bytes:
    """A FADT that has a PM timer of 24 bits."""
    body = bytearray(116 - 36)
    struct.pack_into("<I", body, 76 - 36, PM_TIMER_PORT)
    body[91 - 36] = 4
    return acpi_table(b"FACP", bytes(body))


def write_tables(machine: Machine, *tables: bytes) -> None:
    """Put a root pointer and an RSDT with these tables where a guest looks for them."""
    at, addresses = RSDP + 0x1000, []
    for table in tables:
        machine.memory.write(at, table)
        addresses.append(at)
        at += 0x1000
    rsdt = acpi_table(b"RSDT", struct.pack(f"<{len(addresses)}I", *addresses))
    machine.memory.write(at, rsdt)
    machine.memory.write(RSDP, with_checksum(struct.pack("<8sB6sBI", b"RSD PTR ", 0, b"", 0, at), 8))


def mp_table(*is_enabled: bool) -> tuple[bytes, bytes]:
    """An MP floating pointer, and the table that it points to, one page behind it."""
    entries = b"".join(struct.pack("<BBBB16s", 0, number, 0, flag, b"") for number, flag in enumerate(is_enabled))
    header = struct.pack("<4sHBB20sIHHIHBB", b"PCMP", 44 + len(entries), 4, 0, b"", 0, 0, len(is_enabled), 0, 0, 0, 0)
    pointer = struct.pack("<4sIBBB5s", b"_MP_", RSDP + 0x1000, 1, 4, 0, b"")
    return with_checksum(pointer, 10), with_checksum(header + entries, 7)


def test_a_madt_says_how_many_vcpus_to_wait_for() -> None:
    """Where its one enabled vCPU is the boot processor nobody else is started."""
    assert len(run_on_machine(vcpus=2, prepare=lambda machine: write_tables(machine, madt(True, False)))["cpus"]) == 1


def test_an_mp_table_says_how_many_vcpus_to_wait_for() -> None:
    """As a MADT does, on machines without ACPI."""

    def write(machine: Machine) -> None:
        pointer, table = mp_table(True, False)
        machine.memory.write(RSDP, pointer)
        machine.memory.write(RSDP + 0x1000, table)

    assert len(run_on_machine(vcpus=2, prepare=write)["cpus"]) == 1


@pytest.mark.parametrize(
    "tables",
    [
        [
            with_checksum(madt(True), 9)[:-1] + b"\xff",
            struct.pack("<4sI", b"APIC", 0xFFFFFFFF) + bytes(28),
            struct.pack("<4sI", b"APIC", 0) + bytes(28),
            acpi_table(b"APIC", bytes(8) + b"\x00\x00" + bytes(6)),
        ],
        [acpi_table(b"APIC", bytes(8) + b"\x00\xff")],
    ],
    ids=["not whole, and an entry of 0 bytes", "entry cut off"],
)
def test_damaged_tables_are_passed_over(tables: list[bytes]) -> None:
    """They say nothing then, and those vCPUs take part that come."""
    assert len(run_on_machine(vcpus=2, prepare=lambda machine: write_tables(machine, *tables))["cpus"]) == 2


class Pit:
    """Channel 2 of a PIT that is latched before each reading."""

    name = "PIT"

    def __init__(self) -> None:
        self.bytes = b""

    def read(self, _offset: int, _length: int) -> bytes:
        """The latched count, low byte first."""
        first, self.bytes = self.bytes[:1], self.bytes[1:]
        return first or b"\xff"

    def write(self, offset: int, data: bytes) -> None:
        """Latch, if that is the command."""
        if offset == 1 and data == b"\x80":
            self.bytes = (-time.monotonic_ns() * PIT_HZ // 1_000_000_000 & 0xFFFF).to_bytes(2, "little")

    def reset(self) -> None:
        """It has no state."""


class PmTimer:
    """A PM timer of 24 bits."""

    name = "PM timer"

    def read(self, _offset: int, _length: int) -> bytes:
        """The count; the upper byte is 0."""
        return (time.monotonic_ns() * PM_TIMER_HZ // 1_000_000_000 & 0xFFFFFF).to_bytes(4, "little")

    def write(self, _offset: int, _data: bytes) -> None:
        """It cannot be set."""

    def reset(self) -> None:
        """It has no state."""


def add_pit(machine: Machine) -> None:
    """Put a PIT on the machine's bus."""
    machine.bus.add_ports(0x42, 2, Pit())


def add_pm_timer(machine: Machine) -> None:
    """Put a PM timer on the machine's bus, and into its firmware's tables."""
    machine.bus.add_ports(PM_TIMER_PORT, 4, PmTimer())
    write_tables(machine, fadt())


@pytest.mark.parametrize(("name", "hz", "add"), [("pit", PIT_HZ, add_pit), ("acpi_pm", PM_TIMER_HZ, add_pm_timer)])
def test_an_old_timer_is_read_and_tells_the_frequency(name: str, hz: int, add: Callable[[Machine], None]) -> None:
    """Where nothing better does it tells the TSC's; a clock of 64 bits is made of it, which goes on past its width."""
    found = run_on_machine(provider="None", prepare=add)
    assert found["tsc_hz_from"] == name
    it = clock_of(found, name)
    assert (it["hz"], it["pairs"]) == (hz, [])
    values = [value for _, value, _ in it["samples"]]
    assert values == sorted(values)
    assert values[-1] - values[0] > 0xFFFF
