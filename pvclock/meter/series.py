"""A series of readings of guests' clocks beside a clock of the host: how fast they drift, and how they step.

Once an interval a guest's newest reading is placed beside the reference at that very TSC.  The step that a guest sees
is its next reading less what the page of before would have given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Final, NamedTuple

from pvclock.host.this_host import HostBackend
from pvclock.meter.findings import shown_by
from pvclock.meter.guest import EngineGuest, Guest
from pvclock.quantities import NS_PER_S
from pvclock.readings import Reference, Sample, TimeInfo
from pvclock.timekeeping.sampling import Sampler

__all__ = ["ENDS", "Reanchor", "ReferencePoint", "Series", "watch_drift"]

ENDS: Final = 10
"""Readings at either end, whose median counts."""


class ReferencePoint(NamedTuple):
    """A guest's clock beside the reference: how far ahead (ns) since the beginning, and how far that can be wrong."""

    s: float
    ahead_ns: float
    bound_ns: float


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
    shown and not counted.
    """

    def __init__(self, name: str, guest: Guest, sampler: Sampler, tsc_hz: int, settle_s: float = 0.0) -> None:
        self.name = name
        self.guest = guest
        self.points: list[ReferencePoint] = []
        self.steps_ns: list[int] = []
        """At each reading: what the guest's clock had more than the page of before would have given."""
        self.reanchors: dict[str, int] = {}
        """The step in ns of each way to re-anchor the clock."""
        self._sampler = sampler
        self._tsc_hz = tsc_hz
        self._settle_s = settle_s
        self._first: tuple[int, int, float] | None = None
        self._last: Sample | None = None
        self._page = self.page()

    def take(self, before: TimeInfo | None = None) -> None:
        """Take a reading; its step is against the page `before`, by default that of the reading before."""
        sample = self._sampler.sample()
        seen = self.guest.reading()
        last, self._last = self._last, sample
        # The reference's own rate, by the last second: far from nominal, a ms between sample and reading would show.
        ns_per_tick = (sample.ns - last.ns) / (sample.tsc - last.tsc) if last else NS_PER_S / self._tsc_hz
        since_ns = (seen.host_tsc - sample.tsc) * ns_per_tick
        first_ns, first_sample_ns, first_since_ns = self._first = self._first or (seen.ns, sample.ns, since_ns)
        reference_ns = sample.ns - first_sample_ns + since_ns - first_since_ns
        bound_ns = sample.bound_ns + 1 + seen.bound_ticks * ns_per_tick
        self.points.append(ReferencePoint(reference_ns / NS_PER_S, seen.ns - first_ns - reference_ns, bound_ns))
        self.steps_ns.append(seen.ns - shown_by(before or self._page, seen.tsc))
        self._page = self.page()

    def reanchor(self, way: Reanchor) -> None:
        """Re-anchor the clock, and keep the step that the guest sees."""
        before = self.page()
        way.do()
        time.sleep(way.wait_s)
        seen = self.guest.reading()
        self.reanchors[way.name] = seen.ns - shown_by(before, seen.tsc)

    @property
    def settled(self) -> list[ReferencePoint]:
        """The points after settle_s."""
        return [point for point in self.points if point.s >= self._settle_s]

    @property
    def rate_ppb(self) -> tuple[float, float]:
        """How much faster than the reference it was, and how far that can be wrong: by the medians of both ends."""
        begin, end = self.settled[:ENDS], self.settled[-ENDS:]
        span_s = _median(end, "s") - _median(begin, "s")
        rise_ns = _median(end, "ahead_ns") - _median(begin, "ahead_ns")
        return rise_ns / span_s, (_median(end, "bound_ns") + _median(begin, "bound_ns")) / span_s

    def page(self) -> TimeInfo:
        """vCPU 0's page as it is."""
        return self.guest.pages()[0]


def _median(points: list[ReferencePoint], field: str) -> float:
    return float(median(getattr(point, field) for point in points))


def watch_drift(
    kernel: Guest,
    engine: EngineGuest,
    reference: Reference,
    *,
    seconds: float,
    settle_s: float,
    interval_s: float,
    progress: Callable[[float, Sequence[Series]], None],
) -> tuple[Series, Series]:
    """Start both guests and watch them for `seconds` after `settle_s`, while the engine's clock follows `reference`.

    The kernel's series comes first.  progress: is called after each pair of readings, with the seconds that passed.
    """
    for guest in (kernel, engine):
        guest.start()
    backend = HostBackend(kernel.tsc_hz)
    sampler = Sampler(lambda: backend.sample(reference))
    kernels = Series("kernel kvmclock", kernel, sampler, kernel.tsc_hz, settle_s)
    engines = Series(f"pvclock, {reference}", engine, sampler, kernel.tsc_hz, settle_s)
    clock = engine.engine_clock
    clock.follow(reference)
    begin = due = time.monotonic()
    while (passed := time.monotonic() - begin) < settle_s + seconds or not kernels.settled:
        kernels.take()
        before = engines.page()  # a corrected rate changes no reading at the break point, so compare at once
        clock.tick()
        engines.take(before)
        progress(passed, (kernels, engines))
        due += interval_s
        time.sleep(max(due - time.monotonic(), 0))
    return kernels, engines
