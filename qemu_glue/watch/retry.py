"""When a VM of a fleet that is not watched, although its socket is there, is tried again."""

from __future__ import annotations

import time
from typing import Final, NamedTuple, Self

__all__ = ["Retry"]

PAUSE_S: Final = 4.0
PAUSE_MAX_S: Final = 60.0


class Retry(NamedTuple):
    """why: what keeps it from being watched; None: nothing is known to, for its watch came to its end."""

    why: str | None
    pause_s: float
    due_s: float

    @classmethod
    def first(cls, why: str | None) -> Self:
        """After a while."""
        return cls(why, PAUSE_S, time.monotonic() + PAUSE_S)

    def next(self, why: str | None) -> Self:
        """After one more try that failed: after twice the while, up to a minute."""
        pause_s = min(2 * self.pause_s, PAUSE_MAX_S)
        return self._replace(why=why, pause_s=pause_s, due_s=time.monotonic() + pause_s)

    @property
    def is_due(self) -> bool:
        """Is it time?"""
        return time.monotonic() >= self.due_s
