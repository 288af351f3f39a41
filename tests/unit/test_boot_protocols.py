"""Which way an image is entered, and what each protocol promises its image: memory map, command line, registers."""

from __future__ import annotations

import struct

import pytest

from pvclock._memory import GuestMemory
from pvclock.boot import PROTOCOLS, BootSource, EntryState
from pvclock.boot.entry import BOOT_GDT, LongMode
from pvclock.boot.information import Firmware
from pvclock.boot.source import Protocol
from pvclock.errors import ConfigError, ImageError
from pvclock.guest_layout import (
    BOOT_INFORMATION,
    FLAT_BASE,
    LINUX_BOOT_PARAMS,
    LINUX_PAGE_TABLES,
    LINUX_PAGE_TABLES_BYTES,
)
from pvclock.machine import Machine
from tests.unit.boot_images import (
    BSS_BYTES,
    ENTRY,
    GPA,
    PATTERN,
    RAM_BYTES,
    TEXT,
    assert_damage_is_loaded_or_refused,
    content_offset,
    elf_file,
    multiboot_header,
    note,
    plain,
    program_header,
    with_addresses,
    with_notes,
)

pytestmark = pytest.mark.row("E18")

MUTATIONS = 4_000
LOADED_END = GPA + len(TEXT) + BSS_BYTES


@pytest.fixture
def ram() -> bytearray:
    """Guest RAM that holds a pattern."""
    return bytearray(PATTERN * RAM_BYTES)


@pytest.fixture
def memory(ram: bytearray) -> GuestMemory:
    """The guest memory over it."""
    return GuestMemory(ram)


def every_way() -> bytes:
    """A 64-bit image that all three protocols can enter, each elsewhere, as the probe's can."""
    headers = 2
    at = content_offset(64, headers)
    notes = note(content=(GPA + 2).to_bytes(8, "little"))
    addresses = struct.pack("<IIIII", GPA + at, GPA, 0, 0, GPA + 1)
    content = multiboot_header(1 << 16) + addresses + notes + TEXT
    size = at + len(content)
    load = program_header(64, offset=0, file_bytes=size, memory_bytes=size + BSS_BYTES)
    is_note = program_header(64, kind=4, offset=at + 32, file_bytes=len(notes), memory_bytes=len(notes))
    return elf_file(64, [load, is_note], content, entry=GPA + 3)


# Which protocol


def test_one_image_is_entered_each_way(memory: GuestMemory) -> None:
    """By its content as multiboot, else as it is told: mode, place and registers are the protocol's."""
    long_mode = LongMode(page_tables=LINUX_PAGE_TABLES, gdt=BOOT_INFORMATION)
    multiboot = EntryState("protected", GPA + 1, {"rax": 0x2BADB002, "rbx": BOOT_INFORMATION})
    image = every_way()
    protocols = [protocol for protocol in PROTOCOLS if protocol != "bzimage"]
    entered = {protocol: BootSource(image, protocol=protocol).load(memory) for protocol in (None, *protocols)}
    assert entered == {
        None: multiboot,
        "multiboot": multiboot,
        "pvh": EntryState("protected", GPA + 2, {"rbx": BOOT_INFORMATION}),
        "linux64": EntryState(long_mode, GPA + 3, {"rsi": LINUX_BOOT_PARAMS}),
        "flat": EntryState("real", FLAT_BASE, {}),
    }


@pytest.mark.parametrize(
    ("image", "chosen"),
    [
        (every_way(), "multiboot"),
        (with_notes(note() + multiboot_header(), bits=32), "multiboot"),
        (with_addresses(), "multiboot"),
        (with_notes(note()), "pvh"),
        (with_notes(note(), bits=32), "pvh"),
        (with_notes(note(b"Xen\0", 17) + note(b"GNU\0")), "linux64"),
        (plain(64), "linux64"),
        (TEXT, "flat"),
    ],
    ids=["all", "multiboot-and-note", "no-elf", "note", "note-32", "other-notes", "plain-64", "flat"],
)
def test_the_content_tells_the_protocol(image: bytes, chosen: Protocol, ram: bytearray) -> None:
    """Multiboot before PVH before Linux, and flat code is only what is no ELF file."""

    def outcome(protocol: Protocol | None) -> tuple[object, bytes]:
        space = bytearray(ram)
        try:
            return BootSource(image, protocol=protocol).load(GuestMemory(space)), bytes(space)
        except ImageError as error:
            return str(error), bytes(space)

    assert outcome(None) == outcome(chosen)
    assert all(outcome(None) != outcome(other) for other in PROTOCOLS if other != chosen)


@pytest.mark.parametrize(
    ("image", "protocol", "message"),
    [
        (plain(32), None, "32-bit ELF file with no multiboot header and no PVH note"),
        (plain(32), "linux64", "a 32-bit ELF file; Linux's"),
        (plain(64), "pvh", "no PVH note"),
        (plain(64), "multiboot", "no multiboot header"),
        (with_notes(multiboot_header()), None, "64-bit ELF file whose multiboot header has no address fields"),
        (TEXT, "pvh", "not a 32-bit or 64-bit little-endian ELF"),
        (TEXT, "linux64", "not a 32-bit or 64-bit little-endian ELF"),
    ],
)
def test_an_image_that_a_protocol_cannot_enter(
    image: bytes, protocol: Protocol | None, message: str, memory: GuestMemory, ram: bytearray
) -> None:
    """It is refused in words that say what it lacks, and memory is untouched."""
    with pytest.raises(ImageError, match=message):
        BootSource(image, "quiet", protocol=protocol).load(memory)
    assert ram == PATTERN * RAM_BYTES


@pytest.mark.parametrize("protocol", ["linux", "", 7])
def test_an_unknown_protocol(protocol: object) -> None:
    """A machine refuses it, before it makes anything."""
    with pytest.raises((ConfigError, TypeError), match=r"image\.protocol"):
        Machine(BootSource(TEXT, protocol=protocol))  # type: ignore[arg-type]


# What is told


def test_pvh_start_information(memory: GuestMemory) -> None:
    """hvm_start_info 1 with the command line, the initrd as module, and all slots as RAM; nothing else is written."""
    memory.add_slot(1 << 32, bytearray(8192))
    state = BootSource(with_notes(note()), "cpus=2", b"initrd").load(memory)
    assert state == EntryState("protected", ENTRY, {"rbx": BOOT_INFORMATION})
    magic, version, flags, modules, modules_at, cmdline, rsdp, map_at, entries, reserved = struct.unpack(
        "<IIIIQQQQII", memory.read(BOOT_INFORMATION, 56)
    )
    assert (magic, version, flags, modules, rsdp, reserved) == (0x336EC578, 1, 0, 1, 0, 0)
    assert memory.read(cmdline, 7) == b"cpus=2\0"
    at, length, its_cmdline, _ = struct.unpack("<QQQQ", memory.read(modules_at, 32))
    assert (at % 4096, memory.read(at, length), its_cmdline) == (0, b"initrd", 0)
    assert at >= LOADED_END
    table = [struct.unpack("<QQII", memory.read(map_at + number * 24, 24)) for number in range(entries)]
    assert table == [(0, RAM_BYTES, 1, 0), (1 << 32, 8192, 1, 0)]
    assert memory.read(GPA, len(TEXT) + BSS_BYTES + 1) == TEXT + bytes(BSS_BYTES) + PATTERN
    assert memory.read(BOOT_INFORMATION - 1, 1) == memory.read(map_at + 48, 1) == PATTERN


def test_pvh_without_an_initrd(memory: GuestMemory) -> None:
    """There is no module, and no list of them."""
    BootSource(with_notes(note())).load(memory)
    assert struct.unpack("<IQ", memory.read(BOOT_INFORMATION + 12, 4) + memory.read(BOOT_INFORMATION + 16, 8)) == (0, 0)


def test_linux_boot_params(memory: GuestMemory) -> None:
    """A zero page with a made-up setup header, command line, initrd and e820 map, as microVM monitors give it."""
    memory.add_slot(1 << 32, bytearray(8192))
    BootSource(plain(64), "quiet µ", b"initrd").load(memory)
    params = memory.read(LINUX_BOOT_PARAMS, 4096)
    assert (params[0x1FE:0x200], params[0x202:0x206], params[0x210]) == (b"\x55\xaa", b"HdrS", 0xFF)
    initrd, length = struct.unpack_from("<II", params, 0x218)
    assert (initrd % 4096, memory.read(initrd, length)) == (0, b"initrd")
    (cmdline,) = struct.unpack_from("<I", params, 0x228)
    (cmdline_bytes,) = struct.unpack_from("<I", params, 0x238)
    assert memory.read(cmdline, cmdline_bytes) == "quiet µ\0".encode()
    table = [struct.unpack_from("<QQI", params, 0x2D0 + number * 20) for number in range(params[0x1E8])]
    assert table == [(0, RAM_BYTES, 1), (1 << 32, 8192, 1)]


def test_linux_long_mode_tables(memory: GuestMemory) -> None:
    """The first GiB is mapped to itself in writable 2 MiB pages, and the GDT has 64-bit code at 0x10, data at 0x18."""
    state = BootSource(plain(64)).load(memory)
    assert isinstance(state.mode, LongMode)

    def table(at: int) -> tuple[int, ...]:
        return struct.unpack("<512Q", memory.read(at, 4096))

    (pdpt, *no_more) = table(state.mode.page_tables)
    (directory, *beyond) = table(pdpt & ~0xFFF)
    assert not any(no_more + beyond)
    assert pdpt & directory & 3 == 3
    assert table(directory & ~0xFFF) == tuple(number << 21 | 0x83 for number in range(512))
    null, unused, code, data = struct.unpack("<4Q", memory.read(state.mode.gdt, len(BOOT_GDT)))
    assert (null, unused) == (0, 0)
    assert (code >> 40 & 0xFF, code >> 53 & 3) == (0x9B, 1)  # present code, ring 0; L set, D clear
    assert data >> 40 & 0xFF == 0x93


def test_linux_maps_only_what_is_below_1_gib() -> None:
    """A segment that ends there is loaded, one that ends a byte further is refused, whatever RAM there is."""
    memory = GuestMemory(bytearray(RAM_BYTES))
    memory.add_slot((1 << 30) - 4096, bytearray(8192))

    def image(end: int) -> bytes:
        gpa = end - len(TEXT)
        header = program_header(64, offset=content_offset(64, 1), gpa=gpa, memory_bytes=len(TEXT))
        return elf_file(64, [header], TEXT, entry=gpa)

    BootSource(image(1 << 30)).load(memory)
    with pytest.raises(ImageError, match="beyond the first GiB"):
        BootSource(image((1 << 30) + 1)).load(memory)


@pytest.mark.parametrize(
    ("gpa", "told_at"),
    [
        (BOOT_INFORMATION - len(TEXT) - BSS_BYTES, BOOT_INFORMATION),
        (LINUX_PAGE_TABLES + LINUX_PAGE_TABLES_BYTES, BOOT_INFORMATION),
        (BOOT_INFORMATION - len(TEXT) - BSS_BYTES + 1, BOOT_INFORMATION + 0x1000),
        (LINUX_PAGE_TABLES + LINUX_PAGE_TABLES_BYTES - 1, 0xF000),
    ],
    ids=["ends-before", "begins-behind", "reaches-in", "begins-in"],
)
def test_what_linux_is_told_is_where_the_image_leaves_room(gpa: int, told_at: int, memory: GuestMemory) -> None:
    """GDT, boot_params and page tables move together, on a page above the image, and nothing lies over it."""
    state = BootSource(elf_file(64, [program_header(64, offset=content_offset(64, 1), gpa=gpa)], TEXT, entry=gpa)).load(
        memory
    )
    assert state == EntryState(LongMode(told_at + 0x2000, told_at), gpa, {"rsi": told_at + 0x1000})
    assert memory.read(gpa, len(TEXT) + BSS_BYTES) == TEXT + bytes(BSS_BYTES)
    assert memory.read(told_at, len(BOOT_GDT)) == BOOT_GDT
    assert struct.unpack("<I", memory.read(told_at + 0x1228, 4)) == (told_at + 0x100,)
    tables = struct.unpack("<Q", memory.read(told_at + 0x2000, 8)) + struct.unpack(
        "<Q", memory.read(told_at + 0x3000, 8)
    )
    assert tables == (told_at + 0x3003, told_at + 0x4003)


def test_what_linux_is_told_stays_below_1_gib() -> None:
    """Above it nothing is mapped at the entry, so an image that takes all that is below has no room."""
    memory = GuestMemory()
    memory.add_slot(GPA, bytearray(len(TEXT) + BSS_BYTES))
    memory.add_slot(1 << 30, bytearray(RAM_BYTES))
    with pytest.raises(ImageError, match="no room for the boot information"):
        BootSource(plain(64)).load(memory)


FIRMWARE = Firmware(rsdp=0xE0000, reserved=(range(0xA0000, 0x100000),))
RAM_BESIDE_FIRMWARE = [(0, 0xA0000), (1 << 20, RAM_BYTES - (1 << 20))]


def test_an_image_is_told_of_the_firmware(memory: GuestMemory) -> None:
    """PVH and Linux learn where ACPI's root pointer is; no map has the firmware's area as RAM."""
    BootSource(with_notes(note())).load(memory, FIRMWARE)
    rsdp, map_at, entries = struct.unpack("<QQI", memory.read(BOOT_INFORMATION + 32, 20))
    assert rsdp == FIRMWARE.rsdp
    table = [struct.unpack("<QQII", memory.read(map_at + number * 24, 24)) for number in range(entries)]
    assert table == [(*area, 1, 0) for area in RAM_BESIDE_FIRMWARE]
    BootSource(plain(64)).load(memory, FIRMWARE)
    params = memory.read(LINUX_BOOT_PARAMS, 4096)
    assert struct.unpack_from("<Q", params, 0x70) == (FIRMWARE.rsdp,)
    table = [struct.unpack_from("<QQI", params, 0x2D0 + number * 20) for number in range(params[0x1E8])]
    assert table == [(*area, 1) for area in RAM_BESIDE_FIRMWARE]
    BootSource(with_addresses()).load(memory, FIRMWARE)
    length, at = struct.unpack("<II", memory.read(BOOT_INFORMATION + 44, 8))
    table = [struct.unpack("<IQQI", memory.read(at + place, 24)) for place in range(0, length, 24)]
    assert table == [(20, *area, 1) for area in RAM_BESIDE_FIRMWARE]
    assert struct.unpack("<II", memory.read(BOOT_INFORMATION + 4, 8)) == (640, (RAM_BYTES >> 10) - 1024)


@pytest.mark.parametrize("protocol", ["multiboot", "pvh", "linux64"])
def test_an_image_over_the_firmware_is_refused(protocol: Protocol, memory: GuestMemory, ram: bytearray) -> None:
    """By its segment's and the firmware's places, with memory untouched."""
    firmware = Firmware(reserved=(range(GPA, GPA + 1),))
    with pytest.raises(ImageError, match=r"segment 0x100000\+0x[0-9a-f]+ overlaps the firmware's 0x100000\+0x1$"):
        BootSource(every_way(), protocol=protocol).load(memory, firmware)
    assert ram == PATTERN * RAM_BYTES


@pytest.mark.parametrize("protocol", ["pvh", "linux64"])
def test_no_room_or_too_much_of_it(protocol: Protocol) -> None:
    """Memory without the pages that are told in, an initrd that does not fit, more slots than a map has room for."""
    image = every_way()
    memory = GuestMemory()
    memory.add_slot(GPA, bytearray(0x1000))
    with pytest.raises(ImageError, match="no room for the boot information"):
        BootSource(image, protocol=protocol).load(memory)
    memory = GuestMemory(bytearray(RAM_BYTES))
    with pytest.raises(ImageError, match="no room for an initrd or module"):
        BootSource(image, "", bytes(RAM_BYTES), protocol).load(memory)
    for number in range(128):
        memory.add_slot((number + 1) << 32, bytearray(4096))
    with pytest.raises(ImageError, match="129 slots of guest memory"):
        BootSource(image, protocol=protocol).load(memory)


# Address fields


def test_multiboot_addresses_count_and_not_the_format(memory: GuestMemory) -> None:
    """What the header names is loaded where it says, with zeroes behind it, from in front of the header on."""
    state = BootSource(with_addresses(before=b"text", behind=b"not this")).load(memory)
    assert (state.mode, state.rip) == ("protected", GPA + 32)
    assert memory.read(GPA - 5, 5) == PATTERN + b"text"
    assert memory.read(GPA, 4) == multiboot_header()[:4]
    assert memory.read(GPA + 32, len(TEXT) + BSS_BYTES + 1) == TEXT + bytes(BSS_BYTES) + PATTERN


def test_multiboot_addresses_of_zero(memory: GuestMemory) -> None:
    """An end of 0 is the file's, and an end of zeroes of 0 is none."""
    BootSource(with_addresses(behind=b"this, too", end=0, bss_end=0)).load(memory)
    assert memory.read(GPA + 32, len(TEXT) + 10) == TEXT + b"this, too" + PATTERN


BAD_ADDRESSES: dict[str, tuple[bytes, str]] = {
    "begin-behind-the-header": (with_addresses(begin=GPA + 1), "addresses are damaged"),
    "begin-before-the-file": (with_addresses(begin=GPA - 1), "addresses are damaged"),
    "end-beyond-the-file": (with_addresses(end=GPA + 33 + len(TEXT), bss_end=0), "addresses are damaged"),
    "end-before-the-begin": (with_addresses(end=GPA - 1), "addresses are damaged"),
    "nothing": (with_addresses(end=GPA), "addresses are damaged"),
    "zeroes-before-the-end": (with_addresses(bss_end=GPA + 31 + len(TEXT)), "addresses are damaged"),
    "zeroes-beyond-memory": (with_addresses(bss_end=RAM_BYTES + 1), "is not in guest memory"),
    "entry-before-it": (with_addresses(entry=GPA - 1), "in no segment"),
    "unknown-requirement": (
        with_addresses().replace(multiboot_header(1 << 16), multiboot_header(1 << 16 | 4)),
        "flags 0x10004",
    ),
}


@pytest.mark.parametrize("image", BAD_ADDRESSES)
def test_bad_multiboot_addresses(image: str, memory: GuestMemory, ram: bytearray) -> None:
    """Each is refused in words, with memory untouched."""
    content, message = BAD_ADDRESSES[image]
    with pytest.raises(ImageError, match=message):
        BootSource(content).load(memory)
    assert ram == PATTERN * RAM_BYTES


# Damage


@pytest.mark.parametrize("protocol", ["multiboot", "pvh", "linux64"])
def test_every_truncation_is_refused(protocol: Protocol, memory: GuestMemory, ram: bytearray) -> None:
    """An image that ends early, wherever, is an ImageError in each way, and leaves memory alone."""
    image = every_way() if protocol != "multiboot" else with_addresses()
    for length in range(len(image)):
        with pytest.raises(ImageError):
            BootSource(image[:length], protocol=protocol).load(memory)
    assert ram == PATTERN * RAM_BYTES


@pytest.mark.parametrize(
    ("image", "protocol"),
    [(every_way(), None), (every_way(), "pvh"), (every_way(), "linux64"), (with_notes(note(), bits=32), None)],
    ids=["multiboot", "pvh", "linux64", "pvh-32"],
)
def test_no_mutation_of_an_image_gets_past_the_loader(image: bytes, protocol: Protocol | None) -> None:
    """4,000 damaged images each way load within guest memory, or are an ImageError with memory untouched."""

    def load(memory: GuestMemory, damaged: bytes) -> EntryState:
        return BootSource(damaged, protocol=protocol).load(memory)

    assert_damage_is_loaded_or_refused(load, image, seed=16, times=MUTATIONS, reach=len(image))
