"""How long a guest was stopped, by what its VMM tells."""

from __future__ import annotations

from collections.abc import Iterable

from pvclock.meter.watch.vm import VmEvent, VmEventKind

__all__ = ["Pauses"]


class Pauses:
    """STOP and RESUME as they come in pairs."""

    def __init__(self) -> None:
        self._stop: VmEvent | None = None

    @property
    def is_stopped(self) -> bool:
        """Was a STOP told, and no RESUME since?"""
        return self._stop is not None

    def take(self, events: Iterable[VmEvent]) -> list[int]:
        """The lengths in ns of the pauses that ended with these events."""
        ended = []
        for event in events:
            if event.kind is VmEventKind.STOP:
                self._stop = self._stop or event
            elif event.kind is VmEventKind.RESUME and self._stop is not None:
                ended.append(event.utc_ns - self._stop.utc_ns)
                self._stop = None
        return ended
