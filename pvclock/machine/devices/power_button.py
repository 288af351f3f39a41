"""A power button, by which a PC's guest is asked to power off: a register, and its interrupt."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

__all__ = ["POWER_BUTTON_BYTES", "POWER_BUTTON_GSI", "POWER_BUTTON_PORT", "PowerButton"]

POWER_BUTTON_PORT: Final = 0x612
"""Behind the vCPU register; the DSDT tells of it."""
POWER_BUTTON_BYTES: Final = 2
POWER_BUTTON_GSI: Final = 10
"""Level-triggered, so that a guest that is not listening yet hears it later."""

PRESSED: Final = 1


class PowerButton:
    """Reads as 1 from press() until the guest writes 1, with the interrupt high meanwhile, and as 0 else.

    set_line: called with the level of the interrupt.
    Thread-safety: press() may be called from any thread, set_line within it and within the bus's calls.
    """

    name = "power button"

    def __init__(self, set_line: Callable[[bool], object]) -> None:
        self._set_line = set_line
        self._lock = threading.RLock()
        self._is_pressed = False

    def press(self) -> None:
        """Ask the guest; what it does then is its own.  Pressed twice before it has heard is pressed once."""
        self._become(is_pressed=True)

    def read(self, offset: int, length: int) -> bytes:
        """See Device."""
        register = (PRESSED * self._is_pressed).to_bytes(POWER_BUTTON_BYTES, "little")
        return register[offset : offset + length].ljust(length, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        """See Device: anything but PRESSED at the beginning is ignored."""
        if offset == 0 and data[0] & PRESSED:
            self._become(is_pressed=False)

    def reset(self) -> None:
        """See Device: nobody has pressed it."""
        self._become(is_pressed=False)

    def _become(self, *, is_pressed: bool) -> None:
        with self._lock:
            self._is_pressed = is_pressed
            self._set_line(is_pressed)
