"""Guest RAM read out of the process that runs the guest, by process_vm_readv: works for any, and needs permission."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from mmap import PAGESIZE
from typing import Final, TypeVar

from pvclock._process_memory import present_pages, read_process, read_process_range
from pvclock.errors import MemoryNotReadable, VmEnded, VmNotObservable
from pvclock.host.process import Process
from pvclock.meter.watch.ram_blocks import BlockTable, RamBlock
from pvclock.meter.watch.vm import RamRange
from pvclock.quantities import Gpa

__all__ = ["ProcessRam"]

ENTRY_BYTES: Final = 8
ENTRIES_AT_ONCE: Final = 1 << 17
"""Of the pagemap: 1 MiB of it tells of 512 MiB of memory."""

PlaceT = TypeVar("PlaceT")
FoundT = TypeVar("FoundT")


class ProcessRam:
    """`blocks` of the memory of `process`, as a GuestRam.

    Pages that the process has not in its page tables are in no range, for a reading of them would allocate them if the
    mapping is shared.  So would a reading of a page that the guest has given back since (a balloon).
    """

    means = "process_vm_readv"
    chunk_bytes = 8 << 20
    pause_s = 0.0

    def __init__(self, process: Process, blocks: Iterable[RamBlock]) -> None:
        self._process = process
        self._table = BlockTable(blocks)
        try:
            self._pagemap = process.open("pagemap")
        except VmNotObservable as error:
            raise MemoryNotReadable(process.pid, error.why) from None

    def ranges(self) -> list[RamRange]:
        """See GuestRam; pages that are swapped out are among them, and none of more than 512 MiB."""
        found = [each for block in self._table.blocks for each in self._present(block)]
        self._process.check_running()
        return found

    def read(self, gpa: Gpa, length: int) -> bytes:
        """See GuestRam; GuestAddressError for what is not in one block, VmEnded once the process has ended."""
        index, offset = self._table.find(gpa, length)
        return self._checked(read_process_range, self._table.blocks[index].host_address + offset, length)

    def read_many(self, addresses: Sequence[Gpa], length: int) -> list[bytes]:
        """See GuestRam; up to 1024 in one system call.  Errors of read()."""
        blocks, find = self._table.blocks, self._table.find
        places = [blocks[index].host_address + offset for index, offset in (find(gpa, length) for gpa in addresses)]
        return self._checked(read_process, places, length)

    def _checked(self, read: Callable[[int, PlaceT, int], FoundT], place: PlaceT, length: int) -> FoundT:
        """What `read` finds in the process: by its pid, which is still its own if it runs afterwards."""
        try:
            return read(self._process.pid, place, length)
        finally:
            self._process.check_running()

    def _present(self, block: RamBlock) -> Iterator[RamRange]:
        """The pieces of `block` that are in the process's page tables."""
        first, end = block.host_address // PAGESIZE, -(-(block.host_address + block.length) // PAGESIZE)
        for start in range(first, end, ENTRIES_AT_ONCE):
            count = min(ENTRIES_AT_ONCE, end - start)
            entries = os.pread(self._pagemap, count * ENTRY_BYTES, start * ENTRY_BYTES)
            if not entries:  # the process has no memory any more
                raise VmEnded(self._process.pid)
            for skipped, pages in present_pages(entries):
                offset = (start + skipped) * PAGESIZE - block.host_address
                yield RamRange(Gpa(block.gpa + offset), pages * PAGESIZE)
