"""A file that holds a QEMU migration stream: read at offsets, searched and copied, in bounded memory.

It is read, not mapped: a mapped file that somebody cuts off meanwhile ends the process that looks at it (SIGBUS).

The stream is the whole file, or what follows the header of libvirt's `virsh save`.
Source: QEMU migration/savevm.h (QEMU_VM_FILE_MAGIC); libvirt src/qemu/qemu_saveimage.h (virQEMUSaveHeader).
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from pvclock import StateFileError
from pvclock.state import atomic_file

__all__ = ["StreamFile", "is_of_qemu", "opened"]

MAGIC: Final = b"QEVM"
VERSION: Final = 3
VERSION_FORM: Final = struct.Struct(">I")

LIBVIRT_MAGIC: Final = b"LibvirtQemudSave"
LIBVIRT_HEADER: Final = struct.Struct("=16s5I56x")
"""Magic, version, length of what follows before the stream, was running, compression, cookie; in the host's order."""
NOT_COMPRESSED: Final = 0

LIBVIRT_PARTIAL_MAGIC: Final = b"LibvirtQemudPart"
QCOW_MAGIC: Final = b"QFI\xfb"
NOT_STREAMS: Final = {
    LIBVIRT_PARTIAL_MAGIC: ("an image that `virsh save` did not finish", "one that it has: save the VM again"),
    QCOW_MAGIC: (
        "a disk image of QEMU's, with its snapshots (savevm)",
        "a stream in a file of its own: have the VM loaded from the snapshot, and `migrate` it to a file",
    ),
}
"""How other files of theirs begin; what such a file is, and what is wanted."""

CHUNK_BYTES: Final = 1 << 20


class StreamFile:
    """The stream in file descriptor `fd`.  begin, end: its first byte, and the one after its last.

    StateFileError if it is no stream of a version that is known.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.end = os.fstat(fd).st_size
        self.begin = self._begin()
        version = self.number(VERSION_FORM, self.begin + len(MAGIC), "stream.version")
        if version != VERSION:
            raise StateFileError("stream.version", f"{version}", f"{VERSION}")

    def read(self, offset: int, length: int, field: str) -> bytes:
        """`length` bytes at `offset`; StateFileError, with `field`, if the file ends before."""
        content = os.pread(self._fd, length, offset) if offset >= 0 else b""
        if len(content) < length:
            raise StateFileError(field, f"the end of the file after {self.end} bytes", f"{length} bytes from {offset}")
        return content

    def number(self, form: struct.Struct, offset: int, field: str) -> int:
        """The number of that form at `offset`; errors as read()."""
        return int(form.unpack(self.read(offset, form.size, field))[0])

    def matches(self, pattern: re.Pattern[bytes], needle: bytes, longest: int) -> Iterator[tuple[int, re.Match[bytes]]]:
        """Where `pattern` matches, from the front: what its match's offsets count from, and the match.

        It takes `longest` bytes at most, `needle` among them.  Matches may overlap: one made to hide another does not.
        """
        for at in range(self.begin, self.end, CHUNK_BYTES):
            chunk = os.pread(self._fd, min(CHUNK_BYTES + longest - 1, self.end - at), at)
            found = pattern.search(chunk) if needle in chunk else None  # which is far faster to look for
            while found is not None and found.start() < CHUNK_BYTES:
                yield at, found
                found = pattern.search(chunk, found.start() + 1)

    def chunks(self, patches: Mapping[int, bytes]) -> Iterator[bytes]:
        """The whole file, libvirt's header too, with other bytes at some offsets."""
        at = 0
        while chunk := bytearray(os.pread(self._fd, CHUNK_BYTES, at)):
            for offset, patch in patches.items():
                first, last = max(offset, at), min(offset + len(patch), at + len(chunk))
                if first < last:
                    chunk[first - at : last - at] = patch[first - offset : last - offset]
            yield bytes(chunk)
            at += len(chunk)

    def _begin(self) -> int:
        head = os.pread(self._fd, len(LIBVIRT_MAGIC), 0)
        if head == LIBVIRT_MAGIC:
            return self._behind_libvirts_header()
        for magic, (found, wanted) in NOT_STREAMS.items():
            if head.startswith(magic):
                raise StateFileError("stream", found, wanted)
        self._check_magic(0)
        return 0

    def _behind_libvirts_header(self) -> int:
        header = self.read(0, LIBVIRT_HEADER.size, "libvirt.header")
        _, _, length, _, compression, _ = LIBVIRT_HEADER.unpack(header)
        if compression != NOT_COMPRESSED:
            wanted = '0, not compressed: save_image_format = "raw" in libvirt\'s qemu.conf'
            raise StateFileError("libvirt.compressed", f"{compression}", wanted)
        begin = LIBVIRT_HEADER.size + int(length)
        self._check_magic(begin)
        return begin

    def _check_magic(self, at: int) -> None:
        found = os.pread(self._fd, len(MAGIC), at)
        if found != MAGIC:
            raise StateFileError("stream", f"{found!r} at {at}", f"{MAGIC!r}, with which a migration stream begins")


def is_of_qemu(head: bytes) -> bool:
    """Does a file of QEMU's or libvirt's begin like that, be it a stream or taken for one?"""
    return head.startswith((MAGIC, LIBVIRT_MAGIC, *NOT_STREAMS))


@contextmanager
def opened(path: str) -> Iterator[StreamFile]:
    """The stream in regular file `path`; StateFileError, with the path, whatever is wrong with it within."""
    try:
        with atomic_file.opened(path) as fd:
            yield StreamFile(fd)
    except StateFileError as error:
        raise StateFileError(error.field, error.found, error.supported, error.path or path) from None
    except (OSError, ValueError) as error:
        found = getattr(error, "strerror", None) or str(error)
        raise StateFileError("file", found, "a regular file that can be read", path) from error
