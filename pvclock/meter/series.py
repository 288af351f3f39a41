"""A series of readings of a guest's clock beside a clock of the host: how fast it drifts, and how it steps.

Once an interval a guest's newest reading is placed beside the reference at that very TSC.  The step that a guest sees
is its next reading less what the page of before would have given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from operator import attrgetter
from statistics import median
from typing import Final, NamedTuple, Protocol

from pvclock._counter import read_tsc
from pvclock.meter.guest import GuestReading
from pvclock.meter.watch.lines import floor_ns, ns_per_tick, value_at
from pvclock.quantities import NS_PER_S, HostTsc, signed64
from pvclock.readings import Sample, TimeInfo
from pvclock.timekeeping.sampling import Sampler

__all__ = ["ENDS", "DriftRate", "PageThen", "Reanchor", "Series", "SeriesGuest", "SeriesPoint"]

ENDS: Final = 10
"""Readings at either end, whose median counts."""
READING_TRIES: Final = 10
"""A page may change between a reading and the look at it."""


class SeriesGuest(Protocol):
    """A guest whose clock can be read: each Guest of the meter, and a VM that runs already (OutsideClock)."""

    def reading(self) -> GuestReading:
        """A reading of vCPU 0 by the page that it has now."""

    def pages(self) -> Sequence[TimeInfo]:
        """Each vCPU's page, vCPU 0's first."""


class PageThen(NamedTuple):
    """vCPU 0's page, as it lay there at the host's TSC host_tsc."""

    info: TimeInfo
    host_tsc: HostTsc


class SeriesPoint(NamedTuple):
    """A reading, s seconds of the reference after the first one.

    ahead_ns: how far the guest's clock is ahead of the reference since then; bound_ns: how far that can be wrong.
    step_ns: what the guest's clock had more than the page of before would have given, true to step_bound_ns.
    """

    s: float
    ahead_ns: float
    bound_ns: float
    step_ns: int
    step_bound_ns: float


class DriftRate(NamedTuple):
    """How much faster than the reference a clock was, and how far that can be wrong."""

    ppb: float
    bound_ppb: float


class Reanchor(NamedTuple):
    """A way to make a clock take a new anchor.

    do: does it; wait_s: the server's pages have changed by then.
    """

    name: str
    do: Callable[[], object]
    wait_s: float = 0.0


class Series:
    """The readings of one started guest against a reference, and the steps between them.

    sampler: of the reference.  tsc_hz: the host's, for the first reading only.  settle_s: readings from before are
    shown and not counted.  host_tsc: reads the host's.
    """

    def __init__(
        self,
        name: str,
        guest: SeriesGuest,
        sampler: Sampler,
        tsc_hz: int,
        settle_s: float = 0.0,
        host_tsc: Callable[[], int] = read_tsc,
    ) -> None:
        self.name = name
        self.guest = guest
        self.points: list[SeriesPoint] = []
        self.reanchors: dict[str, int] = {}
        """The step in ns of each way to re-anchor the clock."""
        self._sampler = sampler
        self._tsc_hz = tsc_hz
        self._settle_s = settle_s
        self._host_tsc = host_tsc
        self._first: tuple[int, int, float] | None = None
        self._last: Sample | None = None
        self._offset: int | None = None
        """Guest TSC less host TSC, where readings tell it to the tick: its change is a step, too."""
        self._page = self.page()

    def take(self, before: PageThen | None = None) -> None:
        """Take a reading; its step is against the page `before`, by default that of the reading before."""
        sample = self._sampler.sample()
        seen, page = self._reading()
        last, self._last = self._last, sample
        # The reference's own rate, by the last second: far from nominal, a ms between sample and reading would show.
        ns_per_host_tick = (sample.ns - last.ns) / (sample.tsc - last.tsc) if last else NS_PER_S / self._tsc_hz
        since_ns = (seen.host_tsc - sample.tsc) * ns_per_host_tick
        first_ns, first_sample_ns, first_since_ns = self._first = self._first or (seen.ns, sample.ns, since_ns)
        reference_ns = sample.ns - first_sample_ns + since_ns - first_since_ns
        bound_ns = sample.bound_ns + 1 + seen.bound_ticks * ns_per_host_tick
        step_ns, step_bound_ns = _step(before or self._page, page.info, seen, self._tsc_then(seen))
        ahead_ns = seen.ns - first_ns - reference_ns
        self.points.append(SeriesPoint(reference_ns / NS_PER_S, ahead_ns, bound_ns, step_ns, step_bound_ns))
        self._page = page

    def reanchor(self, way: Reanchor) -> None:
        """Re-anchor the clock, and keep the step that the guest sees."""
        before = self.page()
        way.do()
        time.sleep(way.wait_s)
        seen, page = self._reading()
        self.reanchors[way.name], _ = _step(before, page.info, seen, seen.tsc)

    @property
    def steps_ns(self) -> list[int]:
        """The step at each reading."""
        return [point.step_ns for point in self.points]

    @property
    def settled(self) -> list[SeriesPoint]:
        """The points after settle_s."""
        return [point for point in self.points if point.s >= self._settle_s]

    @property
    def rate(self) -> DriftRate | None:
        """By the medians of both ends, of as many readings as do not overlap; None before two readings have settled."""
        settled = self.settled
        ends = min(ENDS, len(settled) // 2)
        if not ends:
            return None
        begin, end = settled[:ends], settled[-ends:]
        span_s = _median(end, "s") - _median(begin, "s")
        rise_ns = _median(end, "ahead_ns") - _median(begin, "ahead_ns")
        return DriftRate(rise_ns / span_s, (_median(end, "bound_ns") + _median(begin, "bound_ns")) / span_s)

    def page(self) -> PageThen:
        """vCPU 0's page as it is."""
        info = self.guest.pages()[0]
        return PageThen(info, HostTsc(self._host_tsc()))

    # Inside

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


def _step(before: PageThen, after: TimeInfo, seen: GuestReading, tsc_then: int) -> tuple[int, float]:
    """(step_ns, bound_ns) of a reading by `after`; a line of another rate may have begun at any time since `before`."""
    bend = abs(ns_per_tick(after) - ns_per_tick(before.info))
    bound_ns = max(floor_ns(before.info), floor_ns(after)) + bend * abs(seen.host_tsc - before.host_tsc)
    return signed64(seen.ns - value_at(before.info, tsc_then)), float(bound_ns)


def _median(points: Sequence[SeriesPoint], field: str) -> float:
    return float(median(map(attrgetter(field), points)))
