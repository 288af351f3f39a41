"""What the threads of a fleet wait for: its end, and their turn to search."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from qemu_glue.watch.beginning import Interrupted

__all__ = ["FleetEnd", "SearchTurns"]

SEARCHES_AT_ONCE: Final = 2
"""Searches of a fleet's memories: each takes a CPU, or holds up a VMM, for a while."""
ASK_S: Final = 0.1


class FleetEnd:
    """The end of a fleet, as its threads wait for it."""

    def __init__(self) -> None:
        self._event = threading.Event()

    @property
    def came(self) -> bool:
        """Is it the end?"""
        return self._event.is_set()

    def come(self) -> None:
        """It is."""
        self._event.set()

    def wait(self, seconds: float) -> bool:
        """Sleep for `seconds` or until the end; is it the end?"""
        return self._event.wait(max(seconds, 0))


class SearchTurns:
    """Lets few threads of a fleet search at once, until its `end`."""

    def __init__(self, end: FleetEnd) -> None:
        self.end = end
        self._free = threading.BoundedSemaphore(SEARCHES_AT_ONCE)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until few others search.  Interrupted."""
        while not self._free.acquire(timeout=ASK_S):
            if self.end.came:
                raise Interrupted
        try:
            yield
        finally:
            self._free.release()
