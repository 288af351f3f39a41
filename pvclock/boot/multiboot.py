"""Multiboot-1 images: 32-bit ELF files with a multiboot header, entered in protected mode.

Source: Multiboot Specification 0.6.96, sections 3.1 (header), 3.2 (machine state), 3.3 (information); ELF-32 of the
System V ABI.  The address fields that replace ELF ("a.out kludge") are not taken, nor video modes.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import Final, NamedTuple

from pvclock._memory import GuestMemory
from pvclock.boot.entry import EntryState
from pvclock.errors import GuestAddressError, ImageError
from pvclock.guest_layout import MULTIBOOT_CMDLINE, MULTIBOOT_CMDLINE_BYTES, MULTIBOOT_INFO

__all__ = ["ELF_MAGIC", "find_header", "load"]

HEADER_MAGIC: Final = 0x1BADB002
HEADER_SEARCH_BYTES: Final = 8192
BOOTLOADER_MAGIC: Final = 0x2BADB002

WANTS_PAGE_ALIGNED_MODULES: Final = 1 << 0
WANTS_MEMORY_INFO: Final = 1 << 1
REQUIREMENTS: Final = 0xFFFF
"""Header flags that a loader must understand; the higher ones it may ignore, but for the a.out addresses."""
HAS_AOUT_ADDRESSES: Final = 1 << 16

INFO_MEMORY: Final = 1 << 0
INFO_CMDLINE: Final = 1 << 2
INFO_MODULES: Final = 1 << 3
INFO_MEMORY_MAP: Final = 1 << 6
INFO_BYTES: Final = 52
INFO_END: Final = MULTIBOOT_CMDLINE + MULTIBOOT_CMDLINE_BYTES
LOWER_MEMORY_END: Final = 640 << 10
UPPER_MEMORY: Final = 1 << 20
MEMORY_MAP_ENTRY: Final = struct.Struct("<IQQI")
MODULE: Final = struct.Struct("<IIII")
MODULE_ALIGNMENT: Final = 4096
ADDRESSES_END: Final = 1 << 32
"""A multiboot guest's pointers have 32 bits."""

RAM: Final = 1

ELF_MAGIC: Final = b"\x7fELF"
ELF_IDENT_32_LITTLE: Final = ELF_MAGIC + b"\x01\x01\x01"
ELF_HEADER: Final = struct.Struct("<16sHHIIIIIHHHHHH")
ELF_SEGMENT: Final = struct.Struct("<IIIIIIII")
ET_EXEC: Final = 2
EM_386: Final = 3
PT_LOAD: Final = 1

ZEROES: Final = memoryview(bytes(1 << 16))


class Segment(NamedTuple):
    """A part of the file that goes to guest-physical `gpa`, followed by zeroes up to `memory_bytes`.

    content: a view of the file, for many segments may name the same part of it.
    """

    gpa: int
    content: memoryview
    memory_bytes: int

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.gpa + self.memory_bytes


def find_header(image: bytes) -> int | None:
    """The flags of the multiboot header, or None if the image has none."""
    for offset in range(0, min(len(image), HEADER_SEARCH_BYTES) - 11, 4):
        magic, flags, checksum = struct.unpack_from("<III", image, offset)
        if magic == HEADER_MAGIC and (magic + flags + checksum) % (1 << 32) == 0:
            return int(flags)
    return None


def load(memory: GuestMemory, image: bytes, cmdline: str = "", initrd: bytes = b"") -> EntryState:
    """Load a multiboot ELF image and its boot information; ImageError, with memory untouched, if it cannot be.

    initrd: if there is one it is the first module, page-aligned, behind the image and above 1 MiB.
    """
    flags = find_header(image)
    if flags is None:
        raise ImageError(f"no multiboot header in the first {HEADER_SEARCH_BYTES} bytes")
    unknown = flags & REQUIREMENTS & ~(WANTS_PAGE_ALIGNED_MODULES | WANTS_MEMORY_INFO)
    if unknown or flags & HAS_AOUT_ADDRESSES:
        raise ImageError(f"multiboot header flags {flags:#x}: only page alignment and memory information are offered")
    entry, segments = _parse_elf(image)
    text = _command_line(cmdline)
    _check_fit(memory.slots, segments)
    module = _place_module(memory.slots, segments, len(initrd)) if initrd else None
    info = _boot_information(memory, module, MULTIBOOT_CMDLINE + len(text) - 1)
    for segment in segments:
        _write(memory, segment)
    if module is not None:
        memory.write(module.start, initrd)
    memory.write(MULTIBOOT_INFO, info)
    memory.write(MULTIBOOT_CMDLINE, text)
    return EntryState(protected_mode=True, rip=entry, registers={"rax": BOOTLOADER_MAGIC, "rbx": MULTIBOOT_INFO})


def _parse_elf(image: bytes) -> tuple[int, list[Segment]]:
    if len(image) < ELF_HEADER.size or not image.startswith(ELF_IDENT_32_LITTLE):
        raise ImageError("not a 32-bit little-endian ELF file")
    _, kind, machine, _, entry, table, _, _, _, entry_bytes, count, *_ = ELF_HEADER.unpack_from(image)
    if kind != ET_EXEC or machine != EM_386:
        raise ImageError(f"ELF type {kind}, machine {machine}: only executables (2) for the 80386 (3) can be loaded")
    if entry_bytes != ELF_SEGMENT.size or table + count * ELF_SEGMENT.size > len(image):
        raise ImageError(f"ELF program header table at {table:#x} is damaged: {count} entries of {entry_bytes} bytes")
    segments = [_parse_segment(image, table + i * ELF_SEGMENT.size) for i in range(count)]
    loaded = [segment for segment in segments if segment is not None]
    if not loaded:
        raise ImageError("the ELF file has nothing to load")
    return entry, loaded


def _parse_segment(image: bytes, at: int) -> Segment | None:
    kind, offset, _, gpa, file_bytes, memory_bytes, _, _ = ELF_SEGMENT.unpack_from(image, at)
    if kind != PT_LOAD or memory_bytes == 0:
        return None
    if offset + file_bytes > len(image) or file_bytes > memory_bytes:
        raise ImageError(
            f"ELF segment at {gpa:#x}: {file_bytes} bytes from {offset:#x} of a file of {len(image)}, "
            f"{memory_bytes} in memory"
        )
    return Segment(gpa, memoryview(image)[offset : offset + file_bytes], memory_bytes)


def _check_fit(slots: list[tuple[int, int]], segments: list[Segment]) -> None:
    """ImageError unless all segments lie in memory and none overlaps another: this bounds the bytes to load by RAM's.

    An ELF file whose segments overlap is damaged, or made to keep a loader busy.
    """
    for segment in segments:
        if not any(base <= segment.gpa and segment.end <= base + size for base, size in slots):
            raise ImageError(f"ELF segment {_range(segment)} is not in guest memory: {slots}")
        if segment.gpa < INFO_END and segment.end > MULTIBOOT_INFO:
            raise ImageError(f"ELF segment {_range(segment)} overlaps the boot information at {MULTIBOOT_INFO:#x}")
    for lower, upper in pairwise(sorted(segments, key=lambda segment: segment.gpa)):
        if upper.gpa < lower.end:
            raise ImageError(f"ELF segments {_range(lower)} and {_range(upper)} overlap")


def _range(segment: Segment) -> str:
    return f"{segment.gpa:#x}+{segment.memory_bytes:#x}"


def _write(memory: GuestMemory, segment: Segment) -> None:
    """Write the segment's content and, by pieces, its zeroes: nothing is allocated by what the file says."""
    memory.write(segment.gpa, segment.content)
    for at in range(segment.gpa + len(segment.content), segment.end, len(ZEROES)):
        memory.write(at, ZEROES[: segment.end - at])


def _command_line(cmdline: str) -> bytes:
    """`cmdline` with its final NUL; bytes that Python could not decode (surrogates) go through as they were."""
    try:
        text = cmdline.encode(errors="surrogateescape")
    except UnicodeEncodeError as error:
        raise ImageError(f"command line: {error}") from None
    if len(text) >= MULTIBOOT_CMDLINE_BYTES or b"\0" in text:
        raise ImageError(f"command line of {len(text)} bytes: at most {MULTIBOOT_CMDLINE_BYTES - 1}, and no NUL")
    return text + b"\0"


def _place_module(slots: list[tuple[int, int]], segments: list[Segment], length: int) -> range:
    """Guest-physical addresses for a module of that length."""
    lowest = max(UPPER_MEMORY, *(segment.end for segment in segments))
    for base, size in sorted(slots):
        start = -(-max(base, lowest) // MODULE_ALIGNMENT) * MODULE_ALIGNMENT
        if start + length <= min(base + size, ADDRESSES_END):
            return range(start, start + length)
    raise ImageError(f"no room for an initrd of {length} bytes from {lowest:#x} on: {slots}")


def _boot_information(memory: GuestMemory, module: range | None, empty_text: int) -> bytes:
    """empty_text: where a NUL is."""
    entries = b"".join(MEMORY_MAP_ENTRY.pack(MEMORY_MAP_ENTRY.size - 4, base, size, RAM) for base, size in memory.slots)
    info = bytearray(INFO_BYTES)
    map_bytes, flags = len(entries), INFO_MEMORY | INFO_CMDLINE | INFO_MEMORY_MAP
    if module is not None:
        flags |= INFO_MODULES
        struct.pack_into("<II", info, 20, 1, MULTIBOOT_INFO + INFO_BYTES + map_bytes)
        entries += MODULE.pack(module.start, module.stop, empty_text, 0)
    lower_kib = min(_bytes_from(memory, 0), LOWER_MEMORY_END) // 1024
    upper_kib = min(_bytes_from(memory, UPPER_MEMORY) // 1024, 0xFFFFFFFF)
    struct.pack_into("<III", info, 0, flags, lower_kib, upper_kib)
    struct.pack_into("<I", info, 16, MULTIBOOT_CMDLINE)
    struct.pack_into("<II", info, 44, map_bytes, MULTIBOOT_INFO + INFO_BYTES)
    if INFO_BYTES + len(entries) > MULTIBOOT_CMDLINE - MULTIBOOT_INFO:
        raise ImageError(f"{len(memory.slots)} slots of guest memory are more than the boot information holds")
    try:
        memory.read(MULTIBOOT_INFO, INFO_END - MULTIBOOT_INFO)
    except GuestAddressError as error:
        raise ImageError(f"no room for the boot information: {error}") from None
    return bytes(info) + entries


def _bytes_from(memory: GuestMemory, gpa: int) -> int:
    """How much memory there is from `gpa` to the next hole, or to the end of its slot."""
    return next((base + size - gpa for base, size in memory.slots if base <= gpa < base + size), 0)
