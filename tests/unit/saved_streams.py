"""QEMU migration streams for the tests: saved by QEMU 7.2, and changed.

`microvm-7.2` has clockprobe running in 16 MiB of RAM; of the older machine types, saved before their first instruction,
RAM is left out: pc-i440fx-2.8 does not say whether the clock is reliable, 2.3 has no footers, 2.2 no description.
"""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

FOLDER: Final = Path(__file__).parents[1] / "streams"
MICROVM: Final = gzip.decompress((FOLDER / "microvm-7.2.stream.gz").read_bytes())

CLOCK_NS: Final = 266_482_777
SECTION: Final = (
    b"\x04\0\0\0\x0e\x08kvmclock\0\0\0\0\0\0\0\x01"
    + struct.pack(">Q", CLOCK_NS)
    + b"\x05\x1akvmclock/clock_is_reliable\0\0\0\x01\x01\x7e\0\0\0\x0e"
)
"""MICROVM's, byte by byte."""
SECTION_AT: Final = MICROVM.index(SECTION)
DESCRIPTION_AT: Final = MICROVM.rindex(b'{"page_size"')
RAM_PAGE_AT: Final = 0x8000
"""In the middle of a page of guest RAM."""


def saved(machine: str) -> bytes:
    """The stream of that machine type."""
    return gzip.decompress((FOLDER / f"{machine}.stream.gz").read_bytes())


def overwritten(stream: bytes, at: int, content: bytes) -> bytes:
    """The stream with other bytes at an offset."""
    return stream[:at] + content + stream[at + len(content) :]


def forged(clock_ns: int) -> bytes:
    """A section that says another time, and behind it what begins the next one, as a guest may have it in its RAM."""
    return SECTION.replace(struct.pack(">Q", CLOCK_NS), struct.pack(">Q", clock_ns)) + b"\x04\0\0\0\x0f\x08acpi-ged"


def described(change: Callable[[dict[str, Any]], object]) -> bytes:
    """MICROVM with its description changed."""
    description = json.loads(MICROVM[DESCRIPTION_AT:])
    change(description)
    return with_description(json.dumps(description).encode())


def with_description(document: bytes) -> bytes:
    """MICROVM with another description."""
    return MICROVM[: DESCRIPTION_AT - 4] + struct.pack(">I", len(document)) + document


def in_libvirts_image(stream: bytes, compression: int = 0) -> bytes:
    """The stream as `virsh save` leaves it, behind a domain's XML."""
    xml = b"<domain type='kvm'/>\0"
    return struct.pack("=16s5I56x", b"LibvirtQemudSave", 2, len(xml), 1, compression, 0) + xml + stream
