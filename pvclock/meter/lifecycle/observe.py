"""One guest before and after an operation: by its own readings, its pages and the host's clocks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from pvclock._sampling import sample_clock
from pvclock.errors import StateError
from pvclock.meter.guest import ClockServer, GuestReading
from pvclock.meter.lifecycle.guest import LifecycleGuest
from pvclock.meter.lifecycle.operations import Kind, Operation, Stopped
from pvclock.meter.observe import wait_until_all_read
from pvclock.payloads.probe import ProbeRecord
from pvclock.quantities import NS_PER_S
from pvclock.readings import TimeInfo

__all__ = ["Look", "Observed", "observe_operation"]


class Look(NamedTuple):
    """A running guest at one instant, or within some ms of it.

    tsc_offsets: guest TSC less host TSC; None where they cannot be read.  reading: of vCPU 0.  wall_clock_error_ns: the
    wall clock record plus that reading against the host's CLOCK_REALTIME.
    """

    pages: list[TimeInfo]
    tsc_offsets: tuple[int | None, ...]
    records: list[ProbeRecord]
    reading: GuestReading
    wall_clock_error_ns: int


class Observed(NamedTuple):
    """A guest before and after an operation, for which it was stopped as `stopped` says."""

    kind: Kind
    server: ClockServer
    tsc_hz: int
    stopped: Stopped
    before: Look
    after: Look

    @property
    def booted_anew(self) -> bool:
        """Did its vCPUs begin anew, and with them their records?"""
        pairs = zip(self.before.records, self.after.records, strict=True)
        return any(before.first_tsc != after.first_tsc for before, after in pairs)

    @property
    def left_out_ns(self) -> int:
        """The host's time between the two readings that the guest's clock left out; negative if it stepped forward."""
        passed = self.after.reading.host_tsc - self.before.reading.host_tsc
        return self._ns(passed) - (self.after.reading.ns - self.before.reading.ns)

    @property
    def left_out_bound_ns(self) -> int:
        """How far left_out_ns can be wrong: the readings' instants on the host's TSC, and 1 ns for each floor."""
        return self._ns(self.before.reading.bound_ticks + self.after.reading.bound_ticks) + 4

    def _ns(self, ticks: int) -> int:
        return ticks * NS_PER_S // self.tsc_hz


def observe_operation(make_guest: Callable[[], LifecycleGuest], operation: Operation) -> Observed:
    """Perform `operation` on a guest of its own, while it runs; the guest is ended then."""
    with make_guest() as guest:
        guest.start()
        try:
            wait_until_all_read(guest)
            before = _look(guest)
            stopped = operation.perform(guest)
            wait_until_all_read(guest)
            after = _look(guest)
        except StateError:
            guest.check_running()  # a guest that has ended is the better explanation
            raise
        return Observed(operation.kind, guest.server, guest.tsc_hz, stopped, before, after)


def _look(guest: LifecycleGuest) -> Look:
    reading = guest.reading()
    tsc, utc_ns, _ = sample_clock(time.CLOCK_REALTIME)
    utc_then_ns = utc_ns + (reading.host_tsc - tsc) * NS_PER_S // guest.tsc_hz
    error_ns = guest.wall_clock_ns() + reading.ns - utc_then_ns
    return Look(guest.pages(), guest.tsc_offsets(), guest.records(), reading, error_ns)
