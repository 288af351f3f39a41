"""The discipline: the frequency adjustment that makes a clock follow a reference, without ever stepping it.

It trusts a reference while the samples lie on a line, and leaves out a sample that does not.  Several outliers in a row
that fit one line mean that the reference changed its rate or was set: the clock then follows that line, at up to
`max_ppm`.  While the samples fit no line the clock keeps its rate.  Pure: the caller hands samples in.
"""

from __future__ import annotations

from enum import StrEnum
from fractions import Fraction
from math import inf, nan
from typing import Final, NamedTuple

from pvclock.arguments import number, whole
from pvclock.errors import RangeError
from pvclock.quantities import NS_PER_S, U64_MASK, HostTsc, shown, signed64
from pvclock.readings import Sample
from pvclock.timekeeping.sampling import LEAST_BOUND_NS, Baseline, Point, Rate

__all__ = ["MAX_PPM", "Discipline", "Steering", "SteeringState"]

MAX_PPM: Final = 500
"""Linux's own bound on NTP's frequency adjustment (MAXFREQ)."""

MAX_PPM_LIMIT: Final = 100_000
"""10 %: a nominal rate further off than this is a configuration mistake."""

PPM: Final = 10**6
GRAIN: Final = 2**50
"""Adjustments are multiples of 2^-50, about 10^-6 ppb."""

HORIZON_S: Final = 2
"""Time in which to work an error off, or twice the sampling interval if longer; so a slew does not overshoot."""

RATE_SAMPLES: Final = 3
STEP_SAMPLES: Final = 4
"""Outliers in a row that must fit one line before the clock follows it: after a change of rate, and after a set."""


class SteeringState(StrEnum):
    """How well a clock follows its reference."""

    LEARNING = "learning"
    """One sample: there is no rate yet."""
    LOCKED = "locked"
    """The error is within the samples' bound."""
    SLEWING = "slewing"
    """Working an error off, at max_ppm or slower."""
    HOLDOVER = "holdover"
    """The samples fit no line, or there are none; the clock keeps its rate."""
    PANIC = "panic"
    """The error exceeds the panic threshold; the clock keeps its rate until the error is within it again."""


class Steering(NamedTuple):
    """A discipline's result for one sample, or for an instant without one.

    frequency_adjustment: fraction by which to run faster than the host's nominal rate.  rate: the reference's rate
    relative to nominal, right within its bound if it is constant.  error_ns: how far the clock lagged the reference at
    the sample, in host time.  bound_ns: error of error_ns, on the same condition.  Without a sample both are
    extrapolated, so the bound grows; before the first sample they are nan and inf.
    """

    state: SteeringState
    frequency_adjustment: Fraction
    rate: Rate
    error_ns: float
    bound_ns: float


class Discipline:
    """Makes host time follow a reference, taking the two as equal at the first sample.

    tsc_hz: the nominal rate.  max_ppm: bound of the adjustment; a reference further off is never trusted.  rate: a
    first estimate, such as another discipline's `holdover`.  panic_ns: a larger error is not worked off, like ntpd's
    panic threshold; None: no limit.
    """

    def __init__(
        self, tsc_hz: int, max_ppm: float = MAX_PPM, rate: Fraction = Fraction(0), panic_ns: int | None = None
    ) -> None:
        if not 0 < number("max_ppm", max_ppm) <= MAX_PPM_LIMIT:
            raise RangeError(f"max_ppm is {shown(max_ppm)}; above 0 and up to {MAX_PPM_LIMIT}")
        self.panic_ns = None if panic_ns is None else whole("panic_ns", panic_ns, 1, U64_MASK)
        self.max_ppm = max_ppm
        self._tsc_hz = tsc_hz
        self._most = max_ppm / PPM
        self._rate = Rate(self._clipped(float(rate)), self._most)  # in use, with its bound when found
        self._baseline = self._no_points()
        self._suspects = self._no_points()  # the latest points, off the baseline
        self._is_lost = False  # the latest suspects fit no line either
        self._is_slewing = False
        self._begin: tuple[int, Fraction] | None = None  # reference and host time in ns, taken as equal
        self._origin_bias_ns = 0.0  # error of the reference at _begin
        self._tsc = HostTsc(0)  # of the last sample
        self._ticks = 0  # from _begin to the last sample
        self._newest_ns = -1.0  # nominal time of the newest point

    def copy(self) -> Discipline:
        """A copy in the same state."""
        copied = Discipline.__new__(Discipline)  # copy.copy() takes three times as long
        vars(copied).update(vars(self))
        vars(copied).update(_baseline=self._baseline.copy(), _suspects=self._suspects.copy())
        return copied

    @property
    def holdover(self) -> Fraction:
        """The adjustment that keeps the known rate and works no error off, for a time without samples."""
        return Fraction(int(self._rate.value * GRAIN), GRAIN)

    def steer(self, sample: Sample, host_ns: Fraction) -> Steering:
        """Learn from `sample`, taken when host time was host_ns, and return the adjustment from there on.

        host_ns: from any origin; the caller must have applied all earlier adjustments to it.
        """
        interval_ns = self._advance(sample, host_ns)
        point, ahead_ns = self._against_nominal(sample, host_ns)
        if point.nominal_ns > self._newest_ns:
            self._newest_ns = point.nominal_ns
            self._take(point, ahead_ns)
        deviation_ns, bound_ns = self._baseline.deviation_at(point.nominal_ns, self._rate.value)
        error_ns = deviation_ns - ahead_ns - self._origin_bias_ns
        state = self._judged(error_ns, (point.high_ns - point.low_ns) / 2)
        frequency_adjustment = self.holdover
        if self._is_slewing:
            pull = error_ns / max(2 * interval_ns, HORIZON_S * NS_PER_S)
            frequency_adjustment = Fraction(int(self._clipped(self._rate.value + pull) * GRAIN), GRAIN)
        return Steering(state, frequency_adjustment, self._rate_found(), error_ns, bound_ns)

    def coast(self, tsc: HostTsc, host_ns: Fraction) -> Steering:
        """The steering at `tsc`, host time host_ns, without a sample: keep the rate."""
        error_ns, bound_ns = nan, inf
        if self._begin is not None:
            nominal_ns, ahead_ns = self._since_beginning(self._ticks + signed64(tsc - self._tsc), host_ns)
            deviation_ns, bound_ns = self._baseline.deviation_at(float(nominal_ns), self._rate.value)
            error_ns = deviation_ns - ahead_ns - self._origin_bias_ns
        return Steering(SteeringState.HOLDOVER, self.holdover, self._rate_found(), error_ns, bound_ns)

    def renumber(self, before: HostTsc, after: HostTsc) -> None:
        """The host TSC stepped from `before` to `after`; keep what was learned."""
        self._tsc = HostTsc((self._tsc + after - before) & U64_MASK)

    # Inside

    def _advance(self, sample: Sample, host_ns: Fraction) -> float:
        """Move to the sample's instant and return the ns since the last one.  Start anew if the TSC went back."""
        ticks = signed64(sample.tsc - self._tsc)
        if self._begin is None or ticks < 0:
            self._baseline, self._suspects, self._is_lost = self._no_points(), self._no_points(), False
            self._begin, self._ticks, ticks = (sample.ns, host_ns), 0, 0
            self._newest_ns, self._origin_bias_ns = -1.0, 0.0
        self._tsc = sample.tsc
        self._ticks += ticks
        return ticks * NS_PER_S / self._tsc_hz

    def _against_nominal(self, sample: Sample, host_ns: Fraction) -> tuple[Point, float]:
        """The sample as a point against nominal time, and the ns by which the clock is ahead of nominal."""
        assert self._begin is not None  # noqa: S101  # set by _advance()
        nominal_ns, ahead_ns = self._since_beginning(self._ticks, host_ns)
        deviation_ns = float(sample.ns - self._begin[0] - nominal_ns)
        bound_ns = max(sample.bound_ns, LEAST_BOUND_NS)
        point = Point(float(nominal_ns), deviation_ns - bound_ns, deviation_ns + bound_ns)
        return point, ahead_ns

    def _since_beginning(self, ticks: int, host_ns: Fraction) -> tuple[Fraction, float]:
        """Nominal ns in `ticks` from the beginning, and the ns by which the clock is ahead of that."""
        assert self._begin is not None  # noqa: S101  # checked by the callers
        nominal_ns = Fraction(ticks * NS_PER_S, self._tsc_hz)
        return nominal_ns, float(host_ns - self._begin[1] - nominal_ns)

    def _take(self, point: Point, ahead_ns: float) -> None:
        """Learn from a point, where the clock is ahead of nominal time by ahead_ns.

        Replace the rate only if it has become impossible, or if the new one is better known and not near it: an
        uncertain estimate does not justify a change.
        """
        if self._baseline.admit(point):
            self._suspects, self._is_lost = self._no_points(), False
        else:
            if not self._suspects.admit(point):
                self._suspects, self._is_lost = self._no_points(), True
                self._suspects.admit(point)
            if len(self._suspects.points) >= (RATE_SAMPLES if self._rate_may_have_changed() else STEP_SAMPLES):
                if len(self._baseline.points) == 1:  # the first sample was the wrong one
                    self._origin_bias_ns = (point.low_ns + point.high_ns) / 2 - ahead_ns
                self._suspects.extend_back(self._baseline.points)
                self._baseline, self._suspects, self._is_lost = self._suspects, self._no_points(), False
        found = self._baseline.rate
        off = abs(found.value - self._rate.value)
        is_better = found.bound < self._rate.bound and off > found.bound / 4
        if len(self._baseline.points) > 1 and (is_better or off > found.bound):
            self._rate = found

    def _clipped(self, rate: float) -> float:
        return min(max(rate, -self._most), self._most)

    def _rate_may_have_changed(self) -> bool:
        """Can a change of rate explain the first suspect, without the reference having been set?"""
        line = self._no_points()
        line.admit(self._baseline.points[-1])
        return line.admit(self._suspects.points[0])

    def _no_points(self) -> Baseline:
        return Baseline(self._most)

    def _judged(self, error_ns: float, bound_ns: float) -> SteeringState:
        """The state at that error, and decide whether to slew, with hysteresis: start at bound / 4, stop at / 16."""
        was_slewing, self._is_slewing = self._is_slewing, False
        if self._is_lost:
            return SteeringState.HOLDOVER
        if self.panic_ns is not None and abs(error_ns) > self.panic_ns:
            return SteeringState.PANIC
        if len(self._baseline.points) < 2:
            return SteeringState.LEARNING
        tolerated_ns = bound_ns / 16 if was_slewing else bound_ns / 4
        self._is_slewing = abs(error_ns) > tolerated_ns
        return SteeringState.SLEWING if abs(error_ns) > bound_ns else SteeringState.LOCKED

    def _rate_found(self) -> Rate:
        """The rate in use, and how far the true one can be from it."""
        middle = self._baseline.rate
        return Rate(self._rate.value, middle.bound + abs(middle.value - self._rate.value))
