"""Linux's 64-bit boot protocol for an uncompressed kernel (vmlinux), as microVM monitors enter one.

Source: Linux, Documentation/arch/x86/boot.rst, "64-bit Boot Protocol", and zero-page.rst.  Other than a bzImage such a
file has no setup header, so that of boot_params is made up, as Firecracker and crosvm do; the entry is the ELF file's.
"""

from __future__ import annotations

import struct
from typing import Final

from pvclock._memory import GuestMemory
from pvclock.boot import elf
from pvclock.boot.entry import BOOT_GDT, EntryState, LongMode
from pvclock.boot.information import RAM, check_room, command_line, place_initrd
from pvclock.boot.segments import Segment, check_segments, write_segments
from pvclock.errors import ImageError
from pvclock.guest_layout import (
    BOOT_CMDLINE,
    BOOT_INFORMATION,
    LINUX_BOOT_PARAMS,
    LINUX_PAGE_TABLES,
    LINUX_PAGE_TABLES_BYTES,
)

__all__ = ["load"]

TOLD: Final = range(BOOT_INFORMATION, LINUX_PAGE_TABLES + LINUX_PAGE_TABLES_BYTES)
"""GDT, command line, boot_params and page tables."""

PAGE_BYTES: Final = 4096
LARGE_PAGE_BYTES: Final = 2 << 20
MAPPED_END: Final = 512 * LARGE_PAGE_BYTES
"""The first GiB is mapped to itself, as those monitors do: an image that relies on more would fail there, too."""
PRESENT_WRITABLE: Final = 0x3
LARGE: Final = 0x80

E820_ENTRY: Final = struct.Struct("<QQI")
E820_ENTRIES_MAX: Final = 128
# Offsets in boot_params.
E820_COUNT_AT: Final = 0x1E8
BOOT_FLAG_AT: Final = 0x1FE
HEADER_MAGIC_AT: Final = 0x202
LOADER_AT: Final = 0x210
INITRD_AT: Final = 0x218
CMDLINE_AT: Final = 0x228
KERNEL_ALIGNMENT_AT: Final = 0x230
CMDLINE_BYTES_AT: Final = 0x238
E820_AT: Final = 0x2D0

BOOT_FLAG: Final = 0xAA55
HEADER_MAGIC: Final = int.from_bytes(b"HdrS", "little")
LOADER_UNDEFINED: Final = 0xFF
KERNEL_ALIGNMENT: Final = 16 << 20


def load(memory: GuestMemory, image: bytes, cmdline: str = "", initrd: bytes = b"") -> EntryState:
    """Load a 64-bit ELF file, boot_params, page tables and GDT; ImageError, with memory untouched, if it cannot be."""
    executable = elf.parse(image)
    if executable.bits != 64:
        raise ImageError("a 32-bit ELF file; Linux's 64-bit protocol enters 64-bit ones")
    text = command_line(cmdline)
    _check_mapped(executable.segments)
    check_segments(memory.slots, executable.segments, executable.entry, TOLD)
    place = place_initrd(memory.slots, executable.segments, len(initrd))
    params = _boot_params(memory, place, len(text))
    check_room(memory, TOLD, len(BOOT_GDT))
    write_segments(memory, executable.segments)
    if place is not None:
        memory.write(place.start, initrd)
    memory.write(BOOT_INFORMATION, BOOT_GDT)
    memory.write(BOOT_CMDLINE, text)
    memory.write(LINUX_BOOT_PARAMS, params)
    memory.write(LINUX_PAGE_TABLES, _identity_page_tables())
    mode = LongMode(page_tables=LINUX_PAGE_TABLES, gdt=BOOT_INFORMATION)
    return EntryState(mode, executable.entry, {"rsi": LINUX_BOOT_PARAMS})


def _check_mapped(segments: list[Segment]) -> None:
    for segment in segments:
        if segment.end > MAPPED_END:
            raise ImageError(f"segment {segment.range} is beyond the first GiB, which alone is mapped at the entry")


def _boot_params(memory: GuestMemory, initrd: range | None, cmdline_bytes: int) -> bytes:
    """The zero page."""
    if len(memory.slots) > E820_ENTRIES_MAX:
        raise ImageError(f"{len(memory.slots)} slots of guest memory: boot_params holds {E820_ENTRIES_MAX}")
    params = bytearray(PAGE_BYTES)
    params[E820_COUNT_AT] = len(memory.slots)
    params[LOADER_AT] = LOADER_UNDEFINED
    struct.pack_into("<H", params, BOOT_FLAG_AT, BOOT_FLAG)
    struct.pack_into("<I", params, HEADER_MAGIC_AT, HEADER_MAGIC)
    struct.pack_into("<I", params, CMDLINE_AT, BOOT_CMDLINE)
    struct.pack_into("<I", params, CMDLINE_BYTES_AT, cmdline_bytes)
    struct.pack_into("<I", params, KERNEL_ALIGNMENT_AT, KERNEL_ALIGNMENT)
    if initrd is not None:
        struct.pack_into("<II", params, INITRD_AT, initrd.start, len(initrd))
    for number, (base, size) in enumerate(memory.slots):
        E820_ENTRY.pack_into(params, E820_AT + number * E820_ENTRY.size, base, size, RAM)
    return bytes(params)


def _identity_page_tables() -> bytes:
    """A PML4, a PDPT and a page directory, which map the first GiB."""
    first = [(LINUX_PAGE_TABLES + level * PAGE_BYTES) | PRESENT_WRITABLE for level in (1, 2)]
    directory = [number * LARGE_PAGE_BYTES | PRESENT_WRITABLE | LARGE for number in range(512)]
    return b"".join(entry.to_bytes(8, "little").ljust(PAGE_BYTES, b"\0") for entry in first) + struct.pack(
        "<512Q", *directory
    )
