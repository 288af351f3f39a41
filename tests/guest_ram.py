"""A watched guest's RAM, read from the memory of a VM that this process has."""

from __future__ import annotations

from collections.abc import Sequence

from pvclock import Gpa, GuestMemory
from pvclock.meter.watch.vm import RamRange

__all__ = ["MemoryRam", "made_of"]


class MemoryRam:
    """All slots of a GuestMemory, each a range.  `reads`: those of whole chunks so far; `looks`: those of pages."""

    means = "by hand"
    pause_s = 0.0

    def __init__(self, memory: GuestMemory, chunk_bytes: int = 1 << 20) -> None:
        self.memory, self.chunk_bytes = memory, chunk_bytes
        self.reads: list[RamRange] = []
        self.looks = 0

    def ranges(self) -> list[RamRange]:
        """Its slots."""
        return [RamRange(Gpa(gpa), length) for gpa, length in self.memory.slots]

    def read(self, gpa: Gpa, length: int) -> bytes:
        """What a chunk holds."""
        self.reads.append(RamRange(gpa, length))
        return self.memory.read(gpa, length)

    def read_many(self, addresses: Sequence[Gpa], length: int) -> list[bytes]:
        """What pages hold."""
        self.looks += 1
        return [self.memory.read(gpa, length) for gpa in addresses]


def made_of(pieces: dict[int, bytes], size: int = 1 << 16, chunk_bytes: int = 1 << 20) -> MemoryRam:
    """RAM from 0 with something at some addresses."""
    memory = GuestMemory(bytearray(size))
    for gpa, piece in pieces.items():
        memory.write(gpa, piece)
    return MemoryRam(memory, chunk_bytes)
