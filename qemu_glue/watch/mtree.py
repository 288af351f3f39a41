"""Where a QEMU guest's RAM is: guest-physical addresses by `info mtree -f`, QEMU's own by `gpa2hva`.

Source: QEMU's mtree_print_flatview() and hmp_gpa2hva(), 4.0 to 10.x: a range's priority, "nv-" before its kind, its
offset in its region and the accelerators that map it are each there or not.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from pvclock import Gpa
from qemu_glue.errors import QmpFailed
from qemu_glue.watch.session import Session, by_hand

__all__ = ["MtreeRange", "host_address", "ram_ranges", "read_ram_ranges"]

VIEW: Final = re.compile(r"^FlatView #", re.MULTILINE)
SYSTEM: Final = re.compile(r'^ *(AS "memory", root:|Root memory region: system\b)', re.MULTILINE)
RANGE: Final = re.compile(
    r"""^\s+(?P<first>[0-9a-f]+)-(?P<last>[0-9a-f]+)\s
        \((?:prio\s-?\d+,\s)?(?P<kind>[^)]+)\):\s
        (?P<name>.*?)
        (?:\s@(?P<offset>[0-9a-f]+))?
        (?:\s(?:kvm|kvm-accel))*\s*$""",
    re.VERBOSE | re.MULTILINE | re.IGNORECASE,
)
RAM_KINDS: Final = {"ram", "nv-ram"}
"""Not rom, romd (flash), ramd (a device's memory that is mapped into the guest) and i/o."""

HOST_ADDRESS: Final = re.compile(r" is (0x[0-9a-f]+)\s*$", re.IGNORECASE)


class MtreeRange(NamedTuple):
    """RAM at `gpa`: `length` bytes at `offset` of QEMU's memory region `name`."""

    gpa: Gpa
    length: int
    name: str
    offset: int


def read_ram_ranges(session: Session) -> list[MtreeRange]:
    """The RAM of the guest as QEMU has it now; QmpFailed if QEMU does not tell."""
    ranges = ram_ranges(by_hand(session, "info mtree -f"))
    if not ranges:
        raise QmpFailed("info mtree -f", "no RAM in what QEMU says of its guest's memory")
    return ranges


def ram_ranges(mtree: str) -> list[MtreeRange]:
    """The RAM in what `info mtree -f` prints, in order of addresses."""
    views = [view for view in VIEW.split(mtree) if SYSTEM.search(view)]
    found = (_range(match) for match in RANGE.finditer(views[0]) if match["kind"] in RAM_KINDS) if views else ()
    return sorted(found)


def host_address(session: Session, gpa: Gpa) -> int:
    """Where in QEMU's own address space the guest's RAM at `gpa` is; QmpFailed if QEMU does not tell."""
    answer = by_hand(session, f"gpa2hva {gpa:#x}")
    found = HOST_ADDRESS.search(answer)
    if found is None:
        raise QmpFailed("gpa2hva", f"QEMU says {answer.strip()!r} of {gpa:#x}")
    return int(found[1], 16)


def _range(match: re.Match[str]) -> MtreeRange:
    first, last = int(match["first"], 16), int(match["last"], 16)
    return MtreeRange(Gpa(first), last + 1 - first, match["name"], int(match["offset"] or "0", 16))
