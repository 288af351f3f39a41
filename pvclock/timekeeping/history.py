"""The segments that a VM's timeline had: what guest time was at an instant in the past."""

from __future__ import annotations

from collections import deque
from fractions import Fraction
from typing import Final

from pvclock.errors import RangeError
from pvclock.quantities import U64_MASK, HostTsc, signed64
from pvclock.timekeeping.timeline import Timeline

__all__ = ["SEGMENTS_KEPT", "History"]

SEGMENTS_KEPT: Final = 256
"""The newest ones; each change of rate, step or pause ends one."""


class History:
    """The last SEGMENTS_KEPT segments that have ended, each a timeline as it was when it ended."""

    def __init__(self) -> None:
        self._ended: deque[Timeline] = deque(maxlen=SEGMENTS_KEPT)

    def add(self, ended: Timeline) -> None:
        """Keep a segment that ended where the next one begins."""
        self._ended.append(ended)

    def clear(self) -> None:
        """Forget all: the host's TSC stepped, and what it said before names no instant any more."""
        self._ended.clear()

    def at(self, tsc: HostTsc, present: Timeline) -> Fraction:
        """Guest time in ns at host TSC `tsc`, exactly; `present` is the segment that goes on.

        RangeError before the oldest segment that is kept.
        """
        for segment in (present, *reversed(self._ended)):
            if signed64(tsc - segment.begin_tsc) >= 0:
                return segment.at(tsc)
        oldest = self._ended[0] if self._ended else present
        raise RangeError(
            f"host TSC {tsc} is {(oldest.begin_tsc - tsc) & U64_MASK} ticks before the oldest segment that is kept; "
            f"the last {SEGMENTS_KEPT} are"
        )
