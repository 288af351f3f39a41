"""Boot images, good and bad: what is loaded is where its headers say, and what is refused leaves memory as it was."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable

import pytest

from pvclock._memory import GuestMemory
from pvclock.boot import BootSource, EntryState, flat, multiboot
from pvclock.errors import ImageError
from pvclock.guest_layout import BOOT_CMDLINE, BOOT_CMDLINE_BYTES, BOOT_INFORMATION, FLAT_BASE
from pvclock.payloads import clockprobe
from tests.unit.boot_images import assert_damage_is_loaded_or_refused

pytestmark = pytest.mark.row("style")  # no row asks for a loader; other rows' guests come through it

RAM_BYTES = 4 << 20
GPA = 0x100000
ENTRY = GPA + 4
TEXT = b"the text of the guest"
BSS_BYTES = 11
MUTATIONS = 10_000

HEADER_AT = 84
TEXT_AT = 96


def load(memory: GuestMemory, image: bytes, cmdline: str = "") -> EntryState:
    """Load an image as a machine does."""
    return BootSource(image, cmdline).load(memory)


def header(flags: int = 3, *, magic: int = multiboot.HEADER_MAGIC, checksum: int | None = None) -> bytes:
    """A multiboot header."""
    return struct.pack("<III", magic, flags, -(magic + flags) % (1 << 32) if checksum is None else checksum)


def segment(
    gpa: int = GPA,
    *,
    kind: int = 1,
    offset: int = TEXT_AT,
    file_bytes: int = len(TEXT),
    memory_bytes: int = len(TEXT) + BSS_BYTES,
) -> bytes:
    """An ELF-32 program header, of the text unless told otherwise."""
    return struct.pack("<IIIIIIII", kind, offset, gpa, gpa, file_bytes, memory_bytes, 7, 4)


def elf(  # noqa: PLR0913  # each is a field to damage
    mb_header: bytes = b"",
    *,
    entry: int = ENTRY,
    ident: bytes = b"\x7fELF\x01\x01\x01",
    kind: int = 2,
    machine: int = 3,
    table: int = 52,
    entry_bytes: int = 32,
    count: int = 1,
    program_header: bytes = b"",
) -> bytes:
    """An ELF file of one segment, correct but for what is told."""
    first = struct.pack(
        "<16sHHIIIIIHHHHHH", ident, kind, machine, 1, entry, table, 0, 0, 52, entry_bytes, count, 0, 0, 0
    )
    return first + (program_header or segment()) + (mb_header or header()) + TEXT


@pytest.fixture
def ram() -> bytearray:
    """Guest RAM that holds a pattern."""
    return bytearray(b"\xa5" * RAM_BYTES)


@pytest.fixture
def memory(ram: bytearray) -> GuestMemory:
    """The guest memory over it."""
    return GuestMemory(ram)


def test_a_good_image_is_where_it_says(memory: GuestMemory) -> None:
    """Text, zeroed rest, boot information and command line are in place, and the entry is the ELF file's."""
    entry = load(memory, elf(), "quiet µ")
    assert entry == EntryState("protected", ENTRY, {"rax": 0x2BADB002, "rbx": BOOT_INFORMATION})
    assert memory.read(GPA, len(TEXT) + BSS_BYTES + 1) == TEXT + bytes(BSS_BYTES) + b"\xa5"
    flags, lower_kib, upper_kib = struct.unpack("<III", memory.read(BOOT_INFORMATION, 12))
    assert (flags, lower_kib, upper_kib) == (0b1000101, 640, RAM_BYTES // 1024 - 1024)
    (cmdline,) = struct.unpack("<I", memory.read(BOOT_INFORMATION + 16, 4))
    assert memory.read(cmdline, 9) == "quiet µ\0".encode()
    length, at = struct.unpack("<II", memory.read(BOOT_INFORMATION + 44, 8))
    assert struct.unpack("<IQQI", memory.read(at, length)) == (20, 0, RAM_BYTES, 1)


BAD_IMAGES: dict[str, tuple[bytes, str]] = {
    "no-header": (elf(bytes(12)), "no multiboot header"),
    "bad-checksum": (elf(header(checksum=1)), "no multiboot header"),
    "unaligned-header": (elf(b"\0\0" + header()), "no multiboot header"),
    "video-modes-wanted": (elf(header(1 << 2)), "flags 0x4: only page alignment"),
    "unknown-requirement": (elf(header(1 << 15)), "flags 0x8000"),
    "not-elf": (b"\0" + elf()[1:], "not a 32-bit or 64-bit little-endian ELF"),
    "big-endian": (elf(ident=b"\x7fELF\x01\x02\x01"), "not a 32-bit or 64-bit little-endian ELF"),
    "x86-64": (elf(machine=62), "machine 62"),
    "relocatable": (elf(kind=1), "type 1"),
    "table-beyond-the-file": (elf(table=1 << 20), "table at 0x100000 is damaged"),
    "table-at-the-top": (elf(table=0xFFFFFFFF), "table at 0xffffffff is damaged"),
    "huge-count": (elf(count=0xFFFF), "65535 entries"),
    "odd-entry-size": (elf(entry_bytes=33), "entries of 33 bytes"),
    "no-entry-size": (elf(entry_bytes=0), "entries of 0 bytes"),
    "nothing-to-load": (elf(count=0), "nothing to load"),
    "only-notes": (elf(program_header=segment(kind=4)), "nothing to load"),
    "more-file-than-memory": (elf(program_header=segment(memory_bytes=3)), "21 bytes from 0x60"),
    "segment-beyond-the-file": (elf(program_header=segment(offset=TEXT_AT + 1)), "21 bytes from 0x61"),
    "segment-beyond-memory": (elf(program_header=segment(RAM_BYTES - 1)), "is not in guest memory"),
    "segment-at-the-top": (elf(program_header=segment(0xFFFFFFFF)), "is not in guest memory"),
    "segment-of-4-gib": (elf(program_header=segment(memory_bytes=0xFFFFFFFF)), "is not in guest memory"),
    "entry-before-it": (elf(entry=GPA - 1), "entry at 0xfffff is in no segment"),
    "entry-behind-it": (elf(entry=GPA + len(TEXT) + BSS_BYTES), "entry at 0x100020 is in no segment"),
}


@pytest.mark.parametrize("image", BAD_IMAGES)
def test_a_bad_image_is_refused_and_memory_untouched(image: str, memory: GuestMemory, ram: bytearray) -> None:
    """Each defect has its own message, and not a byte is written."""
    content, message = BAD_IMAGES[image]
    with pytest.raises(ImageError, match=message):
        multiboot.load(memory, content)
    assert ram == b"\xa5" * RAM_BYTES


def test_every_truncation_is_refused(memory: GuestMemory, ram: bytearray) -> None:
    """An image that ends early, wherever, is an ImageError that leaves memory alone."""
    image = elf()
    for length in range(len(image)):
        with pytest.raises(ImageError):
            multiboot.load(memory, image[:length])
    assert ram == b"\xa5" * RAM_BYTES


@pytest.mark.row("E22")
@pytest.mark.parametrize(
    ("gpa", "memory_bytes", "told_at"),
    [
        (BOOT_INFORMATION - len(TEXT) - BSS_BYTES, len(TEXT) + BSS_BYTES, BOOT_INFORMATION),
        (BOOT_INFORMATION + 0x1000, len(TEXT), BOOT_INFORMATION),
        (BOOT_INFORMATION - len(TEXT), len(TEXT) + 1, BOOT_INFORMATION + 0x1000),
        (BOOT_INFORMATION + 0xFFF, len(TEXT), BOOT_INFORMATION + 0x2000),
        (0x8000, 0x5A30, 0xE000),
        (0x1000, RAM_BYTES - 0x2000, RAM_BYTES - 0x1000),
    ],
    ids=["ends-before", "begins-behind", "reaches-in", "begins-in", "around", "nearly-all"],
)
def test_boot_information_is_where_the_image_leaves_room(
    gpa: int, memory_bytes: int, told_at: int, memory: GuestMemory
) -> None:
    """At its usual place, which a segment may touch; else on the first free page above."""
    state = load(memory, elf(entry=gpa, program_header=segment(gpa, memory_bytes=memory_bytes)), "quiet")
    assert state.registers["rbx"] == told_at
    assert memory.read(gpa, memory_bytes) == TEXT + bytes(memory_bytes - len(TEXT))
    (cmdline,) = struct.unpack("<I", memory.read(told_at + 16, 4))
    assert (cmdline, memory.read(cmdline, 6)) == (told_at + 0x100, b"quiet\0")
    length, at = struct.unpack("<II", memory.read(told_at + 44, 8))
    assert struct.unpack("<IQQI", memory.read(at, length)) == (20, 0, RAM_BYTES, 1)


@pytest.mark.row("E22")
def test_an_initrd_is_behind_all_of_it(memory: GuestMemory) -> None:
    """Also where the information had to go behind the image."""
    image = elf(entry=0x1000, program_header=segment(0x1000, memory_bytes=1 << 20))
    state = BootSource(image, "", b"initrd").load(memory)
    told_at = state.registers["rbx"]
    (table,) = struct.unpack("<I", memory.read(told_at + 24, 4))
    (start,) = struct.unpack("<I", memory.read(table, 4))
    assert (told_at, start, memory.read(start, 6)) == (0x101000, 0x102000, b"initrd")


def test_an_image_that_leaves_no_room_is_refused(memory: GuestMemory, ram: bytearray) -> None:
    """Memory that is an image's from end to end has no page for what it is to be told."""
    image = elf(entry=0, program_header=segment(0, memory_bytes=RAM_BYTES - 0xFFF))
    with pytest.raises(ImageError, match="no room for the boot information"):
        multiboot.load(memory, image)
    assert ram == b"\xa5" * RAM_BYTES


# Segments, and what they make the loader allocate

PART_BYTES = 2 << 20


def many(*gpas: int, file_bytes: int, memory_bytes: int) -> bytes:
    """An ELF file whose segments all take the same `file_bytes` of it."""
    offset = TEXT_AT + 32 * (len(gpas) - 1)
    table = b"".join(segment(gpa, offset=offset, file_bytes=file_bytes, memory_bytes=memory_bytes) for gpa in gpas)
    return elf(count=len(gpas), program_header=table) + bytes(file_bytes)


def peak_bytes(load: Callable[[], object]) -> int:
    """How much `load()` has allocated at once, at most."""
    tracemalloc.start()
    try:
        load()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("order", [1, -1], ids=["by-address", "backwards"])
def test_segments_may_touch_but_not_overlap(order: int, memory: GuestMemory, ram: bytearray) -> None:
    """A segment begins where another ends, or behind that: one byte before is refused, and memory untouched."""
    length = len(TEXT) + BSS_BYTES
    at = [GPA, GPA + length, GPA + 2 * length][::order]
    overlapping = [GPA, GPA + length, GPA + 2 * length - 1][::order]
    with pytest.raises(ImageError, match=r"segments 0x100020\+0x20 and 0x10003f\+0x20 overlap"):
        multiboot.load(memory, many(*overlapping, file_bytes=len(TEXT), memory_bytes=length))
    assert ram == b"\xa5" * RAM_BYTES
    multiboot.load(memory, many(*at, file_bytes=len(TEXT), memory_bytes=length))
    assert memory.read(GPA, 3 * length + 1) == (TEXT + bytes(BSS_BYTES)) * 3 + b"\xa5"


def test_segments_that_overlap_allocate_nothing(memory: GuestMemory, ram: bytearray) -> None:
    """Of 200 segments that are the same 2 MiB of the file, not one is copied before they are refused."""
    image = many(*[GPA] * 200, file_bytes=PART_BYTES, memory_bytes=PART_BYTES)

    def refused() -> None:
        with pytest.raises(ImageError, match=r"0x100000\+0x200000 and 0x100000\+0x200000 overlap"):
            load(memory, image)

    assert peak_bytes(refused) < 2 * PART_BYTES
    assert ram == b"\xa5" * RAM_BYTES


@pytest.mark.parametrize("file_bytes", [0, 1, PART_BYTES])
def test_a_segment_is_written_piece_by_piece(file_bytes: int, memory: GuestMemory, ram: bytearray) -> None:
    """Loading a segment of 3 MiB, whatever part of it is zeroes, allocates no more than a few pages."""
    image = many(GPA, file_bytes=file_bytes, memory_bytes=RAM_BYTES - GPA - 1)
    assert peak_bytes(lambda: load(memory, image)) < 1 << 17
    expected = (TEXT + bytes(PART_BYTES))[:file_bytes].ljust(RAM_BYTES - GPA - 1, b"\0")
    assert ram[GPA:] == expected + b"\xa5"


@pytest.mark.parametrize(
    ("cmdline", "message"),
    [
        ("x" * BOOT_CMDLINE_BYTES, "at most 3839"),
        ("µ" * (BOOT_CMDLINE_BYTES // 2), "3840 bytes"),
        ("a\0b", "no NUL"),
        ("\ud800", "surrogates not allowed"),
    ],
)
def test_a_command_line_that_cannot_be_passed(cmdline: str, message: str, memory: GuestMemory, ram: bytearray) -> None:
    """Too long in bytes, with a NUL or not encodable: an ImageError that leaves memory alone."""
    with pytest.raises(ImageError, match=message):
        load(memory, elf(), cmdline)
    assert ram == b"\xa5" * RAM_BYTES


def test_the_longest_command_line(memory: GuestMemory) -> None:
    """It and its NUL fill the page to the end, and undecodable bytes of a shell's argument go through."""
    cmdline = "\udcff" + "x" * (BOOT_CMDLINE_BYTES - 2)
    load(memory, elf(), cmdline)
    assert memory.read(BOOT_CMDLINE, BOOT_CMDLINE_BYTES) == b"\xff" + cmdline[1:].encode() + b"\0"
    assert memory.read(BOOT_INFORMATION + 0x1000, 1) == b"\xa5"


@pytest.mark.parametrize("ram_bytes", [0x1000, 0x9FFF])
def test_no_room_for_the_boot_information(ram_bytes: int) -> None:
    """Memory that ends before the boot information does is refused."""
    image = elf(entry=0x200, program_header=segment(0x200))
    with pytest.raises(ImageError, match="no room for the boot information"):
        multiboot.load(GuestMemory(bytearray(ram_bytes)), image)


def test_no_memory_at_all() -> None:
    """Guest memory without a slot is an ImageError for either kind of image."""
    for image in (elf(), b"\xf4"):
        with pytest.raises(ImageError):
            load(GuestMemory(), image)


def test_memory_sizes_are_up_to_the_first_hole() -> None:
    """Lower and upper memory are what is there without a gap; the map tells of the rest."""
    memory = GuestMemory(bytearray(0x20000))
    memory.add_slot(1 << 20, bytearray(2 << 20))
    memory.add_slot(1 << 44, bytearray(0x1000))
    multiboot.load(memory, elf())
    assert struct.unpack("<II", memory.read(BOOT_INFORMATION + 4, 8)) == (128, 2048)
    assert struct.unpack("<I", memory.read(BOOT_INFORMATION + 44, 4)) == (3 * 24,)


def test_more_slots_than_the_information_holds() -> None:
    """A memory map that would run into the command line is refused."""
    memory = GuestMemory(bytearray(RAM_BYTES))
    for number in range(8):
        memory.add_slot((number + 1) << 32, bytearray(4096))
    with pytest.raises(ImageError, match="9 slots of guest memory"):
        multiboot.load(memory, elf())


# Flat images, and which is which


def test_a_flat_image_runs_from_where_it_is(memory: GuestMemory) -> None:
    """It is copied to the boot sector's address and entered there in real mode."""
    assert load(memory, b"\xf4") == EntryState("real", FLAT_BASE, {})
    assert memory.read(FLAT_BASE - 1, 3) == b"\xa5\xf4\xa5"


@pytest.mark.parametrize(
    "load",
    [
        lambda memory: flat.load(memory, b""),
        lambda memory: flat.load(memory, b"\xf4", base=0x10000),
        lambda memory: flat.load(memory, b"\xf4", base=-1),
        lambda memory: flat.load(memory, bytes(RAM_BYTES)),
    ],
    ids=["empty", "too-high", "negative", "too-long"],
)
def test_a_flat_image_that_does_not_fit(
    load: Callable[[GuestMemory], EntryState], memory: GuestMemory, ram: bytearray
) -> None:
    """It is refused, and memory untouched."""
    with pytest.raises(ImageError):
        load(memory)
    assert ram == b"\xa5" * RAM_BYTES


def test_elf_is_never_taken_for_flat_code(memory: GuestMemory) -> None:
    """An ELF file without a multiboot header is refused instead of run from its first byte."""
    with pytest.raises(ImageError, match="no multiboot header"):
        load(memory, elf(bytes(12)))


def test_no_mutation_of_an_image_gets_past_the_loader() -> None:
    """10,000 damaged clockprobes load within guest memory or are an ImageError, and nothing else ever happens."""
    headers_bytes = 256  # where most of what matters is
    assert_damage_is_loaded_or_refused(load, clockprobe(), seed=1, times=MUTATIONS, reach=headers_bytes)


@pytest.mark.parametrize("length", [1, 4096, 70_001])
def test_an_initrd_is_the_first_module(length: int, memory: GuestMemory) -> None:
    """It lies page-aligned behind image and 1 MiB, the information names it, and its string is empty."""
    initrd = bytes(n * 7 % 251 for n in range(length))
    BootSource(elf(), "quiet", initrd).load(memory)
    flags, count, table = (struct.unpack("<I", memory.read(BOOT_INFORMATION + at, 4))[0] for at in (0, 20, 24))
    assert (flags & 1 << 3, count) == (1 << 3, 1)
    begin, end, text, _ = struct.unpack("<IIII", memory.read(table, 16))
    assert memory.read(begin, end - begin) == initrd
    assert (begin % 4096, memory.read(text, 1)) == (0, b"\0")
    assert begin >= 1 << 20


def test_an_initrd_that_has_no_room_or_no_loader(memory: GuestMemory, ram: bytearray) -> None:
    """Larger than RAM, or of a flat image: an ImageError, with memory untouched."""
    before = bytes(ram)
    with pytest.raises(ImageError, match="no room for an initrd or module of"):
        BootSource(elf(), "", bytes(len(ram))).load(memory)
    with pytest.raises(ImageError, match="a flat image takes no initrd"):
        BootSource(b"\xf4", "", b"initrd").load(memory)
    assert bytes(ram) == before
