"""A byte stream between the guest's debugger stub and the VMM's debugger: VirtualBox's GIM debug device, for emulators.

The guest's end is a provider with a debug interface; the VMM's end is a `DebugDevice`, which it registers.
"""

from __future__ import annotations

import threading
from typing import NamedTuple, Protocol

from pvclock import arguments
from pvclock.arguments import serving, whole
from pvclock.errors import RangeError, StateError
from pvclock.providers.interface import DebugSetup, Status
from pvclock.threads import renew_in_children

__all__ = ["DebugChannel", "DebugDevice", "DebugTraffic"]


class DebugDevice(Protocol):
    """The VMM's end of the stream; it does not block."""

    def read(self, count_max: int) -> bytes:
        """Bytes that have arrived for the guest, `count_max` at most; empty if none have."""

    def write(self, data: bytes) -> int | None:
        """Accept the guest's bytes; returns how many of them, from the first on, or None without a stream."""


class DebugTraffic(NamedTuple):
    """Complete transfers and their bytes, transmitted and received by the guest."""

    transmit: int = 0
    transmit_bytes: int = 0
    receive: int = 0
    receive_bytes: int = 0


class DebugChannel:
    """The stream of one VM.  setup: the provider's; None without a debug interface.

    Thread-safety: all methods may be called from any thread; one at a time calls the device.
    """

    def __init__(self, setup: DebugSetup | None) -> None:
        self._setup = setup
        self._device: DebugDevice | None = None
        self._lock = threading.Lock()
        self.traffic = DebugTraffic()
        renew_in_children(self)
        if setup is not None and setup.connect is not None:
            setup.connect(self)

    def begin_anew(self) -> None:
        """See HasLock."""
        self._lock = threading.Lock()

    def register(self, device: DebugDevice) -> None:
        """Make `device` the VMM's end; StateError if there is one already."""
        serving("device", device, "read", "write", wanted="a DebugDevice: an object with read() and write()")
        with self._lock:
            if self._device is not None:
                raise StateError("register", "there is a debug device", "unregister() it first")
            self._device = device

    def unregister(self) -> None:
        """Remove the device, if there is one."""
        with self._lock:
            self._device = None

    def data_arrived(self) -> None:
        """The VMM says that the device has bytes for the guest, which may want to know."""
        if self._setup is not None and self._setup.data_arrived is not None:
            self._setup.data_arrived()

    def setup(self) -> tuple[Status, DebugSetup | None]:
        """What the provider requires of the device; NO_DEBUG_CONNECTION without a debug interface."""
        return (Status.NO_DEBUG_CONNECTION if self._setup is None else Status.SUCCESS), self._setup

    def read(self, count_max: int) -> tuple[Status, bytes]:
        """Bytes for the guest, `count_max` at most; NO_DATA if none have arrived.

        They are counted when this returns, and the device may reuse its buffer then.
        """
        if whole("count_max", count_max) < 1:
            raise RangeError(f"read({count_max}); 1 byte or more")
        with self._lock:
            if self._setup is None or self._device is None:
                return Status.NO_DEBUG_CONNECTION, b""
            data = self._device.read(count_max)
            if len(data) > count_max:
                raise RangeError(f"the debug device gave {len(data)} bytes where {count_max} were asked for")
            if not data:
                return Status.NO_DATA, b""
            now = self.traffic
            self.traffic = now._replace(receive=now.receive + 1, receive_bytes=now.receive_bytes + len(data))
            return Status.SUCCESS, data

    def write(self, data: bytes) -> tuple[Status, int]:
        """Hand the guest's bytes to the device; returns how many it accepted.  The caller offers the rest again.

        Only complete writes are counted.
        """
        data = arguments.data("data", data)
        with self._lock:
            if self._setup is None or self._device is None:
                return Status.NO_DEBUG_CONNECTION, 0
            taken = self._device.write(data)
            if taken is None:
                return Status.NO_DEBUG_CONNECTION, 0
            if not 0 <= taken <= len(data):
                raise RangeError(f"the debug device took {taken} of {len(data)} bytes")
            if taken == len(data):
                now = self.traffic
                self.traffic = now._replace(transmit=now.transmit + 1, transmit_bytes=now.transmit_bytes + taken)
            return Status.SUCCESS, taken
