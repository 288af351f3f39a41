"""A guest's RAM by QEMU's monitor: works wherever QMP does, and costs QEMU's big lock, which its vCPUs need, too.

QEMU writes what is read (pmemsave) to a memfd that it was passed (add-fd) and that this process reads: this works for
any user and in any container, and leaves no file, however either process ends.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

from pvclock import Gpa
from pvclock.errors import MemoryNotReadable
from pvclock.meter.watch.vm import RamRange
from qemu_glue.errors import QemuError
from qemu_glue.watch.mtree import read_ram_ranges
from qemu_glue.watch.session import Session

__all__ = ["MonitorRam"]

CHUNK_BYTES: Final = 1 << 20
PAUSE_S: Final = 0.01
"""QEMU copies 60 to 400 MiB/s in this way: it has its big lock for 3 to 16 ms, and leaves it alone about as long."""

SPAN_BYTES: Final = 4096
"""Pages within so many bytes are read at once, with what is between them: a read takes 1 ms, whatever its length."""


class MonitorRam:
    """GuestRam over `session`, which it does not close; a MemoryNotReadable if QEMU does not take the memfd.

    Shared RAM is not searched in this way, unless it was preallocated: reading a hole of a file, or of anonymous memory
    that is shared, allocates memory.
    """

    def __init__(self, session: Session) -> None:
        self.means = "QMP pmemsave"
        self.chunk_bytes = CHUNK_BYTES
        self.pause_s = PAUSE_S
        self._session = session
        self._file = os.memfd_create("pvclock-pmemsave", os.MFD_CLOEXEC)
        try:
            with _as_unreadable():
                self._given: dict[str, int] = session.execute("add-fd", fd=self._file)
        except BaseException:
            os.close(self._file)
            raise

    def ranges(self) -> list[RamRange]:
        """All RAM; QEMU does not tell which of it was ever written."""
        with _as_unreadable():
            found = read_ram_ranges(self._session)
            _refuse_to_allocate(self._session, {each.name.removeprefix("/objects/") for each in found})
        return [RamRange(each.gpa, each.length) for each in found]

    def read(self, gpa: Gpa, length: int) -> bytes:
        """`length` bytes from `gpa`."""
        path = f"/proc/self/fd/{self._given['fd']}"
        with _as_unreadable():
            self._session.execute("pmemsave", {"val": gpa, "size": length, "filename": path})
        contents = os.pread(self._file, length, 0)
        if len(contents) != length:
            raise MemoryNotReadable(None, f"QEMU wrote {len(contents)} of {length} bytes from {gpa:#x} to its {path}")
        return contents

    def read_many(self, addresses: Sequence[Gpa], length: int) -> list[bytes]:
        """`length` bytes from each address; neighbours at once."""
        found: dict[Gpa, bytes] = {}
        for span in _spans(sorted(set(addresses)), length):
            contents = self.read(span[0], span[-1] + length - span[0])
            found |= {gpa: contents[gpa - span[0] :][:length] for gpa in span}
        return [found[gpa] for gpa in addresses]

    def close(self) -> None:
        """Close the memfd, and have QEMU close it; while its guest is stopped, QEMU does so later."""
        with suppress(QemuError):
            self._session.execute("remove-fd", {"fdset-id": self._given["fdset-id"]})
        os.close(self._file)


def _spans(addresses: list[Gpa], length: int) -> Iterator[list[Gpa]]:
    """Sorted addresses in groups, each of which lies within SPAN_BYTES."""
    span: list[Gpa] = []
    for gpa in addresses:
        if span and gpa + length - span[0] > SPAN_BYTES:
            yield span
            span = []
        span.append(gpa)
    if span:
        yield span


def _refuse_to_allocate(session: Session, regions: set[str]) -> None:
    """MemoryNotReadable if one of `regions` has holes that reading fills: it is a file (tmpfs, a memfd), or shared."""
    for backend in session.execute("query-memdev"):
        name = backend.get("id", "")
        if name in regions and not backend["prealloc"] and _has_holes(session, name):
            why = f"{name} is shared memory with holes, which QMP would fill; run as root, or as QEMU's user"
            raise MemoryNotReadable(None, why)


def _has_holes(session: Session, backend: str) -> bool:
    """Not private anonymous memory, whose holes all read as one page of zeros."""
    kind, is_shared = (
        session.execute("qom-get", {"path": f"/objects/{backend}", "property": each}) for each in ("type", "share")
    )
    return bool(kind != "memory-backend-ram" or is_shared)


@contextmanager
def _as_unreadable() -> Iterator[None]:
    try:
        yield
    except QemuError as failure:
        raise MemoryNotReadable(None, str(failure)) from failure
