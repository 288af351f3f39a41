"""A VM's RAM: a memfd, for other processes to map, and not mapped in a forked child."""

from __future__ import annotations

import mmap
import os
from io import FileIO

from pvclock.errors import ConfigError

__all__ = ["Ram"]


class Ram:
    """`length` bytes of zeroed, page-aligned memory, as `buffer` here and as `fd` for another process."""

    def __init__(self, length: int) -> None:
        if length <= 0 or length % mmap.PAGESIZE:
            raise ConfigError(f"RAM of {length} bytes; give a positive multiple of {mmap.PAGESIZE}")
        self._file = FileIO(os.memfd_create("pvclock-ram", os.MFD_CLOEXEC), "r+")
        try:
            self._file.truncate(length)
            self.buffer = mmap.mmap(self.fd, length, mmap.MAP_SHARED)
        except (OSError, OverflowError, ValueError) as error:
            self._file.close()
            raise ConfigError(f"RAM of {length} bytes: {error}") from None
        # A fork would share the pages with a child and, for private ones, copy them away from under the guest.
        self.buffer.madvise(mmap.MADV_DONTFORK)

    @property
    def fd(self) -> int:
        """The memfd, until close()."""
        return self._file.fileno()

    def clear(self) -> None:
        """Zero all of it, and give its pages back to the host until they are written again."""
        self.buffer.madvise(mmap.MADV_REMOVE)

    def close(self) -> None:
        """Give the memory back; BufferError if a view of it is open, and then it goes with the last view.

        May be called twice.
        """
        self._file.close()
        self.buffer.close()
