"""Is a guest's TSC still the one of before?  What lines, events and the host's TSC say where its offset is not known.

The host's instant of a tsc_timestamp is unknown then, and yet not beyond all bounds: a line was made before it was
seen, and, without a master clock, after the last poll that did not see it yet.  (A master clock's pair may be old: a
vCPU that was halted takes it when it enters.)  From one line to the next that instant goes on by what the timestamps
do, if the TSC is the same; where no instant is left, it is not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from pvclock.meter.watch.changes import TscBasis
from pvclock.meter.watch.lines import BACKDATED_TICKS, TSC_STABLE, TscRates, is_one_pair
from pvclock.meter.watch.vm import VmEvent, VmEventKind
from pvclock.quantities import HostTsc, signed64
from pvclock.readings import TimeInfo

__all__ = ["TscAccount"]

CHANGES_TSC: Final = (VmEventKind.RESET, VmEventKind.MIGRATION)


class TscAccount:
    """The TSC of one vCPU, whose offset is not known, from its first line on, which was seen `at`."""

    def __init__(self, rates: TscRates, at: HostTsc) -> None:
        self._rates = rates
        self.is_doubted = False
        """Does something say that it was changed since that line?"""
        self._earliest, self._latest = 0, int(at)
        """The host's TSC at the present line's tsc_timestamp: it counts from 0, when the host was started."""

    def note(self, events: Iterable[VmEvent]) -> None:
        """Take what the VMM told."""
        self.is_doubted |= any(event.kind in CHANGES_TSC for event in events)

    def doubt(self) -> None:
        """Take something else for a sign that the TSC was changed."""
        self.is_doubted = True

    def take(
        self, before: TimeInfo, after: TimeInfo, since: HostTsc, at: HostTsc, events: Iterable[VmEvent]
    ) -> TscBasis:
        """Can both lines be of one TSC?  `after` came after `since`, was seen at `at`, and is the present line now.

        events: told with the poll that saw it.  They may be of before it or after it, so they count for the next, too.
        """
        self.note(events)
        ticks = signed64(after.tsc_timestamp - before.tsc_timestamp)
        is_changed = self.is_doubted or ticks < -BACKDATED_TICKS or is_one_pair(before, after)
        is_changed |= not self._goes_on(after, ticks, since, at)
        if is_changed:
            self._earliest, self._latest = 0, int(at)
        self.is_doubted = False
        self.note(events)
        return TscBasis.CHANGED if is_changed else TscBasis.ASSUMED

    def _goes_on(self, after: TimeInfo, ticks: int, since: HostTsc, at: HostTsc) -> bool:
        """Is there an instant left for the timestamp of `after`, `ticks` later than the one before?"""
        if self._rates.is_scaled(after):  # a tick of the guest is not the host's
            self._earliest, self._latest = 0, int(at)
            return True
        begin = 0 if after.flags & TSC_STABLE else since - BACKDATED_TICKS
        self._earliest = max(self._earliest + ticks, begin)
        self._latest = min(self._latest + ticks, int(at))
        return self._earliest <= self._latest + BACKDATED_TICKS
