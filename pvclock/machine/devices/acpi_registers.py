"""The registers of hardware-reduced ACPI: sleep control, sleep status and reset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

__all__ = [
    "ACPI_REGISTERS_PORT",
    "RESET_PORT",
    "RESET_VALUE",
    "SLEEP_CONTROL_PORT",
    "SLEEP_STATUS_PORT",
    "SOFT_OFF",
    "AcpiRegisters",
]

ACPI_REGISTERS_PORT: Final = 0x600
"""Where a PC has no device; the FADT tells of it."""
SLEEP_CONTROL_PORT: Final = ACPI_REGISTERS_PORT
SLEEP_STATUS_PORT: Final = ACPI_REGISTERS_PORT + 1
RESET_PORT: Final = ACPI_REGISTERS_PORT + 2

SOFT_OFF: Final = 5
r"""SLP_TYP of S5, as the DSDT's \_S5 has it, and as most PCs do."""
RESET_VALUE: Final = 1

SLEEP_TYPE_SHIFT, SLEEP_TYPE_MASK = 2, 0x7
SLEEP_ENABLE: Final = 1 << 5


class AcpiRegisters:
    """A device whose sleep control calls `power_off` and whose reset register calls `reset`, each when it is told to.

    Source: ACPI Specification 6.5, 4.8.3.7.  It never sleeps otherwise, so the status (WAK_STS) reads 0.
    """

    name = "ACPI registers"

    def __init__(self, power_off: Callable[[], object], reset: Callable[[], object]) -> None:
        self._power_off = power_off
        self._reset = reset

    def read(self, _offset: int, length: int) -> bytes:
        """See Device."""
        return bytes(length)

    def write(self, offset: int, data: bytes) -> None:
        """See Device: any other value and state of sleep is ignored."""
        value = data[0]
        if offset == RESET_PORT - ACPI_REGISTERS_PORT:
            if value == RESET_VALUE:
                self._reset()
        elif offset == 0 and value & SLEEP_ENABLE and value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK == SOFT_OFF:
            self._power_off()

    def reset(self) -> None:
        """See Device: it has no state."""
