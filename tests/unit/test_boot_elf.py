"""ELF files of both classes: what is taken from a good one, and what a damaged one is told."""

from __future__ import annotations

import struct

import pytest

from pvclock.boot import elf
from pvclock.boot.elf import NOTES_BYTES_MAX, Note, notes
from pvclock.boot.pvh import find_entry
from pvclock.errors import ImageError
from tests.unit.boot_images import (
    BSS_BYTES,
    ENTRY,
    GPA,
    TEXT,
    content_offset,
    elf_file,
    note,
    plain,
    program_header,
    with_notes,
)

pytestmark = pytest.mark.row("E18")

both = pytest.mark.parametrize("bits", [32, 64])


@both
def test_a_good_file(bits: int) -> None:
    """Its class, entry, and segment by its physical address; a segment of no bytes is none."""
    empty = program_header(bits, offset=0, file_bytes=0, memory_bytes=0)
    stack = program_header(bits, kind=0x6474E551, offset=1 << 31)  # PT_GNU_STACK, which names nothing in the file
    headers = [empty, stack, program_header(bits, offset=content_offset(bits, 3))]
    taken = elf.parse(elf_file(bits, headers, TEXT))
    assert (taken.bits, taken.entry) == (bits, ENTRY)
    ((gpa, content, memory_bytes),) = taken.segments
    assert (gpa, bytes(content), memory_bytes) == (GPA, TEXT, len(TEXT) + BSS_BYTES)


def damaged_segment(bits: int, **fields: int) -> bytes:
    """A file whose only program header has these fields."""
    return elf_file(bits, [program_header(bits, **{"offset": content_offset(bits, 1)} | fields)], TEXT)


@both
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"kind": 1}, "type 1"),
        ({"kind": 3}, "type 3"),
        ({"machine": 183}, "machine 183"),
        ({"table": 1 << 20}, "table at 0x100000 is damaged"),
        ({"table": 0xFFFFFFFF}, "table at 0xffffffff is damaged"),
        ({"count": 0xFFFF}, "65535 entries"),
        ({"entry_bytes": 0}, "entries of 0 bytes"),
        ({"count": 0}, "nothing to load"),
    ],
)
def test_a_damaged_header(bits: int, damage: dict[str, int], message: str) -> None:
    """The message names the field."""
    with pytest.raises(ImageError, match=message):
        elf.parse(plain(bits, **damage))


@pytest.mark.parametrize(("bits", "machine", "entry_bytes"), [(32, 62, 56), (64, 3, 32)])
def test_the_other_classs_numbers(bits: int, machine: int, entry_bytes: int) -> None:
    """A file of one class with the machine, or the program headers, of the other is damaged."""
    with pytest.raises(ImageError, match=f"machine {machine}"):
        elf.parse(plain(bits, machine=machine))
    with pytest.raises(ImageError, match=f"entries of {entry_bytes} bytes"):
        elf.parse(plain(bits, entry_bytes=entry_bytes))


@both
@pytest.mark.parametrize("ident", [b"\x7fELF\x03\x01\x01", b"\x7fELF\x01\x02\x01", b"\x7fELF\x02\x01\x02", b"MZ"])
def test_no_elf_file_that_we_know(bits: int, ident: bytes) -> None:
    """Another class, byte order or version, or none of it."""
    with pytest.raises(ImageError, match="not a 32-bit or 64-bit little-endian ELF"):
        elf.parse(elf_file(bits, [], TEXT, ident=ident))


@both
@pytest.mark.parametrize("far", [False, True])
def test_a_segment_that_is_not_in_the_file(bits: int, far: bool) -> None:
    """One byte beyond its end, or at the end of all offsets; and one with more in the file than in memory."""
    offset = (1 << bits) - 1 if far else content_offset(bits, 1) + 1
    with pytest.raises(ImageError, match=f"21 bytes from {offset:#x}"):
        elf.parse(damaged_segment(bits, offset=offset))
    with pytest.raises(ImageError, match="20 in memory"):
        elf.parse(damaged_segment(bits, memory_bytes=20))


# Notes


@both
@pytest.mark.parametrize("size", [4, 8])
def test_a_pvh_note_among_others(bits: int, size: int) -> None:
    """It is found by name and type, behind notes of odd lengths, with an entry of 4 or 8 bytes."""
    others = note(b"GNU\0", 18, b"12345") + note(b"Xen\0", 5, b"") + note(b"", 18, b"1") + note(b"Linux\0", 18, b"12")
    image = with_notes(others + note(content=ENTRY.to_bytes(size, "little")), bits)
    assert [each.kind for each in notes(elf.parse(image))] == [18, 5, 18, 18, 18]
    assert find_entry(elf.parse(image)) == ENTRY


def test_notes_that_are_aligned_to_8() -> None:
    """GNU's property notes are, where the program header says so; Xen's in a segment of their own are not."""
    property_note = struct.pack("<III", 4, 12, 5) + b"GNU\0" + bytes(12) + bytes(4)
    image = with_notes(property_note + note(b"Xen\0", 18, b"12345678"), alignment=8)
    assert list(notes(elf.parse(image))) == [Note(b"GNU\0", 5, bytes(12)), Note(b"Xen\0", 18, b"12345678")]


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (struct.pack("<III", 0xFFFFFFFF, 4, 18) + b"Xen\0", "note at .* is damaged"),
        (struct.pack("<III", 4, 0xFFFFFFFF, 18) + b"Xen\0", "note at .* is damaged"),
        (struct.pack("<III", 4, 5, 18) + b"Xen\0" + bytes(4), "note at .* is damaged"),
        (note(content=b""), "entry of 0 bytes"),
        (note(content=b"12345"), "entry of 5 bytes"),
        (bytes(NOTES_BYTES_MAX + 1), "notes of 65537 bytes"),
    ],
    ids=["name", "content", "one-byte", "no-entry", "odd-entry", "too-many"],
)
def test_damaged_notes(damaged: bytes, message: str) -> None:
    """They are an ImageError, not an image without a note."""
    with pytest.raises(ImageError, match=message):
        find_entry(elf.parse(with_notes(damaged)))


def test_notes_beyond_the_file() -> None:
    """A header of notes that the file does not hold is an error once they are looked for."""
    at = content_offset(64, 2)
    missing = program_header(64, kind=4, offset=at + len(TEXT), file_bytes=1)
    executable = elf.parse(elf_file(64, [program_header(64, offset=at), missing], TEXT))
    with pytest.raises(ImageError, match="ELF notes: 1 bytes from"):
        find_entry(executable)


def test_the_longest_notes_are_read() -> None:
    """64 KiB of empty notes end, and there is no PVH note among them."""
    empty = struct.pack("<III", 0, 0, 0)
    image = with_notes(empty * (NOTES_BYTES_MAX // len(empty)))
    assert find_entry(elf.parse(image)) is None
