"""ELF executables of both classes for x86: what is to be loaded where, the entry, and the notes.

Source: System V ABI, chapters 4 and 5 (ELF-32 and ELF-64 differ in the order of a program header's fields, too).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from pvclock.boot.segments import Segment
from pvclock.errors import ImageError

__all__ = ["MAGIC", "Elf", "Note", "notes", "parse"]

MAGIC: Final = b"\x7fELF"
IDENT_BYTES: Final = 16
ET_EXEC: Final = 2
EM_386: Final = 3
EM_X86_64: Final = 62
PT_LOAD: Final = 1
PT_NOTE: Final = 4

NOTES_BYTES_MAX: Final = 1 << 16
"""Of a file's notes, which take some hundred bytes: many headers may name the same megabytes, to keep a loader busy."""
NOTE_HEADER: Final = struct.Struct("<III")


class _Class(NamedTuple):
    """Layout of one ELF class.  header, program_header: behind what both classes have alike."""

    bits: int
    machine: int
    header: struct.Struct
    program_header: struct.Struct


CLASSES: Final = {
    MAGIC + b"\x01\x01\x01": _Class(32, EM_386, struct.Struct("<16sHHIIIIIHHHHHH"), struct.Struct("<IIIIIIII")),
    MAGIC + b"\x02\x01\x01": _Class(64, EM_X86_64, struct.Struct("<16sHHIQQQIHHHHHH"), struct.Struct("<IIQQQQQQ")),
}
"""By the first bytes of a file, which say class, little-endian, version 1."""


class _ProgramHeader(NamedTuple):
    kind: int
    offset: int
    gpa: int
    file_bytes: int
    memory_bytes: int
    alignment: int


class Elf(NamedTuple):
    """An executable: its class, entry, what to load, and where in the file its notes are."""

    image: bytes
    bits: int
    entry: int
    segments: list[Segment]
    note_headers: list[_ProgramHeader]


class Note(NamedTuple):
    """One of an ELF file's notes."""

    name: bytes
    kind: int
    content: bytes


def parse(image: bytes) -> Elf:
    """Take an executable for the 80386 or x86-64 apart; ImageError, which names the bad part, if it is damaged."""
    layout = CLASSES.get(image[:7])
    if layout is None or len(image) < layout.header.size:
        raise ImageError("not a 32-bit or 64-bit little-endian ELF file")
    _, kind, machine, _, entry, table, _, _, _, entry_bytes, count, *_ = layout.header.unpack_from(image)
    if kind != ET_EXEC or machine != layout.machine:
        raise ImageError(
            f"ELF type {kind}, machine {machine}: only executables (2) for the 80386 (3; 32-bit files) and "
            f"x86-64 (62; 64-bit files) can be loaded"
        )
    size = layout.program_header.size
    if entry_bytes != size or table + count * size > len(image):
        raise ImageError(f"ELF program header table at {table:#x} is damaged: {count} entries of {entry_bytes} bytes")
    headers = [_program_header(layout, image, table + number * size) for number in range(count)]
    segments = [_segment(image, each) for each in headers if each.kind == PT_LOAD and each.memory_bytes]
    if not segments:
        raise ImageError("the ELF file has nothing to load")
    return Elf(image, layout.bits, entry, segments, [each for each in headers if each.kind == PT_NOTE])


def _program_header(layout: _Class, image: bytes, at: int) -> _ProgramHeader:
    fields = layout.program_header.unpack_from(image, at)
    if layout.bits == 64:  # the flags come second
        kind, _, offset, _, gpa, file_bytes, memory_bytes, alignment = fields
    else:
        kind, offset, _, gpa, file_bytes, memory_bytes, _, alignment = fields
    return _ProgramHeader(kind, offset, gpa, file_bytes, memory_bytes, alignment)


def _segment(image: bytes, header: _ProgramHeader) -> Segment:
    _, offset, gpa, file_bytes, memory_bytes, _ = header
    if offset + file_bytes > len(image) or file_bytes > memory_bytes:
        raise ImageError(
            f"ELF segment at {gpa:#x}: {file_bytes} bytes from {offset:#x} of a file of {len(image)}, "
            f"{memory_bytes} in memory"
        )
    return Segment(gpa, memoryview(image)[offset : offset + file_bytes], memory_bytes)


def notes(elf: Elf) -> Iterator[Note]:
    """All notes of the file; ImageError where they are damaged."""
    if (total := sum(header.file_bytes for header in elf.note_headers)) > NOTES_BYTES_MAX:
        raise ImageError(f"ELF notes of {total} bytes: at most {NOTES_BYTES_MAX} are read")
    for header in elf.note_headers:
        yield from _notes_of(elf.image, header)


def _notes_of(image: bytes, header: _ProgramHeader) -> Iterator[Note]:
    begin, end = header.offset, header.offset + header.file_bytes
    if end > len(image):
        raise ImageError(f"ELF notes: {header.file_bytes} bytes from {begin:#x} of a file of {len(image)}")
    alignment = 8 if header.alignment == 8 else 4  # Linux and GNU's tools: 8 if the header says so, else 4
    at = begin
    while at + NOTE_HEADER.size <= end:
        name_bytes, content_bytes, kind = NOTE_HEADER.unpack_from(image, at)
        name_at = at + NOTE_HEADER.size
        content_at = _up(name_at + name_bytes - begin, alignment) + begin
        if content_at + content_bytes > end:
            raise ImageError(f"ELF note at {at:#x} is damaged: {name_bytes} and {content_bytes} bytes, to {end:#x}")
        content = image[content_at : content_at + content_bytes]
        yield Note(image[name_at : name_at + name_bytes], kind, content)
        at = _up(content_at + content_bytes - begin, alignment) + begin


def _up(length: int, alignment: int) -> int:
    return -(-length // alignment) * alignment
