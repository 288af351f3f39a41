"""Linux's own kernel files: where they go, what they are told, and which are refused before anything is written."""

from __future__ import annotations

import struct

import pytest

from pvclock._memory import GuestMemory
from pvclock.boot import BootSource, EntryState
from pvclock.boot.entry import BOOT_GDT, LongMode
from pvclock.boot.information import Firmware
from pvclock.errors import ImageError
from pvclock.guest_layout import BOOT_CMDLINE, BOOT_INFORMATION, LINUX_BOOT_PARAMS, LINUX_PAGE_TABLES
from tests.unit.boot_images import PATTERN, TEXT, assert_damage_is_loaded_or_refused
from tests.unit.kernel_images import ALIGNMENT, INIT_BYTES, KERNEL, PREFERRED, bzimage

pytestmark = pytest.mark.row("E22")

RAM_BYTES = PREFERRED + (8 << 20)
SMALL_RAM_BYTES = 8 << 20
"""Too little for the preferred address; the kernel goes lower then."""
FIRMWARE = Firmware(rsdp=0xE0000, reserved=(range(0xA0000, 0x100000),))
MUTATIONS = 2_000


@pytest.fixture
def memory() -> GuestMemory:
    """Guest memory that holds a pattern."""
    return GuestMemory(bytearray(PATTERN * RAM_BYTES))


def params_of(memory: GuestMemory) -> bytes:
    """The zero page."""
    return memory.read(LINUX_BOOT_PARAMS, 4096)


def test_a_kernel_is_where_it_prefers_to_be(memory: GuestMemory) -> None:
    """Its code and no more of the file is there, entered 0x200 behind in 64-bit mode, with RSI at boot_params."""
    state = BootSource(bzimage(behind=b"a signature")).load(memory)
    mode = LongMode(page_tables=LINUX_PAGE_TABLES, gdt=BOOT_INFORMATION)
    assert state == EntryState(mode, PREFERRED + 0x200, {"rsi": LINUX_BOOT_PARAMS})
    assert memory.read(PREFERRED - 1, len(KERNEL) + 2) == PATTERN + KERNEL + PATTERN
    assert memory.read(BOOT_INFORMATION, len(BOOT_GDT)) == BOOT_GDT


def test_what_a_kernel_is_told(memory: GuestMemory) -> None:
    """Its own setup header, completed: loader, command line, initrd; and e820 map and ACPI's root pointer."""
    image = bzimage()
    BootSource(image, "quiet µ", b"initrd").load(memory, FIRMWARE)
    params = params_of(memory)
    assert params[0x1F1:0x210] == image[0x1F1:0x210]
    assert params[0x22C:0x26C] == image[0x22C:0x26C]
    assert params[0x210] == 0xFF
    initrd, length, cmdline = (*struct.unpack_from("<II", params, 0x218), *struct.unpack_from("<I", params, 0x228))
    assert (initrd, memory.read(initrd, length)) == (PREFERRED + INIT_BYTES, b"initrd")
    assert (cmdline, memory.read(cmdline, 9)) == (BOOT_CMDLINE, "quiet µ\0".encode())
    assert struct.unpack_from("<Q", params, 0x70) == (0xE0000,)
    table = [struct.unpack_from("<QQI", params, 0x2D0 + number * 20) for number in range(params[0x1E8])]
    assert table == [(0, 0xA0000, 1), (1 << 20, RAM_BYTES - (1 << 20), 1)]


def test_a_setup_header_of_the_greatest_length(memory: GuestMemory) -> None:
    """What follows it in boot_params is not the file's."""
    longest = bytearray(bzimage(header_length=0xFF))
    longest[0x260 + 4 : 0x301] = b"\x77" * (0x301 - 0x264)
    BootSource(bytes(longest)).load(memory)
    params = params_of(memory)
    assert params[0x264:0x290] == b"\x77" * 0x2C
    assert params[0x290:0x2D0] == bytes(0x40)


def test_without_an_initrd(memory: GuestMemory) -> None:
    """Its address and length are 0, whatever the file has there."""
    BootSource(bzimage()).load(memory)
    assert params_of(memory)[0x218:0x220] == bytes(8)


@pytest.mark.parametrize("reserved", [(), (range(1 << 20, (1 << 20) + 1),), (range(ALIGNMENT, ALIGNMENT + 1),)])
def test_a_relocatable_kernel_goes_where_there_is_room(reserved: tuple[range, ...]) -> None:
    """At the lowest multiple of its alignment above 1 MiB, beside the firmware's areas, in RAM that is smaller."""
    memory = GuestMemory(bytearray(SMALL_RAM_BYTES))
    state = BootSource(bzimage(), "", b"initrd").load(memory, Firmware(reserved=reserved))
    start = 2 * ALIGNMENT if reserved and reserved[0].start == ALIGNMENT else ALIGNMENT
    assert state.rip == start + 0x200
    assert memory.read(start, len(KERNEL)) == KERNEL
    assert struct.unpack_from("<I", params_of(memory), 0x218) == (start + INIT_BYTES,)


def test_what_a_kernel_is_told_is_not_in_its_way(memory: GuestMemory) -> None:
    """Where the firmware has the usual place it is told on pages above that, still below the kernel."""
    state = BootSource(bzimage(), "quiet").load(memory, Firmware(reserved=(range(0x9000, 0xA000),)))
    assert state == EntryState(LongMode(page_tables=0xC000, gdt=0xA000), PREFERRED + 0x200, {"rsi": 0xB000})


BAD_KERNELS: dict[str, tuple[bytes, str]] = {
    "no-kernel": (bzimage(magic=b"HdrX"), "not a Linux kernel: a bzImage has 'HdrS' at 0x202"),
    "text": (TEXT, "not a Linux kernel"),
    "nothing": (b"", "not a Linux kernel"),
    "cut-in-its-header": (bzimage()[:0x263], "ends within its setup header: 611 bytes"),
    "cut": (bzimage()[:-1], r"truncated kernel: 1536 \+ 2048 bytes by its setup header, in a file of 3583"),
    "no-code": (bzimage(syssize=0x20), "truncated kernel: .* 512 bytes"),
    "more-sectors-than-file": (bzimage(setup_sects=255), "truncated kernel"),
    "old": (bzimage(version=0x20B), r"boot protocol 2\.11: the 64-bit entry is told of since 2\.12"),
    "oldest": (bzimage(version=0x100), r"boot protocol 1\.00"),
    "32-bit": (bzimage(xloadflags=0x7E), "a 32-bit kernel: XLF_KERNEL_64 is not set"),
    "zimage": (bzimage(loadflags=0x80), "a zImage.*LOADED_HIGH is not set"),
    "no-alignment": (bzimage(kernel_alignment=0), "kernel_alignment 0x0"),
    "odd-alignment": (bzimage(kernel_alignment=0x300000), "kernel_alignment 0x300000 .* no power of two"),
    "too-big": (bzimage(init_size=RAM_BYTES), r"no room for the kernel, which needs 24\.0 MiB.*; give it more"),
    "not-relocatable": (bzimage(relocatable_kernel=0, pref_address=RAM_BYTES), "at 0x1800000; it is not relocatable"),
    "below-1-mib": (bzimage(relocatable_kernel=0, pref_address=0x10000), "no room for the kernel.*at 0x10000"),
    "far-beyond": (bzimage(relocatable_kernel=0, pref_address=2**64 - 1), "no room for the kernel"),
}


@pytest.mark.parametrize("kernel", BAD_KERNELS)
def test_a_bad_kernel_is_refused_and_memory_untouched(kernel: str, memory: GuestMemory) -> None:
    """Each defect has its own message, and not a byte is written."""
    image, message = BAD_KERNELS[kernel]
    written: list[tuple[int, int]] = []
    memory.on_dirty = lambda gpa, length: written.append((gpa, length))
    with pytest.raises(ImageError, match=message):
        BootSource(image, protocol="bzimage").load(memory)
    assert written == []


def test_a_kernel_is_told_by_its_magic_number() -> None:
    """It is not taken for flat code, damaged or not."""
    assert BootSource(bzimage()).entered_by == "bzimage"
    assert BootSource(bzimage(version=0x200)[:0x210]).entered_by == "bzimage"
    assert BootSource(bzimage(magic=b"HdrX")).entered_by == "flat"


def test_0_setup_sectors_are_4(memory: GuestMemory) -> None:
    """As boot.rst has it of the oldest kernels."""
    image = bzimage(setup_sects=0)
    BootSource(image[:1536] + bytes(1024) + image[1536:]).load(memory)
    assert memory.read(PREFERRED, len(KERNEL)) == KERNEL


def test_command_lines_up_to_the_kernels_limit(memory: GuestMemory) -> None:
    """cmdline_size bytes without the NUL, or what the page holds if the kernel takes more."""
    BootSource(bzimage(cmdline_size=10), "x" * 10).load(memory)
    with pytest.raises(ImageError, match="command line of 11 bytes: at most 10"):
        BootSource(bzimage(cmdline_size=10), "x" * 11).load(memory)
    BootSource(bzimage(cmdline_size=1 << 20), "x" * 3839).load(memory)
    with pytest.raises(ImageError, match="command line of 3840 bytes: at most 3839"):
        BootSource(bzimage(cmdline_size=1 << 20), "x" * 3840).load(memory)


def test_an_initrd_up_to_the_kernels_limit(memory: GuestMemory) -> None:
    """initrd_addr_max is the highest address that it may take."""
    initrd = b"an initrd"
    last = PREFERRED + INIT_BYTES + len(initrd) - 1
    BootSource(bzimage(initrd_addr_max=last), "", initrd).load(memory)
    with pytest.raises(ImageError, match=f"no room for an initrd or module of 9 bytes from 0x1300000 to {last:#x}"):
        BootSource(bzimage(initrd_addr_max=last - 1), "", initrd).load(memory)


def test_a_kernel_stays_in_the_first_gib() -> None:
    """There is no more that is mapped at its entry; RAM above does not help."""
    memory = GuestMemory(bytearray(0x10000))
    memory.add_slot((1 << 30) - INIT_BYTES, bytearray(2 * INIT_BYTES))
    image = bzimage(kernel_alignment=1 << 20)
    assert BootSource(image).load(memory).rip == (1 << 30) - INIT_BYTES + 0x200
    with pytest.raises(ImageError, match="in the first GiB"):
        BootSource(bzimage(kernel_alignment=1 << 20, init_size=INIT_BYTES + 1)).load(memory)


def test_every_truncation_is_refused(memory: GuestMemory) -> None:
    """A kernel that ends early, wherever, is an ImageError."""
    image = bzimage()
    for length in range(len(image)):
        with pytest.raises(ImageError):
            BootSource(image[:length], protocol="bzimage").load(memory)


def test_no_mutation_of_a_kernel_gets_past_the_loader() -> None:
    """2,000 damaged headers load within guest memory, or are an ImageError with memory untouched."""

    def load(memory: GuestMemory, damaged: bytes) -> EntryState:
        return BootSource(damaged, "quiet", b"initrd", "bzimage").load(memory)

    image = bzimage(pref_address=1 << 20, kernel_alignment=1 << 20, init_size=1 << 20)
    assert_damage_is_loaded_or_refused(load, image, seed=18, times=MUTATIONS, reach=0x264)
