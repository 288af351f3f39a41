"""Boot images to load and to damage: ELF files of both classes of one segment, multiboot headers, PVH notes."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

from pvclock._memory import GuestMemory
from pvclock.errors import ImageError

RAM_BYTES = 4 << 20
PATTERN = b"\xa5"
"""What guest memory holds before an image is loaded."""
GPA = 0x100000
ENTRY = GPA + 4
TEXT = b"the text of the guest"
BSS_BYTES = 11

HEADER_MAGIC = 0x1BADB002
PHYS32_ENTRY = 18

IDENTS = {32: b"\x7fELF\x01\x01\x01", 64: b"\x7fELF\x02\x01\x01"}
MACHINES = {32: 3, 64: 62}
HEADER_BYTES = {32: 52, 64: 64}
PROGRAM_HEADER_BYTES = {32: 32, 64: 56}


def multiboot_header(flags: int = 3, *, magic: int = HEADER_MAGIC, checksum: int | None = None) -> bytes:
    """A multiboot header without addresses."""
    return struct.pack("<III", magic, flags, -(magic + flags) % (1 << 32) if checksum is None else checksum)


def program_header(
    bits: int,
    *,
    kind: int = 1,
    offset: int,
    gpa: int = GPA,
    file_bytes: int = len(TEXT),
    memory_bytes: int = len(TEXT) + BSS_BYTES,
    alignment: int = 4,
) -> bytes:
    """A program header; its virtual address is of no interest, and so not the physical one."""
    if bits == 64:
        return struct.pack("<IIQQQQQQ", kind, 7, offset, gpa | 0xFFFF << 48, gpa, file_bytes, memory_bytes, alignment)
    return struct.pack("<IIIIIIII", kind, offset, gpa ^ 1 << 31, gpa, file_bytes, memory_bytes, 7, alignment)


def elf_file(  # noqa: PLR0913  # each is a field to damage
    bits: int,
    headers: list[bytes],
    content: bytes,
    *,
    ident: bytes = b"",
    kind: int = 2,
    machine: int | None = None,
    entry: int = ENTRY,
    table: int | None = None,
    entry_bytes: int | None = None,
    count: int | None = None,
) -> bytes:
    """An ELF file: its header, correct but for what is given, then program headers, then `content`."""
    layout = "<16sHHIQQQIHHHHHH" if bits == 64 else "<16sHHIIIIIHHHHHH"
    size = HEADER_BYTES[bits]
    first = struct.pack(
        layout,
        ident or IDENTS[bits],
        kind,
        MACHINES[bits] if machine is None else machine,
        1,
        entry,
        size if table is None else table,
        0,
        0,
        size,
        PROGRAM_HEADER_BYTES[bits] if entry_bytes is None else entry_bytes,
        len(headers) if count is None else count,
        0,
        0,
        0,
    )
    return first + b"".join(headers) + content


def content_offset(bits: int, headers: int) -> int:
    """Where in a file with so many program headers its content begins."""
    return HEADER_BYTES[bits] + headers * PROGRAM_HEADER_BYTES[bits]


def note(name: bytes = b"Xen\0", kind: int = PHYS32_ENTRY, content: bytes = ENTRY.to_bytes(4, "little")) -> bytes:
    """An ELF note, padded to 4 bytes."""
    return struct.pack("<III", len(name), len(content), kind) + _padded(name) + _padded(content)


def _padded(text: bytes, alignment: int = 4) -> bytes:
    return text + bytes(-len(text) % alignment)


def plain(bits: int = 64, **damage: int) -> bytes:
    """An ELF file of one segment without any note: in 64 bits what Linux's protocol enters."""
    return elf_file(bits, [program_header(bits, offset=content_offset(bits, 1))], TEXT, **damage)  # type: ignore[arg-type]


def with_notes(notes: bytes, bits: int = 64, alignment: int = 4) -> bytes:
    """The same with notes, which lie before the text."""
    at = content_offset(bits, 2)
    headers = [
        program_header(bits, offset=at + len(notes)),
        program_header(bits, kind=4, offset=at, file_bytes=len(notes), memory_bytes=len(notes), alignment=alignment),
    ]
    return elf_file(bits, headers, notes + TEXT)


def with_addresses(*, before: bytes = b"", behind: bytes = b"", **addresses: int) -> bytes:
    """A file that is no ELF: a multiboot header with address fields, and TEXT, at GPA; entered behind the header."""
    begin = GPA - len(before)
    fields = {"header": GPA, "begin": begin, "end": GPA + 32 + len(TEXT), "bss_end": GPA + 32 + len(TEXT) + BSS_BYTES}
    fields |= {"entry": GPA + 32} | addresses
    header = multiboot_header(1 << 16) + struct.pack("<IIIII", *fields.values())
    return before + header + TEXT + behind


def assert_damage_is_loaded_or_refused(
    load: Callable[[GuestMemory, bytes], object], image: bytes, *, seed: int, times: int, reach: int
) -> None:
    """Of `times` copies with damage in the first `reach` bytes, or cut: each loads within guest memory, or is refused.

    Refused is an ImageError before anything is written.  Both happen.
    """
    rng = random.Random(seed)  # noqa: S311  # reproducible
    guard, written = 4096, []
    space = bytearray(guard + RAM_BYTES + guard)
    memory = GuestMemory(memoryview(space)[guard:-guard])
    memory.on_dirty = lambda gpa, length: written.append((gpa, length))
    loaded = 0
    for _ in range(times):
        damaged = bytearray(image)
        for _ in range(rng.randint(1, 3)):
            # A good part of damage is a single odd field.
            damaged[rng.randrange(min(reach, len(image)))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        cut = rng.choice((len(image), len(image), rng.randrange(1, len(image))))
        written.clear()
        try:
            load(memory, bytes(damaged[:cut]))
        except ImageError:
            assert written == []
        else:
            loaded += 1
    assert 0 < loaded < times
    assert not any(space[:guard] + space[-guard:])
