"""What every boot protocol tells its image besides entering it: command line, initrd, and room for them."""

from __future__ import annotations

from typing import Final

from pvclock._memory import GuestMemory
from pvclock.boot.segments import Segment
from pvclock.errors import GuestAddressError, ImageError
from pvclock.guest_layout import BOOT_CMDLINE, BOOT_CMDLINE_BYTES, BOOT_INFORMATION

__all__ = ["INFORMATION", "RAM", "check_room", "command_line", "place_initrd"]

INFORMATION: Final = range(BOOT_INFORMATION, BOOT_CMDLINE + BOOT_CMDLINE_BYTES)
"""Where the information and the command line are."""

RAM: Final = 1
"""A memory map's word for it: e820's, multiboot's and PVH's."""

INITRD_LOWEST: Final = 1 << 20
INITRD_ALIGNMENT: Final = 4096
ADDRESSES_END: Final = 1 << 32
"""Multiboot and boot_params have pointers of 32 bits."""


def command_line(cmdline: str) -> bytes:
    """`cmdline` with its final NUL; bytes that Python could not decode (surrogates) go through as they were."""
    try:
        text = cmdline.encode(errors="surrogateescape")
    except UnicodeEncodeError as error:
        raise ImageError(f"command line: {error}") from None
    if len(text) >= BOOT_CMDLINE_BYTES or b"\0" in text:
        raise ImageError(f"command line of {len(text)} bytes: at most {BOOT_CMDLINE_BYTES - 1}, and no NUL")
    return text + b"\0"


def place_initrd(slots: list[tuple[int, int]], segments: list[Segment], length: int) -> range | None:
    """Guest-physical addresses for an initrd of that length, behind the image; None for none."""
    if not length:
        return None
    lowest = max(INITRD_LOWEST, *(segment.end for segment in segments))
    for base, size in sorted(slots):
        start = -(-max(base, lowest) // INITRD_ALIGNMENT) * INITRD_ALIGNMENT
        if start + length <= min(base + size, ADDRESSES_END):
            return range(start, start + length)
    raise ImageError(f"no room for an initrd of {length} bytes from {lowest:#x} on: {slots}")


def check_room(memory: GuestMemory, told: range, structure_bytes: int) -> None:
    """ImageError unless there is memory where the image is `told`, and the structure ends before the command line."""
    if structure_bytes > BOOT_CMDLINE - BOOT_INFORMATION:
        raise ImageError(f"{len(memory.slots)} slots of guest memory are more than the boot information holds")
    try:
        memory.read(told.start, len(told))
    except GuestAddressError as error:
        raise ImageError(f"no room for the boot information: {error}") from None
