"""PVH images: ELF files whose Xen note names a 32-bit entry, told of memory and command line by hvm_start_info.

Source: Xen's docs/misc/pvh.pandoc and public/arch-x86/hvm/start_info.h, version 1.
"""

from __future__ import annotations

import struct
from typing import Final

from pvclock._memory import GuestMemory
from pvclock.boot import elf
from pvclock.boot.entry import EntryState
from pvclock.boot.information import RAM, BootInformation, cmdline_at
from pvclock.boot.placement import Layout
from pvclock.boot.structure import load_with_structure
from pvclock.errors import ImageError

__all__ = ["find_entry", "load"]

NOTE_NAME: Final = b"Xen\0"
XEN_ELFNOTE_PHYS32_ENTRY: Final = 18
START_MAGIC: Final = 0x336EC578
"""ASCII "xEn3" with the high bit of the "E" set."""

START_INFO: Final = struct.Struct("<IIIIQQQQII")
MODULE: Final = struct.Struct("<QQQQ")
MEMORY_MAP_ENTRY: Final = struct.Struct("<QQII")


def find_entry(executable: elf.Elf) -> int | None:
    """Where the note says to enter it, or None if it has none; ImageError for damaged notes."""
    for note in elf.notes(executable):
        if (note.name, note.kind) == (NOTE_NAME, XEN_ELFNOTE_PHYS32_ENTRY):
            if len(note.content) not in (4, 8):
                raise ImageError(f"PVH note: an entry of {len(note.content)} bytes; it has 4 or 8")
            return int.from_bytes(note.content, "little")
    return None


def load(memory: GuestMemory, image: bytes, told: BootInformation) -> EntryState:
    """Load a PVH image and its start information; ImageError, with memory untouched, if it cannot be."""
    executable = elf.parse(image)
    entry = find_entry(executable)
    if entry is None:
        raise ImageError("the ELF file has no PVH note (XEN_ELFNOTE_PHYS32_ENTRY)")

    def start_information(layout: Layout, list_at: int) -> bytes:
        return _start_information(layout, list_at, told.firmware.rsdp)

    at = load_with_structure(memory, executable.segments, entry, told, start_information, _list_module)
    return EntryState("protected", entry, {"rbx": at})


def _start_information(layout: Layout, list_at: int, rsdp: int) -> bytes:
    """hvm_start_info and the memory map."""
    at, areas, modules = layout.information.start, layout.areas, len(layout.modules)
    list_at = list_at if modules else 0
    head = (START_MAGIC, 1, 0, modules, list_at, cmdline_at(at), rsdp, at + START_INFO.size, len(areas), 0)
    return START_INFO.pack(*head) + b"".join(MEMORY_MAP_ENTRY.pack(base, size, RAM, 0) for base, size in areas)


def _list_module(module: range, string: range) -> bytes:
    """An entry of the list; the address of an empty string, which is only a NUL, is 0."""
    return MODULE.pack(module.start, len(module), string.start if len(string) > 1 else 0, 0)
