"""The readings of a guest's clock beside a clock of the host: how fast it drifts, and how it steps.

Once an interval a guest's newest reading is placed beside the reference at that very TSC.  The step that a guest sees
is its next reading less what the page of before would have given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Final, NamedTuple, Protocol

from pvclock._counter import read_tsc
from pvclock.meter.guest import GuestReading
from pvclock.meter.watch.lines import floor_ns, ns_per_tick, value_at
from pvclock.meter.watch.words import exact_ns
from pvclock.quantities import NS_PER_S, HostTsc, signed64
from pvclock.readings import Sample, TimeInfo

__all__ = [
    "ENDS",
    "SLEW_SHARE",
    "ClockReadings",
    "DriftPoint",
    "DriftRate",
    "PageThen",
    "ReadableGuest",
    "Reanchor",
    "ReferenceClock",
]

ENDS: Final = 10
"""Readings at either end, whose median counts."""
READING_TRIES: Final = 10
"""A page may change between a reading and the look at it."""
FRESH_TRIES: Final = 100
FRESH_WAIT_S: Final = 0.001
"""A guest whose vCPU waits for a CPU has no reading of now for so long, time and again."""
SLEW_SHARE: Final = 0.1
"""A reference that gains or loses more than this part of the time that passes was set: adjtimex() slews by a tenth."""


class ReadableGuest(Protocol):
    """A guest whose clock can be read: each Guest of the meter, and a VM that runs already (OutsideClock)."""

    def reading(self) -> GuestReading:
        """A reading of vCPU 0 by the page that it has now."""

    def pages(self) -> Sequence[TimeInfo]:
        """Each vCPU's page, vCPU 0's first."""


class ReferenceClock(Protocol):
    """A clock that readings are held against.  tsc_hz: the nominal rate of the host's TSC."""

    tsc_hz: int

    def sample(self) -> Sample:
        """One instant on it and on the host's TSC."""

    def set_by_ns(self) -> int:
        """By how much somebody has set it since it was first asked; 0: not at all, as far as that can be told."""


class PageThen(NamedTuple):
    """vCPU 0's page, as it lay there at the host's TSC host_tsc."""

    info: TimeInfo
    host_tsc: HostTsc


class DriftPoint(NamedTuple):
    """A reading, s seconds of the reference after the first one.

    ahead_ns: how far the guest's clock is ahead of the reference since then; bound_ns: how far that can be wrong.
    step_ns: what the guest's clock had more than the page of before would have given, true to step_bound_ns.
    is_stopped: did its vCPUs stand?  None if its VMM does not tell.
    """

    s: float
    ahead_ns: float
    bound_ns: float
    step_ns: int
    step_bound_ns: float
    is_stopped: bool | None

    @property
    def has_stepped(self) -> bool:
        """Is it sure that its clock has stepped?"""
        return abs(self.step_ns) > self.step_bound_ns


class DriftRate(NamedTuple):
    """How much faster than the reference a clock was between its steps, and how far that can be wrong."""

    ppb: float
    bound_ppb: float


class Reanchor(NamedTuple):
    """A way to make a clock take a new anchor.

    do: does it; wait_s: the server's pages have changed by then.
    """

    name: str
    do: Callable[[], object]
    wait_s: float = 0.0


class ClockReadings:
    """The readings of one started guest against a reference, and the steps between them.

    settle_s: readings from before are shown and not counted.  is_stopped: do the guest's vCPUs stand?  None if its VMM
    does not tell.  host_tsc: reads the host's.
    """

    def __init__(
        self,
        name: str,
        guest: ReadableGuest,
        reference: ReferenceClock,
        settle_s: float = 0.0,
        is_stopped: Callable[[], bool | None] = lambda: False,
        host_tsc: Callable[[], int] = read_tsc,
    ) -> None:
        self.name = name
        self.guest = guest
        self.points: list[DriftPoint] = []
        self.settled: list[DriftPoint] = []
        """Those after settle_s, which count."""
        self.sure_steps: list[DriftPoint] = []
        """Those of these at which the clock has stepped for sure."""
        self.reanchors: dict[str, int] = {}
        """The step in ns of each way to re-anchor the clock."""
        self._reference = reference
        self._settle_s = settle_s
        self._is_stopped, self._host_tsc = is_stopped, host_tsc
        self._first: tuple[int, _Instant] | None = None
        self._set_by_ns = reference.set_by_ns()
        self._offset: int | None = None
        """Guest TSC less host TSC, where readings tell it to the tick: its change is a step, too."""
        self._page = self.page()

    def take(self, before: PageThen | None = None) -> None:
        """Take a reading; its step is against the page `before`, by default that of the reading before."""
        seen, page, at = self._placed_reading()
        first_ns, first = self._first = self._first or (seen.ns, at)
        reference_ns = at.ns - first.ns + at.since_ns - first.since_ns
        bound_ns = at.bound_ns + floor_ns(page.info) + seen.bound_ticks * NS_PER_S / self._reference.tsc_hz
        step_ns, step_bound_ns = _step(before or self._page, page.info, seen, self._tsc_then(seen))
        ahead_ns = seen.ns - first_ns - reference_ns
        s, is_stopped = reference_ns / NS_PER_S, self._is_stopped()
        self._keep(DriftPoint(s, ahead_ns, bound_ns, step_ns, step_bound_ns, is_stopped))
        self._page = page
        self._set_by_ns = self._set_by_ns or self._reference.set_by_ns()

    def reanchor(self, way: Reanchor) -> None:
        """Re-anchor the clock, and keep the step that the guest sees."""
        before = self.page()
        way.do()
        time.sleep(way.wait_s)
        seen, page = self._reading()
        self.reanchors[way.name], _ = _step(before, page.info, seen, seen.tsc)

    @property
    def steps_ns(self) -> list[int]:
        """The step at each reading that counts."""
        return [point.step_ns for point in self.settled]

    @property
    def stopped_readings(self) -> int | None:
        """At how many of these the guest was stopped; None if its VMM does not tell."""
        told = [point.is_stopped for point in self.settled]
        return None if None in told else sum(map(bool, told))

    @property
    def why_no_rate(self) -> str | None:
        """Why there is no rate; None if there is one."""
        if self._set_by_ns:
            return f"the reference was set meanwhile, by {exact_ns(self._set_by_ns, 1000)}"
        if len(self.settled) < 2:
            return "not settled"
        return "the guest was stopped all the while" if all(point.is_stopped for point in self.settled) else None

    @property
    def rate(self) -> DriftRate | None:
        """That between the steps that are sure, by the medians of both ends, of readings that do not overlap."""
        if self.why_no_rate is not None:
            return None
        ends = min(ENDS, len(self.settled) // 2)
        begin, end = self.settled[:ends], self.settled[-ends:]
        steps = [point for point in self.sure_steps if point is not begin[0]]  # what came before that is no part of it
        span_s = median(point.s for point in end) - median(point.s for point in begin)
        rise_ns = median(_stepless_ns(end, steps)) - median(_stepless_ns(begin, steps))
        bound_ns = median(point.bound_ns for point in end) + median(point.bound_ns for point in begin)
        bound_ns += sum(step.step_bound_ns for step in steps)
        return DriftRate(rise_ns / span_s, bound_ns / span_s)

    def page(self) -> PageThen:
        """vCPU 0's page as it is."""
        info = self.guest.pages()[0]
        return PageThen(info, HostTsc(self._host_tsc()))

    # Inside

    def _keep(self, point: DriftPoint) -> None:
        self.points.append(point)
        if point.s >= self._settle_s:
            self.settled.append(point)
            if point.has_stepped:
                self.sure_steps.append(point)

    def _placed_reading(self) -> tuple[GuestReading, PageThen, _Instant]:
        """A reading, the page that it was taken by, and when it was by the reference."""
        before = self._reference.sample()
        for _ in range(FRESH_TRIES):
            seen, page = self._reading()
            after = self._reference.sample()
            if not self._went_on(before, after):
                before, after = after, self._reference.sample()
            elif seen.host_tsc >= before.tsc:
                break
            time.sleep(FRESH_WAIT_S)
        return seen, page, _instant(before, after, seen.host_tsc)

    def _went_on(self, before: Sample, after: Sample) -> bool:
        """May the reference have passed the time between two samples, without having been set?"""
        passed_ns = (after.tsc - before.tsc) * NS_PER_S / self._reference.tsc_hz
        slewed_ns = passed_ns * SLEW_SHARE + before.bound_ns + after.bound_ns
        return abs(after.ns - before.ns - passed_ns) <= slewed_ns

    def _reading(self) -> tuple[GuestReading, PageThen]:
        """A reading and the page that it was taken by, so that no change falls between them."""
        for _ in range(READING_TRIES):
            seen, page = self.guest.reading(), self.page()
            if value_at(page.info, seen.tsc) == seen.ns:
                break
        return seen, page

    def _tsc_then(self, seen: GuestReading) -> int:
        """What the guest's TSC would be at a reading, had nobody written it since the one before."""
        if seen.bound_ticks:
            return seen.tsc
        before, self._offset = self._offset, signed64(seen.tsc - seen.host_tsc)
        return seen.tsc if before is None else seen.host_tsc + before


class _Instant(NamedTuple):
    """What the reference was: ns + since_ns, true to bound_ns."""

    ns: int
    since_ns: float
    bound_ns: float


def _instant(before: Sample, after: Sample, tsc: int) -> _Instant:
    """By the line through two samples, at best around it: so its own rate counts, and no nominal one."""
    share = (tsc - before.tsc) / (after.tsc - before.tsc)
    bound_ns = abs(1 - share) * before.bound_ns + abs(share) * after.bound_ns
    return _Instant(before.ns, share * (after.ns - before.ns), bound_ns)


def _stepless_ns(points: Sequence[DriftPoint], steps: Sequence[DriftPoint]) -> list[float]:
    """How far ahead the clock was at points, had it not stepped."""
    return [point.ahead_ns - sum(step.step_ns for step in steps if step.s <= point.s) for point in points]


def _step(before: PageThen, after: TimeInfo, seen: GuestReading, tsc_then: int) -> tuple[int, float]:
    """(step_ns, bound_ns) of a reading by `after`; a line of another rate may have begun at any time since `before`."""
    bend = abs(ns_per_tick(after) - ns_per_tick(before.info))
    bound_ns = max(floor_ns(before.info), floor_ns(after)) + bend * abs(seen.host_tsc - before.host_tsc)
    return signed64(seen.ns - value_at(before.info, tsc_then)), float(bound_ns)
