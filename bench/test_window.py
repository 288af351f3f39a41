"""How long pages are odd, and what that costs a reader: see bench/native/window.c for what is stamped.

The yardstick is the margin of 1024 ticks: a publish waits for it, so no window can be shorter.
"""

from __future__ import annotations

import os
from statistics import median, quantiles

import pytest

from bench.c_twins import Stalls, Twins, WindowSample
from bench.comparison import Comparison, Figure
from bench.published_clock import LINUX_STRIDE, published_clock
from pvclock import HostBackend

PAGES = (1, 8, 64, 1024)
SAMPLES = 1000
ROUNDS = 20
REST_US = 10
"""Before each publish: time for readers to fetch the pages and go on."""

READERS = min(2, len(os.sched_getaffinity(0)) - 1)
"""Each has a CPU of its own, and so has the writer."""


class Stamps:
    """The samples of many rounds, read in ns."""

    def __init__(self, tsc_hz: int) -> None:
        self.ns_per_tick = 1e9 / tsc_hz
        self.margin_ns = HostBackend(tsc_hz).counter.margin_ticks * self.ns_per_tick
        self.samples: list[WindowSample] = []
        self.stalls: list[Stalls] = []

    def add(self, samples: list[WindowSample], stalls: Stalls) -> None:
        """Add a round."""
        self.samples += samples
        self.stalls.append(stalls)

    @property
    def windows_ns(self) -> list[float]:
        """All windows, without what their stamps took."""
        stamps = median(sample.stamps for sample in self.samples)
        return [(sample.window - stamps) * self.ns_per_tick for sample in self.samples]

    def figure(self, title: str, ns: float, note: str = "") -> Figure:
        """Return a time beside the margin."""
        return Figure(title, ns, "margin of 1024 ticks", self.margin_ns, note)

    def quiet(self, title: str) -> Figure:
        """Return the median, and whether the stamped copy costs what pvclock_publish() does."""
        copy = median(sample.stamped_publish - sample.stamps for sample in self.samples)
        original = median(sample.publish for sample in self.samples)
        return self.figure(title, median(self.windows_ns), f"stamped copy / original: {copy / original:.2f}")

    def p99(self, title: str) -> Figure:
        """Return what 1 window in 100 exceeds."""
        windows = self.windows_ns
        return self.figure(title, quantiles(windows, n=100)[-1], f"median {median(windows):.0f} ns")

    def longest_window(self, title: str) -> Figure:
        """Return the longest window in which the writer kept its CPU, and say in how many it did not."""
        kept = (ns for ns, sample in zip(self.windows_ns, self.samples, strict=True) if not sample.lost_cpu)
        lost = sum(bool(sample.lost_cpu) for sample in self.samples)
        return self.figure(title, max(kept, default=0.0), f"CPU lost in {lost} of {len(self.samples)} windows")

    def longest_stall(self, title: str) -> Figure:
        """Return the longest of all reads that had to try again and kept their CPU."""
        reads, stalled = (sum(getattr(each, kind) for each in self.stalls) for kind in ("reads", "stalled"))
        longest_ns = max(each.longest_ticks for each in self.stalls) * self.ns_per_tick
        return self.figure(title, longest_ns, f"{100 * stalled / max(reads, 1):.2g} % of reads tried again")


def take(
    comparison: Comparison, twins: Twins, tsc_hz: int, pages: int, *, readers: int = 0, young: bool = False
) -> Stamps:
    """Stamp publishes to `pages` pages."""
    stamps = Stamps(tsc_hz)
    rest_ticks = tsc_hz * REST_US // 10**6
    with published_clock(tsc_hz, pages, LINUX_STRIDE, young=young) as (_, layout, rate):
        comparison.benchmark.pedantic(
            lambda: stamps.add(*twins.windows(layout, rate, SAMPLES, rest_ticks=rest_ticks, readers=readers)),
            rounds=ROUNDS,
        )
    return stamps


@pytest.mark.parametrize("pages", PAGES, ids="{}p".format)
def test_quiet(comparison: Comparison, twins: Twins, tsc_hz: int, pages: int) -> None:
    """Without readers."""
    stamps = take(comparison, twins, tsc_hz, pages)
    comparison.record(stamps.quiet(f"odd window, {pages} x 64 B, quiet median"))


def test_quiet_young(comparison: Comparison, twins: Twins, tsc_hz: int) -> None:
    """A clock too young for an exact line searches for one inside the window."""
    stamps = take(comparison, twins, tsc_hz, 1, young=True)
    comparison.record(stamps.quiet("odd window, 1 x 64 B, quiet median, young clock"))


@pytest.mark.skipif(READERS == 0, reason="readers need a second CPU: widen the affinity (taskset -c 0,1)")
@pytest.mark.parametrize("pages", PAGES, ids="{}p".format)
def test_contended(comparison: Comparison, twins: Twins, tsc_hz: int, pages: int) -> None:
    """Readers on other CPUs spin on the pages."""
    stamps = take(comparison, twins, tsc_hz, pages, readers=READERS)
    name = f"odd window, {pages} x 64 B, {READERS} reader{'s' if READERS > 1 else ''}"
    comparison.record(
        stamps.p99(f"{name}, p99"),
        stamps.longest_window(f"{name}, longest"),
        stamps.longest_stall(f"{name}, longest stall"),
    )
