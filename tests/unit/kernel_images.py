"""Kernel files (bzImage) to load and to damage: a setup header and a few pages of "kernel"."""

from __future__ import annotations

import struct
from typing import Final

__all__ = ["ALIGNMENT", "INIT_BYTES", "KERNEL", "PREFERRED", "bzimage"]

KERNEL: Final = bytes(range(256)) * 8
PREFERRED: Final = 16 << 20
ALIGNMENT: Final = 2 << 20
INIT_BYTES: Final = 3 << 20
SETUP_SECTORS: Final = 2

FIELDS: Final = {
    "setup_sects": (0x1F1, "B", SETUP_SECTORS),
    "syssize": (0x1F4, "I", len(KERNEL) // 16),
    "boot_flag": (0x1FE, "H", 0xAA55),
    "header_length": (0x201, "B", 0x6A),
    "version": (0x206, "H", 0x20F),
    "loadflags": (0x211, "B", 1),
    "initrd_addr_max": (0x22C, "I", 0x7FFFFFFF),
    "kernel_alignment": (0x230, "I", ALIGNMENT),
    "relocatable_kernel": (0x234, "B", 1),
    "xloadflags": (0x236, "H", 0x7F),
    "cmdline_size": (0x238, "I", 2047),
    "pref_address": (0x258, "Q", PREFERRED),
    "init_size": (0x260, "I", INIT_BYTES),
}
"""Offset, format and value; all but header_length named as in boot.rst."""


def bzimage(*, magic: bytes = b"HdrS", behind: bytes = b"", **fields: int) -> bytes:
    """A kernel file whose header is good, but for the fields that are given."""
    image = bytearray((SETUP_SECTORS + 1) * 512)
    image[0x202:0x206] = magic
    for name, (at, kind, value) in FIELDS.items():
        struct.pack_into(f"<{kind}", image, at, fields.pop(name, value))
    assert not fields
    return bytes(image) + KERNEL + behind
