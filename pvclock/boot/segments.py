"""Parts of an image and where they go in guest memory: checked all together, before the first byte is written."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Final, NamedTuple

from pvclock._memory import GuestMemory
from pvclock.errors import ImageError

__all__ = ["Segment", "check_segments", "overlaps", "write_segments"]

ZEROES: Final = memoryview(bytes(1 << 16))


class Segment(NamedTuple):
    """A part of the file that goes to guest-physical `gpa`, followed by zeroes up to `memory_bytes`.

    content: a view of the file, for many segments may name the same part of it.
    """

    gpa: int
    content: memoryview
    memory_bytes: int

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.gpa + self.memory_bytes

    @property
    def addresses(self) -> range:
        """All that it takes."""
        return range(self.gpa, self.end)

    @property
    def range(self) -> str:
        """Where it is, as messages have it."""
        return f"{self.gpa:#x}+{self.memory_bytes:#x}"


def check_segments(
    slots: list[tuple[int, int]], segments: list[Segment], entry: int, reserved: Iterable[range] = ()
) -> None:
    """ImageError unless all lie in memory and outside what is reserved, no two overlap, and `entry` is in one.

    This bounds the bytes to load by RAM's: an image whose segments overlap is damaged, or made to keep a loader busy.
    """
    for segment in segments:
        if not any(base <= segment.gpa and segment.end <= base + size for base, size in slots):
            raise ImageError(f"segment {segment.range} is not in guest memory: {slots}")
        for area in reserved:
            if overlaps(segment.addresses, area):
                raise ImageError(f"segment {segment.range} overlaps the firmware's {area.start:#x}+{len(area):#x}")
    for lower, upper in pairwise(sorted(segments, key=lambda segment: segment.gpa)):
        if upper.gpa < lower.end:
            raise ImageError(f"segments {lower.range} and {upper.range} overlap")
    if not any(segment.gpa <= entry < segment.end for segment in segments):
        raise ImageError(f"the entry at {entry:#x} is in no segment")


def overlaps(one: range, other: range) -> bool:
    """Have they an address in common?"""
    return one.start < other.stop and other.start < one.stop


def write_segments(memory: GuestMemory, segments: list[Segment]) -> None:
    """Write each one's content and, by pieces, its zeroes: nothing is allocated by what the file says."""
    for segment in segments:
        memory.write(segment.gpa, segment.content)
        for at in range(segment.gpa + len(segment.content), segment.end, len(ZEROES)):
            memory.write(at, ZEROES[: segment.end - at])
