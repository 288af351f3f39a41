"""How a PC's software resets it: by system control port A, the chipset's reset control or the keyboard controller.

Source: for the first and the last IBM's PC/AT; for the second Intel's chipsets (RST_CNT).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

__all__ = [
    "KEYBOARD_PORT",
    "RESET_CONTROL_PORT",
    "SYSTEM_CONTROL_PORT",
    "KeyboardController",
    "ResetControl",
    "SystemControl",
]

SYSTEM_CONTROL_PORT: Final = 0x92
FAST_RESET: Final = 1 << 0
A20_ENABLED: Final = 1 << 1

RESET_CONTROL_PORT: Final = 0xCF9
RESET_CPU: Final = 1 << 2

KEYBOARD_PORT: Final = 0x64
PULSE_RESET: Final = 0xFE


class SystemControl:
    """Port 0x92: a write whose bit 0 goes from 0 to 1 resets; the rest is kept, and A20 is on from the beginning."""

    name = "system control port A"

    def __init__(self, reset: Callable[[], object]) -> None:
        self._request = reset
        self._kept = A20_ENABLED

    def read(self, _offset: int, length: int) -> bytes:
        """See Device."""
        return bytes([self._kept]) + b"\xff" * (length - 1)

    def write(self, _offset: int, data: bytes) -> None:
        """See Device."""
        before, self._kept = self._kept, data[0]
        if data[0] & ~before & FAST_RESET:
            self._request()

    def reset(self) -> None:
        """See Device."""
        self._kept = A20_ENABLED


class ResetControl:
    """Port 0xcf9: a write whose bit 2 goes from 0 to 1 resets, hard or soft; the rest is kept."""

    name = "reset control"

    def __init__(self, reset: Callable[[], object]) -> None:
        self._request = reset
        self._kept = 0

    def read(self, _offset: int, length: int) -> bytes:
        """See Device."""
        return bytes([self._kept]) + b"\xff" * (length - 1)

    def write(self, _offset: int, data: bytes) -> None:
        """See Device."""
        before, self._kept = self._kept, data[0]
        if data[0] & ~before & RESET_CPU:
            self._request()

    def reset(self) -> None:
        """See Device."""
        self._kept = 0


class KeyboardController:
    """Port 0x64 of a controller without a keyboard: its command 0xfe resets; its status is 0, ready for a command.

    A kernel waits for that before it gives the command; ones would have it wait for long.
    """

    name = "keyboard controller"

    def __init__(self, reset: Callable[[], object]) -> None:
        self._request = reset

    def read(self, _offset: int, length: int) -> bytes:
        """See Device."""
        return bytes(length)

    def write(self, _offset: int, data: bytes) -> None:
        """See Device: other commands are ignored."""
        if data[0] == PULSE_RESET:
            self._request()

    def reset(self) -> None:
        """See Device: it has no state."""
