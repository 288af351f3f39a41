"""Flat images: bytes that are put at an address and run from their first byte in real mode."""

from __future__ import annotations

from pvclock._memory import GuestMemory
from pvclock.boot.entry import EntryState
from pvclock.boot.information import NO_FIRMWARE, Firmware
from pvclock.boot.segments import overlaps
from pvclock.errors import GuestAddressError, ImageError
from pvclock.guest_layout import FLAT_BASE

__all__ = ["load"]

REAL_MODE_END = 0x10000


def load(memory: GuestMemory, image: bytes, base: int = FLAT_BASE, firmware: Firmware = NO_FIRMWARE) -> EntryState:
    """Put `image` at `base`; ImageError if it is empty, begins beyond 64 KiB or does not fit into guest memory."""
    if not image:
        raise ImageError("the image is empty")
    if not 0 <= base < REAL_MODE_END:
        raise ImageError(f"a flat image at {base:#x}; real mode begins below {REAL_MODE_END:#x}")
    if any(overlaps(range(base, base + len(image)), area) for area in firmware.reserved):
        raise ImageError(f"a flat image of {len(image)} bytes at {base:#x} overlaps what the firmware has in memory")
    try:
        memory.write(base, image)
    except GuestAddressError as error:
        raise ImageError(f"the image does not fit guest memory: {error}") from None
    return EntryState("real", base, {})
