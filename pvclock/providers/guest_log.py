"""Events about the guest's accesses, limited so that a guest cannot flood the log."""

from __future__ import annotations

from typing import Final

from pvclock.providers.interface import ClockServices
from pvclock.timekeeping.events import EventKind

__all__ = ["GuestLog"]

TOLD: Final = 20
"""VirtualBox's limit for logged faults."""


class GuestLog:
    """Records the first 20 lines of each kind as events of `clock`, and drops the others."""

    def __init__(self, clock: ClockServices) -> None:
        self._clock = clock
        self._left: dict[EventKind, int] = {}

    def __call__(self, kind: EventKind, why: str) -> None:
        """Record it, if it is one of the first."""
        left = self._left.get(kind, TOLD)
        if left:
            self._left[kind] = left - 1
            self._clock.tell(kind, why)
