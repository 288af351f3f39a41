"""Where the pieces of a guest's RAM are in the process that runs it."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate
from typing import Final, NamedTuple

from pvclock.errors import GuestAddressError, MemoryNotReadable
from pvclock.host.process import Mapping, Process
from pvclock.quantities import Gpa

__all__ = ["BlockTable", "RamBlock", "blocks_of", "joined"]

PRIVATE_LEAST_BYTES: Final = 64 << 20
SHARED_LEAST_BYTES: Final = 1 << 20
"""From here on a mapping that is not the biggest is taken for RAM, too: of another NUMA node, of a DIMM.  Video memory
is private and smaller, and so are threads' stacks."""

KNOWN_BYTES: Final = 2 << 30
"""An x86 VMM has RAM from 0 to there or further, then a hole for devices, and above 4 GiB the rest: QEMU's hole begins
at 2, 2.75, 3 or 3.5 GiB, by machine type and options."""

OFFSETS_FROM: Final = 1 << 52
"""Beyond any guest-physical address."""

FINDS_KEPT: Final = 1024

NO_RAM: Final = re.compile(r"\[(?!anon)|anon_inode:|socket:|/dmabuf|/SYSV|/dev/(?!shm/|hugepages|zero)")
"""How the path of a mapping begins that is no guest's RAM: a stack, registers of a device."""


class RamBlock(NamedTuple):
    """`length` bytes of guest RAM from `gpa`, which are from host_address in the process."""

    gpa: Gpa
    length: int
    host_address: int


class BlockTable:
    """Blocks, which do not overlap.

    find(gpa, length): (index of its block, offset there) of the range; GuestAddressError if no single block holds it.
    """

    def __init__(self, blocks: Iterable[RamBlock]) -> None:
        self.blocks = sorted(blocks)
        self._begins = [block.gpa for block in self.blocks]
        self.find = lru_cache(FINDS_KEPT)(self._find)  # a watch asks for the same pages again and again

    def _find(self, gpa: Gpa, length: int) -> tuple[int, int]:
        index = bisect_right(self._begins, gpa) - 1
        if index >= 0:
            offset = gpa - self._begins[index]
            left = self.blocks[index].length - offset
            if left > 0 and 0 <= length <= left:
                return index, offset
        raise GuestAddressError(gpa, length, self._why_not(gpa))

    def _why_not(self, gpa: int) -> str:
        if KNOWN_BYTES <= gpa < OFFSETS_FROM <= max(self._begins, default=0):
            return "is at 2 GiB or above, where a process alone does not tell what lies; name its VM by QMP or libvirt"
        return "is not in one block of the guest's RAM"


def blocks_of(process: Process) -> list[RamBlock]:
    """The mappings of a VMM that look like guest RAM, where nothing but the process is known; the biggest comes first.

    Its first KNOWN_BYTES are at guest-physical address 0.  Where the rest is, and other mappings, the process does not
    tell: their addresses are offsets in this memory, mapping after mapping, from OFFSETS_FROM on.  The VMM knows (QMP).

    MemoryNotReadable if no mapping looks like RAM; errors of Process.mappings().
    """
    found = sorted(filter(_may_be_ram, joined(process.mappings())), key=lambda each: -each.length)
    chosen = [each for each in found if each is found[0] or each.length >= _least_bytes(each)]
    if not chosen:
        raise MemoryNotReadable(process.pid, "no mapping of it looks like a guest's RAM")
    biggest, *others = chosen
    known = min(biggest.length, KNOWN_BYTES)
    rest = [(biggest.start + known, biggest.length - known), *((each.start, each.length) for each in others)]
    offsets = accumulate((length for _, length in rest), initial=OFFSETS_FROM + known)
    unknown = [RamBlock(Gpa(at), length, start) for at, (start, length) in zip(offsets, rest, strict=False) if length]
    return [RamBlock(Gpa(0), known, biggest.start), *unknown]


def _least_bytes(mapping: Mapping) -> int:
    return SHARED_LEAST_BYTES if mapping.is_shared else PRIVATE_LEAST_BYTES


def joined(mappings: Iterable[Mapping]) -> list[Mapping]:
    """Mappings, the pieces into which Linux has split that of a file being one again."""
    found: list[Mapping] = []
    for each in mappings:
        if found and _continues(found[-1], each):
            found[-1] = found[-1]._replace(length=found[-1].length + each.length)
        else:
            found.append(each)
    return found


def _may_be_ram(mapping: Mapping) -> bool:
    return mapping.is_readable and mapping.is_writable and not NO_RAM.match(mapping.path)


def _continues(before: Mapping, after: Mapping) -> bool:
    """Does `after` go on in memory and in their file where `before` ends?"""
    return (
        before.inode != 0
        and _kind(before) == _kind(after)
        and (before.start + before.length, before.offset + before.length) == (after.start, after.offset)
    )


def _kind(mapping: Mapping) -> tuple[object, ...]:
    return mapping.device, mapping.inode, mapping.is_shared, mapping.is_readable, mapping.is_writable
