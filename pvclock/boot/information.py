"""What every boot protocol tells its image besides entering it: command line, modules, memory, and room for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from pvclock.boot.segments import overlaps
from pvclock.errors import ImageError
from pvclock.guest_layout import BOOT_CMDLINE, BOOT_CMDLINE_BYTES, BOOT_INFORMATION

__all__ = [
    "ADDRESSES_END",
    "INFORMATION_BYTES",
    "NO_FIRMWARE",
    "RAM",
    "BootInformation",
    "BootModule",
    "Firmware",
    "check_structure",
    "cmdline_at",
    "command_line",
    "place_information",
    "place_modules",
    "ram_areas",
]

INFORMATION_BYTES: Final = BOOT_CMDLINE + BOOT_CMDLINE_BYTES - BOOT_INFORMATION
"""Of a structure and the command line behind it."""

RAM: Final = 1
"""A memory map's word for it: e820's, multiboot's and PVH's."""

PAGE_BYTES: Final = 4096
MODULES_LOWEST: Final = 1 << 20
ADDRESSES_END: Final = 1 << 32
"""Multiboot and boot_params have pointers of 32 bits."""


class Firmware(NamedTuple):
    """What the machine has put into guest memory before the image.

    rsdp: where ACPI's root pointer is, 0 where there is no ACPI.  reserved: addresses that are no RAM for the image.
    """

    rsdp: int = 0
    reserved: tuple[range, ...] = ()


NO_FIRMWARE: Final = Firmware()


class BootModule(NamedTuple):
    """A file that an image finds in memory.  string: what comes with it, as after its name in a boot loader's menu."""

    content: bytes
    string: str = ""


class BootInformation(NamedTuple):
    """What an image is told.  modules: a Linux, which has one at most, calls it the initrd."""

    cmdline: str = ""
    modules: tuple[BootModule, ...] = ()
    firmware: Firmware = NO_FIRMWARE


def command_line(cmdline: str, most_bytes: int = BOOT_CMDLINE_BYTES - 1, name: str = "command line") -> bytes:
    """`cmdline` with its final NUL; bytes that Python could not decode (surrogates) go through as they were.

    ImageError if it has more than `most_bytes` without that.  name: for the message.
    """
    try:
        text = cmdline.encode(errors="surrogateescape")
    except UnicodeEncodeError as error:
        raise ImageError(f"{name}: {error}") from None
    most_bytes = min(most_bytes, BOOT_CMDLINE_BYTES - 1)
    if len(text) > most_bytes or b"\0" in text:
        raise ImageError(f"{name} of {len(text)} bytes: at most {most_bytes}, and no NUL")
    return text + b"\0"


def cmdline_at(information: int) -> int:
    """Where the command line is, in information that begins there."""
    return information + BOOT_CMDLINE - BOOT_INFORMATION


def place_information(
    slots: list[tuple[int, int]], taken: Iterable[range], length: int = INFORMATION_BYTES, end: int = ADDRESSES_END
) -> range:
    """`length` bytes for what the image is told: at BOOT_INFORMATION, or else the lowest page above with room.

    taken: the image's and the firmware's.  end: the first address that it may not reach.
    """
    taken = sorted(taken, key=lambda area: area.start)
    free_from = {BOOT_INFORMATION, *(area.stop for area in taken), *(base for base, _ in slots)}
    below, reach = 0, 0  # how many areas begin below the place's end, and how far those reach: an image may have 65535
    for start in sorted({_page(max(address, BOOT_INFORMATION)) for address in free_from}):
        place = range(start, start + length)
        while below < len(taken) and taken[below].start < place.stop:
            reach = max(reach, taken[below].stop)
            below += 1
        if reach <= start and _is_in(slots, place, end):
            return place
    raise ImageError(f"no room for the boot information: {length:#x} bytes from {BOOT_INFORMATION:#x} to {end:#x}")


def place_modules(
    slots: list[tuple[int, int]], taken: Iterable[range], lengths: Iterable[int], end: int = ADDRESSES_END
) -> list[range]:
    """Guest-physical addresses for modules of those lengths, each on pages of its own, behind all that is taken.

    end: the first address that they may not reach.
    """
    lowest = max(MODULES_LOWEST, *(area.stop for area in taken))
    places = []
    for length in lengths:
        place = _place_module(slots, lowest, length, end)
        places.append(place)
        lowest = place.stop
    return places


def _place_module(slots: list[tuple[int, int]], lowest: int, length: int, end: int) -> range:
    for base, _ in sorted(slots):
        start = _page(max(base, lowest))
        if _is_in(slots, range(start, start + length), end):
            return range(start, start + length)
    raise ImageError(
        f"no room for an initrd or module of {length} bytes from {lowest:#x} to {end:#x}: guest memory is {slots}; "
        "give it more"
    )


def ram_areas(slots: list[tuple[int, int]], reserved: Iterable[range]) -> list[tuple[int, int]]:
    """What of the slots is RAM for the image: base and length of each area, by address within a slot."""
    areas = []
    for base, size in slots:
        start = base
        for hole in sorted(reserved, key=lambda area: area.start):
            if overlaps(range(base, base + size), hole):
                areas.append((start, hole.start - start))
                start = hole.stop
        areas.append((start, base + size - start))
    return [(base, size) for base, size in areas if size > 0]


def check_structure(structure: bytes, areas: list[tuple[int, int]]) -> None:
    """ImageError unless the structure, whose memory map has these areas, ends before the command line."""
    if len(structure) > BOOT_CMDLINE - BOOT_INFORMATION:
        raise ImageError(f"{len(areas)} slots of guest memory are more than the boot information holds")


def _is_in(slots: list[tuple[int, int]], place: range, end: int) -> bool:
    return any(base <= place.start and place.stop <= min(base + size, end) for base, size in slots)


def _page(address: int) -> int:
    """The first address from there on that a page begins at."""
    return -(-address // PAGE_BYTES) * PAGE_BYTES
