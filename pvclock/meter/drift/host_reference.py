"""Clocks of this host that guests' clocks are held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from pvclock.host.this_host import HostBackend
from pvclock.meter.drift.readings import SLEW_SHARE, ClockReadings, ReadableGuest
from pvclock.quantities import NS_PER_S
from pvclock.readings import Reference, Sample
from pvclock.timekeeping.sampling import Sampler

__all__ = ["HostReference"]

OFFSET_TRIES: Final = 4
"""One of them is not interrupted between its two samples."""


class HostReference:
    """A clock of this host that guests' clocks are held against: a ReferenceClock."""

    def __init__(self, reference: Reference) -> None:
        self._backend = HostBackend()
        self.reference = reference
        self.tsc_hz = self._backend.tsc_hz
        self._sampler = Sampler(lambda: self._backend.sample(reference))
        self._offset: _Offset | None = None

    def sample(self) -> Sample:
        """See ReferenceClock."""
        return self._sampler.sample()

    def set_by_ns(self) -> int:
        """See ReferenceClock.  UTC is slewed as CLOCK_MONOTONIC is, which nobody can set."""
        if self.reference is not Reference.REALTIME:
            return 0
        now = min((self._utc_offset() for _ in range(OFFSET_TRIES)), key=lambda it: it.bound_ns)
        first = self._offset = self._offset or now
        return now.ns - first.ns if abs(now.ns - first.ns) > now.bound_ns + first.bound_ns else 0

    def readings(
        self, name: str, guest: ReadableGuest, settle_s: float, is_stopped: Callable[[], bool | None] = lambda: False
    ) -> ClockReadings:
        """The readings of a started guest against it."""
        return ClockReadings(name, guest, self, settle_s, is_stopped)

    def _utc_offset(self) -> _Offset:
        utc, monotonic = self._backend.sample(Reference.REALTIME), self._backend.sample(Reference.MONOTONIC)
        between_ns = (monotonic.tsc - utc.tsc) * NS_PER_S // self.tsc_hz
        bound_ns = utc.bound_ns + monotonic.bound_ns + between_ns * SLEW_SHARE
        return _Offset(utc.ns + between_ns - monotonic.ns, bound_ns)


class _Offset(NamedTuple):
    """UTC less CLOCK_MONOTONIC, true to bound_ns."""

    ns: int
    bound_ns: float
