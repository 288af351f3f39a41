"""How often each VM of a fleet is looked at: as often as all looks together leave the host alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from pvclock.meter.watch.loop import POLL_SHARE, WatchLoop

__all__ = ["SharedWait"]

INTERVAL_MAX_S: Final = 60.0
COST_MEMORY: Final = 8
"""A look's cost is that of about so many looks before it that searched nothing: a search is spread out for itself."""
NS_PER_S: Final = 1_000_000_000


class SharedWait:
    """A watch's `wait` that has its looks take 1/20 of a CPU at most, divided by how many VMs are watched.

    wait: sleeps; True at the end.  watched: how many VMs are, at this moment.  cpu_s: the CPU time of the thread that
    looks.  is_fixed: the user has said how often to look.
    """

    def __init__(
        self,
        wait: Callable[[float], bool],
        watched: Callable[[], int],
        *,
        is_fixed: bool = False,
        cpu_s: Callable[[], float] = time.thread_time,
    ) -> None:
        self._wait, self._watched, self._is_fixed, self._cpu_s = wait, watched, is_fixed, cpu_s
        self._loop: WatchLoop | None = None
        self._least_s = 0.0
        self._cost_s = 0.0
        self._begin_s: float | None = None
        self._searched = 0

    def take_charge(self, loop: WatchLoop) -> None:
        """Of a loop whose pages are found: it would look that often if it were alone."""
        self._loop, self._least_s = loop, loop.interval_s

    def __call__(self, seconds: float) -> bool:
        """Sleep for `seconds`; is it the end?"""
        if self._loop is not None and not self._is_fixed:
            self._adapt(self._loop)
        is_end = self._wait(seconds)
        self._begin_s = self._cpu_s()
        return is_end

    def _adapt(self, loop: WatchLoop) -> None:
        before, self._searched = self._searched, loop.finder.searched_pieces
        if self._begin_s is not None and self._searched == before:
            cost_s = self._cpu_s() - self._begin_s
            self._cost_s += (cost_s - self._cost_s) / (COST_MEMORY if self._cost_s else 1)
        # The sleep that begins now is of the interval so far, and a gap as long as that is no stall.
        loop.watcher.interval_ns = int(loop.interval_s * NS_PER_S)
        loop.interval_s = max(self._least_s, min(POLL_SHARE * self._watched() * self._cost_s, INTERVAL_MAX_S))
