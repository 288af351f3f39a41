"""A guest's serial console as output of this process: passed on as it comes, and searched for a kernel's panic."""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from typing import Final, Self

__all__ = ["GuestConsole"]

PANIC: Final = b"Kernel panic - "
LINE_KEPT_BYTES: Final = 1000
"""Of a line, which a guest need not end."""


class GuestConsole:
    """Passes on what the guest sends, to `descriptor`; a context manager.

    on_line: called with each line once it has ended, on write()'s thread; of a long one with the end.
    panic: the last line by which a kernel told of one.

    Thread-safety: one thread calls write(), and another may call give_up().
    """

    def __init__(self, descriptor: int, on_line: Callable[[bytes], object] | None = None) -> None:
        self._on_line = on_line
        self._descriptor = descriptor
        self._given_up, self._give_up = os.pipe()
        self._ready = select.poll()
        self._ready.register(descriptor, select.POLLOUT)
        self._ready.register(self._given_up, select.POLLIN)
        self._line = bytearray()
        self.panic = ""

    def write(self, data: bytes) -> None:
        """Pass it on.  Waits for a reader that does not read, until give_up(); OSError if it is gone."""
        for at in range(len(data)):
            # One byte: more might wait in write(), whatever poll() says.
            if self._is_writable():
                os.write(self._descriptor, data[at : at + 1])
        self._look_for_panic(data)

    def give_up(self) -> None:
        """From now on what the reader does not take at once is lost, so that no vCPU waits for it."""
        os.write(self._give_up, b".")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        os.close(self._given_up)
        os.close(self._give_up)

    def _is_writable(self) -> bool:
        ready, _ = self._ready.poll()[0]  # the one that was registered first, if both are
        return ready == self._descriptor

    def _look_for_panic(self, data: bytes) -> None:
        self._line += data
        if data.endswith(b"\n"):
            if self._on_line is not None:
                self._on_line(bytes(self._line))
            if PANIC in self._line:
                self.panic = self._line[self._line.index(PANIC) :].decode(errors="replace").strip()
            self._line.clear()
        del self._line[:-LINE_KEPT_BYTES]
