"""What a guest does that its VMM may want to know, told as often as a guest cannot fill a log with it."""

from __future__ import annotations

from typing import Final

from pvclock.providers.interface import ClockServices
from pvclock.timekeeping.events import EventKind

__all__ = ["GuestLog"]

TOLD: Final = 20
"""As VirtualBox tells of faults."""


class GuestLog:
    """The first 20 lines of each kind go to `clock`'s events; the others are dropped."""

    def __init__(self, clock: ClockServices) -> None:
        self._clock = clock
        self._left: dict[EventKind, int] = {}

    def __call__(self, kind: EventKind, why: str) -> None:
        """Tell it, if it is one of the first."""
        left = self._left.get(kind, TOLD)
        if left:
            self._left[kind] = left - 1
            self._clock.tell(kind, why)
