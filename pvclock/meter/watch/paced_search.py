"""Searches of a watched VM's memory, a piece at a time while it is watched, and one after another at growing pauses."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import Final

from pvclock.errors import PagesNotFound
from pvclock.meter.watch.page_search import FoundPages

__all__ = ["PacedSearch"]

PAUSE_S: Final = 0.2
PAUSE_MAX_S: Final = 30.0
SEARCH_SHARE: Final = 20
"""Searches take at most this part of the time."""


class PacedSearch:
    """Begins a search with `begin` whenever it is time to; each pause is twice as long as the one before."""

    def __init__(self, begin: Callable[[], Generator[tuple[int, int], None, FoundPages]]) -> None:
        self._begin = begin
        self.pieces = 0
        """Of all searches so far."""
        self.renew()

    def renew(self) -> None:
        """Begin soon, whatever was searched so far."""
        self.stop()
        self.ended = 0
        """Searches that came to their end since."""
        self._pause_s, self._next_s = PAUSE_S, time.monotonic() + PAUSE_S

    def stop(self) -> None:
        """Let go of a search that is under way."""
        self._search: Generator[tuple[int, int], None, FoundPages] | None = None

    @property
    def is_under_way(self) -> bool:
        """Has a search begun, and not ended?"""
        return self._search is not None

    def go_on(self) -> FoundPages | None:
        """Search a piece more, if it is time to; what was found, at the end of a search.  Errors of the VM's RAM."""
        begin_s = time.monotonic()
        if self._search is None:
            if begin_s < self._next_s:
                return None
            self._search, self._busy_s = self._begin(), 0.0
        self.pieces += 1
        try:
            next(self._search)
        except StopIteration as end:
            found: FoundPages = end.value
            self._end(begin_s)
            return found
        except PagesNotFound:
            self._end(begin_s)
            return None
        self._busy_s += time.monotonic() - begin_s
        return None

    def _end(self, begin_s: float) -> None:
        now_s = time.monotonic()
        self.ended += 1
        self._next_s = now_s + max(self._pause_s, SEARCH_SHARE * (self._busy_s + now_s - begin_s))
        self._pause_s = min(2 * self._pause_s, PAUSE_MAX_S)
        self.stop()
