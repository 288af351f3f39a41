"""The guest's time of day and its wall-clock record."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from pvclock._records import publish_wall_clock
from pvclock._transaction import commit
from pvclock.arguments import instance, whole
from pvclock.clock.timekeeper import Timekeeper, nothing
from pvclock.errors import RangeError
from pvclock.quantities import Gpa, shown
from pvclock.readings import Sample

__all__ = ["WallClock", "WallClockBase"]

NS_MAX = 1 << 63


class WallClockBase(NamedTuple):
    """The source of a guest's time of day: the host's UTC plus offset_ns, both within 2^63 ns.

    fixed_ns: instead of the host's UTC, this instant (ns since 1970) at guest time 0, advancing with guest time.
    """

    offset_ns: int = 0
    fixed_ns: int | None = None


class WallClock:
    """Computes one guest's time of day, and writes its wall-clock record."""

    def __init__(self, keeper: Timekeeper) -> None:
        self.gpa: Gpa | None = None
        """Where the guest last asked for its record; None before that."""
        self._keeper = keeper
        self._base = WallClockBase()

    @property
    def base(self) -> WallClockBase:
        """The source of the time of day; settable, effective at the guest's next request.  Saved with the clock."""
        return self._base

    @base.setter
    def base(self, base: WallClockBase) -> None:
        instance("wall_clock", base, WallClockBase)
        whole("WallClockBase.offset_ns", base.offset_ns)
        for name, ns in zip(base._fields, base, strict=True):
            if ns is not None and not -NS_MAX <= whole(f"WallClockBase.{name}", ns) < NS_MAX:
                raise RangeError(f"wall clock: {name} is {shown(ns)}; it must be within 2^63 ns")
        self._base = base

    def write(self, gpa: Gpa, sample: Sample, on_commit: Callable[[], object] = nothing) -> None:
        """Write the time of day at guest time 0 into the record at `gpa`, once; does nothing if that is not in memory.

        sample: of CLOCK_REALTIME, now.  on_commit: sets what else changes; called at least once, past the point where
        anything can fail.
        """
        keeper = self._keeper
        epoch_ns = self.time_of_day_ns(sample) - keeper.timeline.at(sample.tsc).__floor__()

        def take(_: object) -> None:
            self.gpa = gpa
            on_commit()

        commit(partial(publish_wall_clock, keeper.memory, gpa, epoch_ns), lambda _: (None, ()), take, keeper.events)

    def time_of_day_ns(self, sample: Sample) -> int:
        """The guest's time of day at the instant of a CLOCK_REALTIME sample, in ns since 1970."""
        if self._base.fixed_ns is None:
            return sample.ns + self._base.offset_ns
        return self._base.fixed_ns + self._base.offset_ns + self._keeper.timeline.at(sample.tsc).__floor__()
