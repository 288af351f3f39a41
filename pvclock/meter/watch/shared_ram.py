"""Guest RAM read from the file by which the VMM shares it (a memfd, hugetlbfs): needs no permission to ptrace."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple, TypeVar

from pvclock._process_memory import read_files
from pvclock.errors import MemoryNotReadable, VmNotObservable
from pvclock.host.process import Mapping, Process
from pvclock.meter.watch.ram_blocks import BlockTable, RamBlock, joined
from pvclock.meter.watch.vm import RamRange
from pvclock.quantities import Gpa

__all__ = ["FilePiece", "SharedRam", "open_pieces"]

FoundT = TypeVar("FoundT")


class FilePiece(NamedTuple):
    """A block of guest RAM, which is in the file `fd` from `offset` on."""

    block: RamBlock
    fd: int
    offset: int


class SharedRam:
    """`pieces` of the memory of `process`, as a GuestRam; not mapped here, for to touch a hole would allocate it."""

    means = "shared memory"
    chunk_bytes = 8 << 20
    pause_s = 0.0

    def __init__(self, process: Process, pieces: Iterable[FilePiece]) -> None:
        self._process = process
        self._pieces = sorted(pieces)
        self._table = BlockTable(piece.block for piece in self._pieces)

    def ranges(self) -> list[RamRange]:
        """See GuestRam; what is in no hole of the file.  On hugetlbfs, all: there, reading a hole costs nothing."""
        return self._checked(lambda: [each for piece in self._pieces for each in _data(piece)])

    def read(self, gpa: Gpa, length: int) -> bytes:
        """See GuestRam; GuestAddressError for what is not in one piece, VmEnded once the process has ended."""
        return self.read_many([gpa], length)[0]

    def read_many(self, addresses: Sequence[Gpa], length: int) -> list[bytes]:
        """See GuestRam; one after the other, about 1 us apart.  Errors of read()."""
        pieces, find = self._pieces, self._table.find
        places = [(pieces[index], offset) for index, offset in (find(gpa, length) for gpa in addresses)]
        return self._checked(
            lambda: read_files([(piece.fd, piece.offset + offset) for piece, offset in places], length)
        )

    def _checked(self, read: Callable[[], FoundT]) -> FoundT:
        """What `read` finds in the file, which may be shorter now, and which outlives the guest."""
        try:
            return read()
        except OSError as error:
            raise MemoryNotReadable(self._process.pid, f"the file of it: {error.strerror}") from None
        finally:
            self._process.check_running()


def open_pieces(process: Process, blocks: Iterable[RamBlock]) -> list[FilePiece]:
    """Those of `blocks` that lie in files that `process` shares and that can be opened; errors of Process."""
    mappings = [each for each in process.mappings() if each.is_shared and each.inode]
    files: dict[tuple[int, int], int | None] = {}
    found = []
    for block in blocks:
        mapping = next((each for each in joined(mappings) if _holds(each, block)), None)
        if mapping is None:
            continue
        key = mapping.device, mapping.inode
        if key not in files:
            files[key] = _open_file(process, [each for each in mappings if (each.device, each.inode) == key])
        if (fd := files[key]) is not None:
            found.append(FilePiece(block, fd, mapping.offset + block.host_address - mapping.start))
    return found


def _holds(mapping: Mapping, block: RamBlock) -> bool:
    return 0 <= block.host_address - mapping.start <= mapping.length - block.length


def _open_file(process: Process, mappings: Sequence[Mapping]) -> int | None:
    """The file of `mappings`, by a descriptor of the process, a mapping (root may) or its path; None if none opens."""
    file = mappings[0]
    names = [f"fd/{number}" for number in process.descriptors()]
    names += [f"map_files/{each.start:x}-{each.start + each.length:x}" for each in mappings]
    for name in (*names, f"root{file.path}"):
        with suppress(VmNotObservable):
            found = process.stat(name)
            if stat.S_ISREG(found.st_mode) and (found.st_dev, found.st_ino) == (file.device, file.inode):
                return process.open(name)
    return None


def _data(piece: FilePiece) -> Iterator[RamRange]:
    """What of `piece` is in no hole of its file."""
    gpa, length, _ = piece.block
    end = piece.offset + length
    place = piece.offset
    while (data := _seek_data(piece.fd, place)) < end:
        place = min(os.lseek(piece.fd, data, os.SEEK_HOLE), end)
        if place > data:  # else that data has been given back in between
            yield RamRange(Gpa(gpa + data - piece.offset), place - data)


def _seek_data(fd: int, place: int) -> int:
    """Where the next data of the file begin, from `place` on; beyond its end if there are none."""
    try:
        return os.lseek(fd, place, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return sys.maxsize
