"""Firmware's tables as a guest finds them: ACPI's, with a root pointer, and an MP table."""

from __future__ import annotations

import struct
from typing import Final

__all__ = ["LAPIC", "POINTER", "PROCESSOR", "acpi_table", "madt", "mp_tables", "root_pointer", "rsdt"]

POINTER: Final = 0xF0000
"""In the BIOS area, where a guest looks for both pointers."""
MP_HEADER_BYTES: Final = 44
LAPIC: Final = struct.pack("<BBBBI", 0, 8, 0, 0, 1)
"""An enabled CPU of a MADT."""
PROCESSOR: Final = struct.pack("<BBBB16s", 0, 0, 0, 1, b"")
"""An enabled CPU of an MP table."""


def with_checksum(table: bytes, at: int) -> bytes:
    """A table whose bytes sum to 0."""
    return table[:at] + bytes([-sum(table) & 0xFF]) + table[at + 1 :]


def acpi_table(signature: bytes, body: bytes) -> bytes:
    """An ACPI table with its header."""
    header = struct.pack("<4sIBB6s8sI4sI", signature, 36 + len(body), 1, 0, b"", b"", 0, b"", 0)
    return with_checksum(header + body, 9)


def madt(entries: bytes) -> bytes:
    """A MADT with these entries."""
    return acpi_table(b"APIC", bytes(8) + entries)


def rsdt(*addresses: int) -> bytes:
    """A root table of tables at those addresses."""
    return acpi_table(b"RSDT", struct.pack(f"<{len(addresses)}I", *addresses))


def root_pointer(rsdt_at: int) -> bytes:
    """What leads a guest to an RSDT."""
    return with_checksum(struct.pack("<8sB6sBI", b"RSD PTR ", 0, b"", 0, rsdt_at), 8)


def mp_tables(table_at: int, listed: int, entries: bytes, *, length: int | None = None) -> tuple[bytes, bytes]:
    """A pointer to an MP table, and the table; its header says that it lists so many, and how long it is."""
    length = MP_HEADER_BYTES + len(entries) if length is None else length
    pointer = struct.pack("<4sIBBB5s", b"_MP_", table_at, 1, 4, 0, b"")
    header = struct.pack("<4sHBB20sIHHIHBB", b"PCMP", length, 4, 0, b"", 0, 0, listed, 0, 0, 0, 0)
    table = header + entries
    return with_checksum(pointer, 10), with_checksum(table[:length], 7) + table[length:]
