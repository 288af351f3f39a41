"""The probe's image with fewer ways in: what a loader does where one of them is not there."""

from __future__ import annotations

import struct
from typing import Final

from pvclock.probe import bootable_image

__all__ = ["MULTIBOOT_MAGIC", "PVH_NOTE", "pvh_image", "without"]

MULTIBOOT_MAGIC: Final = struct.pack("<I", 0x1BADB002)
PVH_NOTE: Final = struct.pack("<I", 18) + b"Xen\0"
"""Its type and name."""


def without(image: bytes, *parts: bytes) -> bytes:
    """A copy with zeroes in place of each part, which is in it once."""
    for part in parts:
        assert image.count(part) == 1
        image = image.replace(part, bytes(len(part)))
    return image


def pvh_image() -> bytes:
    """The image as those enter it by its PVH note who would take its multiboot header first, as QEMU does."""
    return without(bootable_image(), MULTIBOOT_MAGIC)
