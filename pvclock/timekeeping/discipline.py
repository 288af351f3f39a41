"""What rate lets a clock follow a reference: found from samples, corrected only on evidence, and never by a step.

A reference is believed while its samples lie on a line.  A sample that does not is left out; some in a row that go
together mean that the reference has changed its rate or was set: the clock then follows the new line, as fast as
`max_ppm` lets it.  While samples make no sense the clock keeps the rate that it had.  Pure: samples are handed in.
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
"""What a kernel's NTP slews by at most (Linux MAXFREQ)."""

MAX_PPM_LIMIT: Final = 100_000
"""10 %: a host's nominal rate that is further off is a mistake."""

PPM: Final = 10**6
GRAIN: Final = 2**50
"""Corrections are whole 2^-50ths: 10^-6 ppb."""

HORIZON_S: Final = 2
"""An error is to be gone after so long, or two intervals between samples: whoever ticks that often never overshoots."""

RATE_SAMPLES: Final = 3
STEP_SAMPLES: Final = 4
"""So many samples in a row must go together to be believed, if the reference has changed its rate or has been set."""


class SteeringState(StrEnum):
    """How well a clock follows its reference."""

    LEARNING = "learning"
    """One sample: there is no rate yet."""
    LOCKED = "locked"
    """Within the samples' bound of it."""
    SLEWING = "slewing"
    """On its way there, at max_ppm or slower."""
    HOLDOVER = "holdover"
    """The reference makes no sense at present, or gives no samples; the clock keeps its rate."""
    PANIC = "panic"
    """It is further off than the panic threshold: the clock keeps its rate until it is near again."""


class Steering(NamedTuple):
    """What a discipline made of a sample, or of the want of one.

    frequency_adjustment: by which part the clock is to be faster than the host's nominal rate.  rate: the reference's,
    against nominal, true within its bound if it is constant.  error_ns: how far the clock was behind the reference at
    the sample, in host time, and bound_ns how far that can be from the truth, on the same condition.  Without a sample
    both are extrapolated from those before, so the bound grows; with none at all, nan and inf.
    """

    state: SteeringState
    frequency_adjustment: Fraction
    rate: Rate
    error_ns: float
    bound_ns: float


class Discipline:
    """Makes host time follow a reference from the first sample on, as far as it is right at that one.

    tsc_hz: the nominal rate.  max_ppm: the bound of the adjustment; a reference further off is never believed.
    rate: what is known of it, as another discipline's `holdover`.  panic_ns: an error beyond this is not worked off, as
    ntpd's panic threshold has it; None: any is.
    """

    def __init__(
        self, tsc_hz: int, max_ppm: float = MAX_PPM, rate: Fraction = Fraction(0), panic_ns: int | None = None
    ) -> None:
        if not 0 < number("max_ppm", max_ppm) <= MAX_PPM_LIMIT:
            raise RangeError(f"max_ppm is {shown(max_ppm)}; above 0 and up to {MAX_PPM_LIMIT}")
        if panic_ns is not None and not 1 <= whole("panic_ns", panic_ns) <= U64_MASK:
            raise RangeError(f"panic_ns is {shown(panic_ns)}; a threshold of 1 to 2^64-1 ns, or None")
        self.panic_ns = panic_ns
        self.max_ppm = max_ppm
        self._tsc_hz = tsc_hz
        self._most = max_ppm / PPM
        self._rate = Rate(self._clipped(float(rate)), self._most)  # that is held, as well known as when it was found
        self._baseline = self._no_points()
        self._suspects = self._no_points()  # the last points, which the baseline does not allow
        self._is_lost = False  # and which did not go together, either
        self._is_slewing = False  # is an error being worked off?
        self._begin: tuple[int, Fraction] | None = None  # reference and host time, in ns, taken as the same
        self._origin_bias_ns = 0.0  # what the reference was wrong by at that instant
        self._tsc = HostTsc(0)  # of the last sample
        self._ticks = 0  # to it from the beginning
        self._newest_ns = -1.0  # of the points

    def copy(self) -> Discipline:
        """Another one in the same state."""
        copied = Discipline.__new__(Discipline)  # as Baseline.copy()
        vars(copied).update(vars(self))
        vars(copied).update(_baseline=self._baseline.copy(), _suspects=self._suspects.copy())
        return copied

    @property
    def holdover(self) -> Fraction:
        """The adjustment that keeps the rate as it is known, and works no error off: for a time without samples."""
        return Fraction(int(self._rate.value * GRAIN), GRAIN)

    def steer(self, sample: Sample, host_ns: Fraction) -> Steering:
        """The adjustment that is due when the reference is known at one more instant, where the clock is at host_ns.

        host_ns: from any origin, and corrected since as this has said.
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
        """What is due at an instant without a sample, where the clock is at host_ns: to keep the rate."""
        error_ns, bound_ns = nan, inf
        if self._begin is not None:
            nominal_ns, ahead_ns = self._since_beginning(self._ticks + signed64(tsc - self._tsc), host_ns)
            deviation_ns, bound_ns = self._baseline.deviation_at(float(nominal_ns), self._rate.value)
            error_ns = deviation_ns - ahead_ns - self._origin_bias_ns
        return Steering(SteeringState.HOLDOVER, self.holdover, self._rate_found(), error_ns, bound_ns)

    def renumber(self, before: HostTsc, after: HostTsc) -> None:
        """The host's TSC stepped: what would have been `before` is `after`; what was found goes on to hold."""
        self._tsc = HostTsc((self._tsc + after - before) & U64_MASK)

    # Inside

    def _advance(self, sample: Sample, host_ns: Fraction) -> float:
        """Go on to the sample's instant; returns the ns since the last one.  A TSC that went back is a beginning."""
        ticks = (sample.tsc - self._tsc) & U64_MASK
        if self._begin is None or ticks > U64_MASK // 2:
            self._baseline, self._suspects, self._is_lost = self._no_points(), self._no_points(), False
            self._begin, self._ticks, ticks = (sample.ns, host_ns), 0, 0
            self._newest_ns, self._origin_bias_ns = -1.0, 0.0
        self._tsc = sample.tsc
        self._ticks += ticks
        return ticks * NS_PER_S / self._tsc_hz

    def _against_nominal(self, sample: Sample, host_ns: Fraction) -> tuple[Point, float]:
        """The reference against nominal time from the beginning on, and by how much the clock is ahead of that."""
        assert self._begin is not None  # noqa: S101  # as _advance() leaves it
        nominal_ns, ahead_ns = self._since_beginning(self._ticks, host_ns)
        deviation_ns = float(sample.ns - self._begin[0] - nominal_ns)
        bound_ns = max(sample.bound_ns, LEAST_BOUND_NS)
        point = Point(float(nominal_ns), deviation_ns - bound_ns, deviation_ns + bound_ns)
        return point, ahead_ns

    def _since_beginning(self, ticks: int, host_ns: Fraction) -> tuple[Fraction, float]:
        """Nominal time from the beginning on, in ns, and by how much the clock is ahead of it there."""
        assert self._begin is not None  # noqa: S101  # the callers look
        nominal_ns = Fraction(ticks * NS_PER_S, self._tsc_hz)
        return nominal_ns, float(host_ns - self._begin[1] - nominal_ns)

    def _take(self, point: Point, ahead_ns: float) -> None:
        """Learn from a point, where the clock is ahead of nominal time by ahead_ns.

        The rate that is held is let go of if it is impossible, or if a better known one is not near: a guess is no
        reason to turn.
        """
        if self._baseline.admit(point):
            self._suspects, self._is_lost = self._no_points(), False
        else:
            if not self._suspects.admit(point):
                self._suspects, self._is_lost = self._no_points(), True
                self._suspects.admit(point)
            if len(self._suspects.points) >= (RATE_SAMPLES if self._has_turned() else STEP_SAMPLES):
                if len(self._baseline.points) == 1:  # then it was the first sample that was wrong
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

    def _has_turned(self) -> bool:
        """Can the reference have come to the first suspect by its rate alone, without having been set?"""
        way = self._no_points()
        way.admit(self._baseline.points[-1])
        return way.admit(self._suspects.points[0])

    def _no_points(self) -> Baseline:
        return Baseline(self._most)

    def _judged(self, error_ns: float, bound_ns: float) -> SteeringState:
        """The state with that error, and whether to work it off: that begins late and ends early, to be seldom."""
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
        """The rate that is held, and how far the true one can be from it."""
        middle = self._baseline.rate
        return Rate(self._rate.value, middle.bound + abs(middle.value - self._rate.value))
