"""ACPI's tables: found from the root pointer, read by an independent parser, and saying what a kernel needs."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from pvclock.guest_layout import ACPI_TABLES, RESET_VECTOR
from pvclock.machine import aml
from pvclock.machine.acpi import build_tables

pytestmark = pytest.mark.row("E22")

HEADER_BYTES = 36
CREATOR = slice(28, 36)
"""Who compiled it, in a table's header."""


class Tables:
    """The tables as a kernel finds them: from the RSDP by addresses."""

    def __init__(self, vcpus: int, max_vcpus: int | None = None) -> None:
        self._content = build_tables(vcpus, max_vcpus or vcpus)
        self.pointer = self._content[:36]
        xsdt = self._table(struct.unpack_from("<Q", self.pointer, 24)[0])
        entries = struct.unpack_from(f"<{(len(xsdt) - HEADER_BYTES) // 8}Q", xsdt, HEADER_BYTES)
        self.by_signature = {table[:4].decode(): table for table in (xsdt, *map(self._table, entries))}
        (dsdt_at,) = struct.unpack_from("<Q", self["FACP"], 140)
        self.by_signature["DSDT"] = self._table(dsdt_at)

    def __getitem__(self, signature: str) -> bytes:
        return self.by_signature[signature]

    def _table(self, gpa: int) -> bytes:
        assert gpa % 16 == 0
        at = gpa - ACPI_TABLES
        (length,) = struct.unpack_from("<I", self._content, at + 4)
        table = self._content[at : at + length]
        assert len(table) == length
        return table


def test_the_root_pointer() -> None:
    """Revision 2, with both checksums, and no RSDT."""
    pointer = Tables(1).pointer
    assert (pointer[:8], pointer[15]) == (b"RSD PTR ", 2)
    assert (sum(pointer[:20]) & 0xFF, sum(pointer) & 0xFF) == (0, 0)
    assert struct.unpack_from("<II", pointer, 16) == (0, 36)


@pytest.mark.parametrize("vcpus", [1, 2, 255, 1024])
def test_every_table_sums_to_zero(vcpus: int) -> None:
    """And there are these and no others, all below the end of the firmware's area."""
    tables = Tables(vcpus)
    assert set(tables.by_signature) == {"XSDT", "FACP", "APIC", "DSDT"}
    assert {sum(table) & 0xFF for table in tables.by_signature.values()} == {0}
    assert ACPI_TABLES + len(build_tables(vcpus, vcpus)) <= 0x100000


def test_the_fixed_table() -> None:
    """Hardware-reduced, revision 6; neither VGA nor an RTC; reset, sleep control and status are bytes of I/O space."""
    fadt = Tables(1)["FACP"]
    assert (fadt[8], len(fadt)) == (6, 276)
    assert struct.unpack_from("<H", fadt, 109) == (1 << 2 | 1 << 5,)
    assert struct.unpack_from("<I", fadt, 112) == (1 << 20 | 1 << 10,)
    registers = [struct.unpack_from("<BBBBQ", fadt, at) for at in (116, 244, 256)]
    assert registers == [(1, 8, 0, 1, port) for port in (0x602, 0x600, 0x601)]
    assert fadt[128] == 1
    rest = bytearray(fadt)
    assert fadt[131] == 5  # ACPI 6.5: from 6.3 on a kernel knows which vCPUs may come
    for begin, end in ((0, 36), (109, 116), (116, 129), (131, 132), (140, 148), (244, 268)):
        rest[begin:end] = bytes(end - begin)
    assert not any(rest)  # above all no PM timer, no SCI and no SMI


def entries(madt: bytes) -> list[bytes]:
    """The interrupt controllers of a MADT."""
    found, at = [], 44
    while at < len(madt):
        found.append(madt[at : at + madt[at + 1]])
        at += madt[at + 1]
    return found


def test_the_interrupt_controllers() -> None:
    """No PC-AT PICs; a local APIC for each vCPU, by its id, one IOAPIC from GSI 0 on, and no overrides."""
    madt = Tables(2)["APIC"]
    assert struct.unpack_from("<II", madt, 36) == (0xFEE00000, 0)
    first, second, ioapic = entries(madt)
    assert first == struct.pack("<BBBBI", 0, 8, 0, 0, 1)
    assert second == struct.pack("<BBBBI", 0, 8, 1, 1, 1)
    assert ioapic == struct.pack("<BBBBII", 1, 12, 0, 0, 0xFEC00000, 0)


def test_a_vcpu_that_may_come() -> None:
    """Its local APIC is not enabled but capable of coming online, and 0xff is nobody's id."""
    tables = Tables(1, 3)
    assert [entry[4] for entry in entries(tables["APIC"])[:3]] == [1, 2, 2]
    assert all(entry[2] == entry[3] for entry in entries(tables["APIC"])[:3])


def test_without_any_to_come_there_is_no_event_device() -> None:
    """Of vCPUs: neither processors nor a generic event device, beside the power button's; else all of both."""
    for vcpus, max_vcpus, devices in ((2, 2, 0), (1, 2, 2), (254, 255, 255)):
        dsdt = Tables(vcpus, max_vcpus)["DSDT"]
        assert dsdt.count(b"ACPI0007\0") == devices
        assert dsdt.count(b"ACPI0013\0") == 1 + bool(devices)


@pytest.mark.parametrize("vcpus", [1, 254])
def test_the_largest_tables_fit(vcpus: int) -> None:
    """As many vCPUs as a PC can declare, below the reset vector."""
    assert ACPI_TABLES + len(build_tables(vcpus, 255)) <= RESET_VECTOR


def test_more_vcpus_than_an_apic_id_of_8_bits_tells() -> None:
    """From id 255 on they are x2APICs."""
    *_, last_byte, first_long, ioapic = entries(Tables(256)["APIC"])
    assert last_byte == struct.pack("<BBBBI", 0, 8, 254, 254, 1)
    assert first_long == struct.pack("<BBHIII", 9, 16, 0, 255, 1, 255)
    assert ioapic[0] == 1


# AML


@pytest.mark.parametrize(
    ("term", "encoded"),
    [
        (aml.integer(0), "00"),
        (aml.integer(1), "01"),
        (aml.integer(2), "0a02"),
        (aml.integer(0xFF), "0aff"),
        (aml.integer(0x100), "0b0001"),
        (aml.integer(0xFFFF), "0bffff"),
        (aml.integer(0x10000), "0c00000100"),
        (aml.text("COM"), "0d434f4d00"),
        (aml.eisa_id("PNP0501"), "0c41d00501"),
        (aml.name("_S5", aml.integer(5)), "085f53355f0a05"),
        (aml.package(aml.integer(5), aml.integer(0)), "1205020a0500"),
        (aml.io_ports(0x3F8, 8), "4701f803f8030108"),
        (aml.interrupt(4), "890600030104000000"),
        (aml.resources(aml.io_ports(0x3F8, 8)), "110d0a0a4701f803f80301087900"),
        (aml.device("COM1", aml.integer(0)), "5b8206434f4d3100"),
        (aml.scope("_SB", aml.integer(1)), "10065f53425f01"),
        (aml.level_interrupt(9), "890600010109000000"),
        (aml.io_region("REGI", 0x610, 2), "5b8052454749010b10060a02"),
        (aml.field("REGI", "WORD"), "5b810b5245474902574f524410"),
        (aml.method("_EVT", 1, aml.return_value(aml.integer(0))), "14085f45565409a400"),
        (aml.less(aml.ARG0, aml.integer(1)), "956801"),
        (aml.equal(aml.ARG0, aml.reference("WORD")), "9368574f5244"),
        (aml.if_then(aml.integer(1), aml.notify("C001", 1)), "a0080186433030" + "3101"),
        (aml.while_loop(aml.integer(1), aml.increment(aml.ARG0)), "a204017568"),
        (aml.store(aml.integer(0), aml.reference("WORD")), "7000574f5244"),
        (aml.call("VCPF", aml.ARG0), "5643504668"),
    ],
)
def test_terms(term: bytes, encoded: str) -> None:
    """Each is as the specification spells it out."""
    assert term.hex() == encoded


@pytest.mark.parametrize("content_bytes", [0, 57, 58, 59, 0xFFF - 7, 0xFFF - 6, 0xFFF - 5, 0x10000])
def test_lengths_of_packages(content_bytes: int) -> None:
    """One byte up to 63, then the low 4 bits and bytes of 8; it counts itself, and is as short as can be."""
    term = aml.scope("_SB", bytes(content_bytes))
    more = term[1] >> 6
    if more:
        assert term[1] & 0x30 == 0
        length = term[1] & 0xF | int.from_bytes(term[2 : 2 + more], "little") << 4
    else:
        length = term[1] & 0x3F
    assert length == len(term) - 1 == 1 + more + 4 + content_bytes
    assert length - 1 >= (0, 0x3F, 0xFFF)[more]  # one byte less would not do


def test_a_resource_template_of_many_descriptors() -> None:
    """The buffer's own length is in front of it, in its shortest form."""
    template = aml.resources(*[aml.interrupt(gsi) for gsi in range(40)])
    assert template[:6] == bytes.fromhex("114f160b6a01")
    assert len(template) == 1 + 0x16F


# An independent parser


@pytest.fixture(scope="module")
def iasl() -> str:
    """Intel's compiler and disassembler."""
    program = shutil.which("iasl")
    if program is None:
        pytest.skip("no iasl to read the tables with: apt-get install acpica-tools")
    return program


def run(program: str, *arguments: str, cwd: Path) -> str:
    """What it prints, if it ends well."""
    done = subprocess.run([program, *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("max_vcpus", [3, 5, 255])
@pytest.mark.parametrize("signature", ["DSDT", "FACP", "APIC", "XSDT"])
def test_iasl_reads_and_writes_the_same(signature: str, max_vcpus: int, iasl: str, tmp_path: Path) -> None:
    """Taken apart and compiled again a table has the same bytes, but for the compiler's name and the checksum."""
    table = Tables(3, max_vcpus)[signature]
    (tmp_path / "table.dat").write_bytes(table)
    said = run(iasl, "-d", "table.dat", cwd=tmp_path)
    said += run(iasl, "-p", "again", "table.dsl", cwd=tmp_path)
    assert "0 Errors, 0 Warnings" in said
    assert "Invalid" not in said
    again = bytearray((tmp_path / "again.aml").read_bytes())
    again[CREATOR], again[9] = table[CREATOR], table[9]
    assert bytes(again) == table


def test_iasl_finds_com1_and_soft_off(iasl: str, tmp_path: Path) -> None:
    """COM1's interrupt is GSI 4, edge-triggered, active high and exclusive; soft off is type 5."""
    (tmp_path / "dsdt.dat").write_bytes(Tables(1)["DSDT"])
    run(iasl, "-d", "dsdt.dat", cwd=tmp_path)
    source = " ".join((tmp_path / "dsdt.dsl").read_text().split())
    com1 = source[source.index("Device (COM1)") : source.index("Device (PEVT)")]
    for fact in (
        'EisaId ("PNP0501")',
        "IO (Decode16, 0x03F8, // Range Minimum 0x03F8, // Range Maximum 0x01, // Alignment 0x08, // Length",
        "Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive, ,, ) { 0x00000004, }",
    ):
        assert fact in com1
    assert 'Name (_HID, "QEMU0001")' in source
    assert "Name (_S5, Package (0x04) // _S5_: S5 System State { 0x05, Zero, Zero, Zero })" in source
