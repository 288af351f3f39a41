"""The debug console: the bytes that a guest writes to one port."""

from __future__ import annotations

from typing import Final

__all__ = ["CONSOLE_KEPT_BYTES", "CONSOLE_PORT", "Console"]

CONSOLE_PORT: Final = 0xE9
"""Bytes written here are the console; Bochs' and QEMU's debug console."""

CONSOLE_KEPT_BYTES: Final = 1 << 20
"""A guest may write for ever; the newest bytes are kept."""


class Console:
    """A device that keeps what is written to it, all of it or the last CONSOLE_KEPT_BYTES; reads give ones."""

    name = "debug console"

    def __init__(self) -> None:
        self._kept = bytearray()

    def read(self, _offset: int, length: int) -> bytes:
        """See Device."""
        return b"\xff" * length

    def write(self, _offset: int, data: bytes) -> None:
        """See Device: append `data`, of any width."""
        self._kept += data
        del self._kept[:-CONSOLE_KEPT_BYTES]

    def reset(self) -> None:
        """See Device: what was written stays, as on a serial line."""

    def text(self) -> str:
        """What was written up to now, as UTF-8; replacement characters for what is not."""
        return self._kept.decode(errors="replace")
