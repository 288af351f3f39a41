"""Past segments of a VM's timeline: guest time at an earlier instant."""

from __future__ import annotations

from collections import deque
from fractions import Fraction
from typing import Final

from pvclock.errors import RangeError
from pvclock.quantities import U64_MASK, HostTsc, signed64
from pvclock.timekeeping.timeline import Timeline

__all__ = ["SEGMENTS_KEPT", "History"]

SEGMENTS_KEPT: Final = 256
"""Bound of the history: the newest segments stay.  Each change of rate, step or pause ends one."""


class History:
    """The last SEGMENTS_KEPT ended segments, each a copy of the timeline as it was when the segment ended."""

    def __init__(self) -> None:
        self._ended: deque[Timeline] = deque(maxlen=SEGMENTS_KEPT)

    def add(self, ended: Timeline) -> None:
        """Add a segment that ended; the next one begins where it ends."""
        self._ended.append(ended)

    def clear(self) -> None:
        """Drop all segments: after a step of the host TSC, earlier values identify no instant."""
        self._ended.clear()

    def at(self, tsc: HostTsc, present: Timeline) -> Fraction:
        """Guest time in ns at host TSC `tsc`, exactly; `present` is the current segment.

        RangeError before the oldest kept segment.
        """
        for segment in (present, *reversed(self._ended)):
            if signed64(tsc - segment.begin_tsc) >= 0:
                return segment.at(tsc)
        oldest = self._ended[0] if self._ended else present
        raise RangeError(
            f"host TSC {tsc} is {(oldest.begin_tsc - tsc) & U64_MASK} ticks before the oldest segment that is kept; "
            f"the last {SEGMENTS_KEPT} are"
        )
