"""Multiboot-1 images: anything with a multiboot header that says where it goes, or a 32-bit ELF file with a header.

Source: Multiboot Specification 0.6.96, sections 3.1 (header), 3.2 (machine state), 3.3 (information).  Where the header
has address fields (the "a.out kludge") they count and not the file's format, so that a 64-bit ELF file can be one.
Video modes are not offered.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from pvclock._memory import GuestMemory
from pvclock.boot import elf
from pvclock.boot.entry import EntryState
from pvclock.boot.information import RAM, BootInformation, cmdline_at
from pvclock.boot.placement import Layout
from pvclock.boot.segments import Segment
from pvclock.boot.structure import load_with_structure
from pvclock.errors import ImageError

__all__ = ["find_header", "load"]

HEADER_MAGIC: Final = 0x1BADB002
MAGIC_BYTES: Final = HEADER_MAGIC.to_bytes(4, "little")
HEADER_SEARCH_BYTES: Final = 8192
BOOTLOADER_MAGIC: Final = 0x2BADB002

WANTS_PAGE_ALIGNED_MODULES: Final = 1 << 0
WANTS_MEMORY_INFO: Final = 1 << 1
REQUIREMENTS: Final = 0xFFFF
"""Header flags that a loader must understand; the higher ones it may ignore, but for the addresses."""
HAS_ADDRESSES: Final = 1 << 16
ADDRESSES: Final = struct.Struct("<IIIII")

INFO_MEMORY: Final = 1 << 0
INFO_CMDLINE: Final = 1 << 2
INFO_MODULES: Final = 1 << 3
INFO_MEMORY_MAP: Final = 1 << 6
INFO_BYTES: Final = 52
LOWER_MEMORY_END: Final = 640 << 10
UPPER_MEMORY: Final = 1 << 20
MEMORY_MAP_ENTRY: Final = struct.Struct("<IQQI")
MODULE: Final = struct.Struct("<IIII")

NOTHING_TOLD: Final = BootInformation()


class Header(NamedTuple):
    """A multiboot header: its flags and where in the file it is."""

    flags: int
    offset: int


def find_header(image: bytes) -> Header | None:
    """The multiboot header, or None if the image has none."""
    searched = image[:HEADER_SEARCH_BYTES]
    offset = searched.find(MAGIC_BYTES)
    while 0 <= offset <= len(searched) - 12:
        magic, flags, checksum = struct.unpack_from("<III", searched, offset)
        if offset % 4 == 0 and (magic + flags + checksum) % (1 << 32) == 0:
            return Header(flags, offset)
        offset = searched.find(MAGIC_BYTES, offset + 1)
    return None


def load(memory: GuestMemory, image: bytes, told: BootInformation = NOTHING_TOLD) -> EntryState:
    """Load a multiboot image and its boot information; ImageError, with memory untouched, if it cannot be."""
    entry, segments = _parse(image)
    at = load_with_structure(memory, segments, entry, told, _information_structure, _list_module)
    return EntryState("protected", entry, {"rax": BOOTLOADER_MAGIC, "rbx": at})


def _parse(image: bytes) -> tuple[int, list[Segment]]:
    header = find_header(image)
    if header is None:
        raise ImageError(f"no multiboot header in the first {HEADER_SEARCH_BYTES} bytes")
    if header.flags & REQUIREMENTS & ~(WANTS_PAGE_ALIGNED_MODULES | WANTS_MEMORY_INFO):
        raise ImageError(
            f"multiboot header flags {header.flags:#x}: only page alignment and memory information are offered"
        )
    if header.flags & HAS_ADDRESSES:
        return _parse_addresses(image, header.offset)
    executable = elf.parse(image)
    if executable.bits != 32:
        raise ImageError("a 64-bit ELF file whose multiboot header has no address fields (flag 16)")
    return executable.entry, executable.segments


def _parse_addresses(image: bytes, offset: int) -> tuple[int, list[Segment]]:
    """The entry and the one segment that the header's address fields tell of."""
    if offset + 12 + ADDRESSES.size > len(image):
        raise ImageError(f"the file ends within the multiboot header at {offset:#x}")
    header_gpa, begin, end, bss_end, entry = ADDRESSES.unpack_from(image, offset + 12)
    first = offset - (header_gpa - begin)
    end = end or begin + len(image) - first  # 0: to the end of the file
    bss_end = bss_end or end  # 0: none
    if not (0 <= first <= offset and first + end - begin <= len(image) and begin < end <= bss_end):
        raise ImageError(
            f"multiboot addresses are damaged: header at {header_gpa:#x}, data from {begin:#x} to {end:#x}, zeroes to "
            f"{bss_end:#x}, of a file of {len(image)} bytes with the header at {offset:#x}"
        )
    return entry, [Segment(begin, memoryview(image)[first : first + end - begin], bss_end - begin)]


def _information_structure(layout: Layout, list_at: int) -> bytes:
    """The information structure and the memory map."""
    at, areas = layout.information.start, layout.areas
    entries = b"".join(MEMORY_MAP_ENTRY.pack(MEMORY_MAP_ENTRY.size - 4, base, size, RAM) for base, size in areas)
    info = bytearray(INFO_BYTES)
    flags = INFO_MEMORY | INFO_CMDLINE | INFO_MEMORY_MAP
    if layout.modules:
        flags |= INFO_MODULES
        struct.pack_into("<II", info, 20, len(layout.modules), list_at)
    lower_kib = min(_bytes_from(areas, 0), LOWER_MEMORY_END) // 1024
    upper_kib = min(_bytes_from(areas, UPPER_MEMORY) // 1024, 0xFFFFFFFF)
    struct.pack_into("<III", info, 0, flags, lower_kib, upper_kib)
    struct.pack_into("<I", info, 16, cmdline_at(at))
    struct.pack_into("<II", info, 44, len(entries), at + INFO_BYTES)
    return bytes(info) + entries


def _list_module(module: range, string: range) -> bytes:
    """An entry of the list; one without a string has an empty one, so that an image need not look."""
    return MODULE.pack(module.start, module.stop, string.start, 0)


def _bytes_from(areas: list[tuple[int, int]], gpa: int) -> int:
    """How much memory there is from `gpa` to the next hole, or to the end of its area."""
    return next((base + size - gpa for base, size in areas if base <= gpa < base + size), 0)
