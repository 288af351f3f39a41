"""PVH images: ELF files whose Xen note names a 32-bit entry, told of memory and command line by hvm_start_info.

Source: Xen's docs/misc/pvh.pandoc and public/arch-x86/hvm/start_info.h, version 1.  There is no RSDP.
"""

from __future__ import annotations

import struct
from typing import Final

from pvclock._memory import GuestMemory
from pvclock.boot import elf
from pvclock.boot.entry import EntryState
from pvclock.boot.information import INFORMATION, RAM, check_room, command_line, place_initrd
from pvclock.boot.segments import check_segments, write_segments
from pvclock.errors import ImageError
from pvclock.guest_layout import BOOT_CMDLINE, BOOT_INFORMATION

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


def load(memory: GuestMemory, image: bytes, cmdline: str = "", initrd: bytes = b"") -> EntryState:
    """Load a PVH image and its start information; ImageError, with memory untouched, if it cannot be.

    initrd: if there is one it is the first module, page-aligned, behind the image and above 1 MiB.
    """
    executable = elf.parse(image)
    entry = find_entry(executable)
    if entry is None:
        raise ImageError("the ELF file has no PVH note (XEN_ELFNOTE_PHYS32_ENTRY)")
    text = command_line(cmdline)
    check_segments(memory.slots, executable.segments, entry, INFORMATION)
    module = place_initrd(memory.slots, executable.segments, len(initrd))
    info = _start_information(memory, module)
    check_room(memory, INFORMATION, len(info))
    write_segments(memory, executable.segments)
    if module is not None:
        memory.write(module.start, initrd)
    memory.write(BOOT_INFORMATION, info)
    memory.write(BOOT_CMDLINE, text)
    return EntryState("protected", entry, {"rbx": BOOT_INFORMATION})


def _start_information(memory: GuestMemory, module: range | None) -> bytes:
    """hvm_start_info, the list of modules, and the memory map."""
    modules = b"" if module is None else MODULE.pack(module.start, len(module), 0, 0)
    modules_at = BOOT_INFORMATION + START_INFO.size
    map_at = modules_at + len(modules)
    entries = [MEMORY_MAP_ENTRY.pack(base, size, RAM, 0) for base, size in memory.slots]
    modules_at *= bool(modules)
    head = (START_MAGIC, 1, 0, int(bool(modules)), modules_at, BOOT_CMDLINE, 0, map_at, len(entries), 0)
    return START_INFO.pack(*head) + modules + b"".join(entries)
