"""PVH images: ELF files whose Xen note names a 32-bit entry, told of memory and command line by hvm_start_info.

Source: Xen's docs/misc/pvh.pandoc and public/arch-x86/hvm/start_info.h, version 1.
"""

from __future__ import annotations

import struct
from typing import Final

from pvclock._memory import GuestMemory
from pvclock.boot import elf
from pvclock.boot.entry import EntryState
from pvclock.boot.information import (
    NO_FIRMWARE,
    RAM,
    Firmware,
    check_structure,
    cmdline_at,
    command_line,
    place_information,
    place_initrd,
    ram_areas,
)
from pvclock.boot.segments import check_segments, write_segments
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


def load(
    memory: GuestMemory, image: bytes, cmdline: str = "", initrd: bytes = b"", firmware: Firmware = NO_FIRMWARE
) -> EntryState:
    """Load a PVH image and its start information; ImageError, with memory untouched, if it cannot be.

    initrd: if there is one it is the first module, page-aligned, behind the image and above 1 MiB.
    """
    executable = elf.parse(image)
    entry = find_entry(executable)
    if entry is None:
        raise ImageError("the ELF file has no PVH note (XEN_ELFNOTE_PHYS32_ENTRY)")
    text = command_line(cmdline)
    check_segments(memory.slots, executable.segments, entry, firmware.reserved)
    taken = [*(segment.addresses for segment in executable.segments), *firmware.reserved]
    told = place_information(memory.slots, taken)
    module = place_initrd(memory.slots, [*taken, told], len(initrd))
    areas = ram_areas(memory.slots, firmware.reserved)
    info = _start_information(told.start, areas, module, firmware.rsdp)
    check_structure(info, areas)
    write_segments(memory, executable.segments)
    if module is not None:
        memory.write(module.start, initrd)
    memory.write(told.start, info)
    memory.write(cmdline_at(told.start), text)
    return EntryState("protected", entry, {"rbx": told.start})


def _start_information(at: int, areas: list[tuple[int, int]], module: range | None, rsdp: int) -> bytes:
    """hvm_start_info at `at`, the list of modules, and the memory map."""
    modules = b"" if module is None else MODULE.pack(module.start, len(module), 0, 0)
    modules_at = at + START_INFO.size
    map_at = modules_at + len(modules)
    entries = [MEMORY_MAP_ENTRY.pack(base, size, RAM, 0) for base, size in areas]
    modules_at *= bool(modules)
    head = (START_MAGIC, 1, 0, int(bool(modules)), modules_at, cmdline_at(at), rsdp, map_at, len(entries), 0)
    return START_INFO.pack(*head) + modules + b"".join(entries)
