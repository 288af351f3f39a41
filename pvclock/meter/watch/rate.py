"""How fast a page's line is against a reference clock of the host."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Final, NamedTuple

from pvclock.meter.watch.lines import TscRates, ns_per_tick
from pvclock.quantities import NS_PER_S, signed64
from pvclock.readings import Sample, TimeInfo
from pvclock.timekeeping.sampling import LEAST_BOUND_NS, Baseline, Point, Rate, Sampler

__all__ = ["PageRate", "RateMeter"]

PPB: Final = 10**9
OUTLIERS: Final = 4
STEEPEST: Final = 0.01
"""The host's TSC frequency is known better than to 1 %."""


class PageRate(NamedTuple):
    """A guest's clock against the reference: so many ppb too fast, right to bound_ppb; both None, and `why`."""

    ppb: float | None
    bound_ppb: float | None
    why: str | None = None


class RateMeter:
    """Learns the host TSC's rate from samples of a reference, the better the longer it does.

    sample: takes one sample.  host_tsc_hz: the TSC's nominal frequency.  guest_tsc_hz: the guest's, if its VMM tells.
    A reference that was set, or changed its rate by more than the samples' bounds allow, begins a new line once some
    samples in a row say so; `restarts` counts these, and rates are of the time since.
    """

    def __init__(self, sample: Callable[[], Sample], host_tsc_hz: int, guest_tsc_hz: int | None = None) -> None:
        self.restarts = 0
        self._sampler = Sampler(sample)
        self._rates = TscRates(host_tsc_hz, guest_tsc_hz)
        self._outliers = 0
        self._begin_with(None)

    def take(self) -> Sample:
        """Take one more sample, and return it.  Errors of the source."""
        sample = self._sampler.sample()
        if self._first is None:
            self._begin_with(sample)
        elif self._baseline.admit(self._point(sample, self._first)):
            self._outliers = 0
        else:
            self._outliers += 1
            if self._outliers == OUTLIERS:
                self.restarts += 1
                self._begin_with(sample)
        return sample

    @property
    def host_rate(self) -> Rate | None:
        """How much faster than nominal the host's TSC is, by the reference; None before the second sample."""
        if len(self._baseline.points) < 2:
            return None
        reference, bound = self._baseline.rate
        least, most = 1 / (1 + reference + bound) - 1, 1 / (1 + reference - bound) - 1
        return Rate((least + most) / 2, (most - least) / 2)

    def rate_of(self, line: TimeInfo) -> PageRate:
        """The rate of a page's line: mul and shift are exact, so the bound is the host's rate's."""
        if self._rates.is_scaled(line):
            return PageRate(
                None, None, f"its line is for a TSC of {line.shown_khz} kHz, and the host's may be scaled for it"
            )
        host = self.host_rate
        if host is None:
            return PageRate(None, None, "the reference was not sampled twice yet")
        speed = ns_per_tick(line) * self._rates.host_hz / NS_PER_S
        ppb = float((speed * (1 + Fraction(host.value)) - 1) * PPB)
        return PageRate(ppb, float(speed * Fraction(host.bound)) * PPB)

    # Inside

    def _begin_with(self, sample: Sample | None) -> None:
        self._baseline, self._first, self._outliers = Baseline(STEEPEST), sample, 0
        if sample is not None:
            self._baseline.admit(self._point(sample, sample))

    def _point(self, sample: Sample, first: Sample) -> Point:
        """The sample against nominal time since the first one."""
        nominal_ns = Fraction(signed64(sample.tsc - first.tsc) * NS_PER_S, self._rates.host_hz)
        ahead_ns = float(sample.ns - first.ns - nominal_ns)
        bound_ns = max(sample.bound_ns, LEAST_BOUND_NS)
        return Point(float(nominal_ns), ahead_ns - bound_ns, ahead_ns + bound_ns)
