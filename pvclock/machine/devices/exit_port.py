"""The exit port: a write ends the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

__all__ = ["EXIT_PORT", "ExitPort"]

EXIT_PORT: Final = 0xF4
"""A write ends the run; the byte is the exit code.  QEMU's isa-debug-exit is mostly put there."""


class ExitPort:
    """A device that calls `end` with the first byte of each write; reads give ones."""

    name = "exit port"

    def __init__(self, end: Callable[[int], object]) -> None:
        self._end = end

    def read(self, _offset: int, length: int) -> bytes:
        """See Device."""
        return b"\xff" * length

    def write(self, _offset: int, data: bytes) -> None:
        """See Device."""
        self._end(data[0])

    def reset(self) -> None:
        """See Device: it has no state."""
