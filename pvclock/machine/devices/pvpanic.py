"""The pvpanic device: a guest's kernel that panics says so.

Source: QEMU, docs/specs/pvpanic.rst.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

__all__ = ["PVPANIC_PORT", "Pvpanic"]

PVPANIC_PORT: Final = 0x505
"""QEMU's default."""

PANICKED: Final = 1 << 0


class Pvpanic:
    """A device that calls `panic` when the guest says that it has panicked; reads give the events that it takes."""

    name = "pvpanic"

    def __init__(self, panic: Callable[[], object]) -> None:
        self._panic = panic

    def read(self, _offset: int, length: int) -> bytes:
        """See Device."""
        return bytes([PANICKED]).ljust(length, b"\0")

    def write(self, _offset: int, data: bytes) -> None:
        """See Device."""
        if data[0] & PANICKED:
            self._panic()

    def reset(self) -> None:
        """See Device: it has no state."""
