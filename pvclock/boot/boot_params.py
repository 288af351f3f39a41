"""What a Linux is told that is entered in 64-bit mode: boot_params, command line, page tables and a GDT.

Source: Linux, Documentation/arch/x86/boot.rst, "64-bit Boot Protocol", and zero-page.rst.
"""

from __future__ import annotations

import struct
from typing import Final

from pvclock.boot.entry import BOOT_GDT, LongMode
from pvclock.boot.information import RAM, cmdline_at
from pvclock.boot.placement import Layout
from pvclock.errors import ImageError
from pvclock.guest_layout import BOOT_INFORMATION, LINUX_BOOT_PARAMS, LINUX_PAGE_TABLES, LINUX_PAGE_TABLES_BYTES

__all__ = ["MAPPED_END", "SETUP_HEADER_AT", "TOLD_BYTES", "boot_params", "information", "long_mode", "params_at"]

TOLD_BYTES: Final = LINUX_PAGE_TABLES + LINUX_PAGE_TABLES_BYTES - BOOT_INFORMATION
"""GDT, command line, boot_params and page tables, wherever they begin."""

PAGE_BYTES: Final = 4096
LARGE_PAGE_BYTES: Final = 2 << 20
MAPPED_END: Final = 512 * LARGE_PAGE_BYTES
"""The first GiB is mapped to itself, as microVM monitors do: an image that relies on more would fail there, too."""
PRESENT_WRITABLE: Final = 0x3
LARGE: Final = 0x80

SETUP_HEADER_AT: Final = 0x1F1
"""In boot_params and in a bzImage alike."""

E820_ENTRY: Final = struct.Struct("<QQI")
E820_ENTRIES_MAX: Final = 128
# Offsets in boot_params.
RSDP_AT: Final = 0x70
E820_COUNT_AT: Final = 0x1E8
LOADER_AT: Final = 0x210
INITRD_AT: Final = 0x218
CMDLINE_AT: Final = 0x228
E820_AT: Final = 0x2D0

LOADER_UNDEFINED: Final = 0xFF


def params_at(layout: Layout) -> int:
    """Where boot_params is in what the kernel is told."""
    return layout.information.start + LINUX_BOOT_PARAMS - BOOT_INFORMATION


def boot_params(layout: Layout, setup_header: bytes, rsdp: int) -> bytes:
    """The zero page, with the setup header of the kernel, or one made up for it, completed; the module is the initrd.

    ImageError if its map has no room for all of the memory.
    """
    areas = layout.areas
    if len(areas) > E820_ENTRIES_MAX:
        raise ImageError(f"{len(areas)} slots of guest memory: boot_params holds {E820_ENTRIES_MAX}")
    params = bytearray(PAGE_BYTES)
    params[SETUP_HEADER_AT : SETUP_HEADER_AT + len(setup_header)] = setup_header
    params[E820_COUNT_AT] = len(areas)
    params[LOADER_AT] = LOADER_UNDEFINED
    struct.pack_into("<Q", params, RSDP_AT, rsdp)
    struct.pack_into("<I", params, CMDLINE_AT, cmdline_at(layout.information.start))
    for initrd in layout.modules:
        struct.pack_into("<II", params, INITRD_AT, initrd.start, len(initrd))
    for number, (base, size) in enumerate(areas):
        E820_ENTRY.pack_into(params, E820_AT + number * E820_ENTRY.size, base, size, RAM)
    return bytes(params)


def information(layout: Layout, cmdline: bytes, params: bytes) -> dict[int, bytes]:
    """All that it is told, by its addresses.  cmdline: with its NUL."""
    at = layout.information.start
    tables = _tables_at(layout)
    return {
        at: BOOT_GDT,
        cmdline_at(at): cmdline,
        params_at(layout): params,
        tables: _identity_page_tables(tables),
    }


def long_mode(layout: Layout) -> LongMode:
    """The mode that page tables and GDT are good for."""
    return LongMode(page_tables=_tables_at(layout), gdt=layout.information.start)


def _tables_at(layout: Layout) -> int:
    return layout.information.start + LINUX_PAGE_TABLES - BOOT_INFORMATION


def _identity_page_tables(base: int) -> bytes:
    """A PML4, a PDPT and a page directory at `base`, which map the first GiB."""
    first = [(base + level * PAGE_BYTES) | PRESENT_WRITABLE for level in (1, 2)]
    directory = [number * LARGE_PAGE_BYTES | PRESENT_WRITABLE | LARGE for number in range(512)]
    return b"".join(entry.to_bytes(8, "little").ljust(PAGE_BYTES, b"\0") for entry in first) + struct.pack(
        "<512Q", *directory
    )
