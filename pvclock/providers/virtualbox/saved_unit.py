"""VirtualBox's saved unit "GIM", version 1, for emulators: which provider a VM has, and that provider's own part.

u32 provider id, u32 provider version, little-endian; then the part, which the provider encodes (Provider.save_unit()).
It holds what the guest wrote, not what time it is: that is ClockState's.
"""

from __future__ import annotations

import struct
from typing import Final

from pvclock.errors import StateFileError

__all__ = ["UNIT_VERSION", "decode_header", "encode_header"]

UNIT_VERSION: Final = 1

HEADER: Final = struct.Struct("<II")


def encode_header(provider: int, version: int) -> bytes:
    """Provider id and provider version."""
    return HEADER.pack(provider, version)


def decode_header(unit: bytes) -> tuple[int, int, bytes]:
    """Provider id, provider version and the provider's part; StateFileError if `unit` is too short."""
    if len(unit) < HEADER.size:
        raise StateFileError("unit", f"{len(unit)} bytes", f"at least {HEADER.size}: provider id and version")
    return *HEADER.unpack_from(unit), unit[HEADER.size :]
