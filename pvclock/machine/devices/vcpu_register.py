"""The register by which a PC's guest learns of vCPUs that come while it runs, and its interrupt."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

__all__ = ["VCPU_REGISTER_BYTES", "VCPU_REGISTER_GSI", "VCPU_REGISTER_PORT", "VcpuRegister"]

VCPU_REGISTER_PORT: Final = 0x610
"""Behind the ACPI registers; the DSDT tells of it."""
VCPU_REGISTER_BYTES: Final = 2
VCPU_REGISTER_GSI: Final = 9
"""Level-triggered, so that a guest that is not listening yet hears it later; QEMU's microvm has its events there."""


class VcpuRegister:
    """Reads as the number of vCPUs, by `count`; the guest writes how many of them it knows of.

    set_line: called with the level of the interrupt, which is high while there are more vCPUs than that.
    Thread-safety: tell() may be called from any thread, `count` and set_line within it and within the bus's calls.
    """

    name = "vCPU register"

    def __init__(self, count: Callable[[], int], set_line: Callable[[bool], object]) -> None:
        self._count, self._set_line = count, set_line
        self._lock = threading.RLock()
        self._known = count()

    def tell(self) -> None:
        """There may be more vCPUs than before."""
        with self._lock:
            self._set_line(self._known < self._count())

    def read(self, offset: int, length: int) -> bytes:
        """See Device."""
        register = self._count().to_bytes(VCPU_REGISTER_BYTES, "little")
        return register[offset : offset + length].ljust(length, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        """See Device: anything but one access to the whole register is ignored."""
        if offset == 0 and len(data) == VCPU_REGISTER_BYTES:
            with self._lock:
                self._known = int.from_bytes(data, "little")
                self.tell()

    def reset(self) -> None:
        """See Device: a guest that boots finds all vCPUs in its tables."""
        with self._lock:
            self._known = self._count()
            self.tell()
