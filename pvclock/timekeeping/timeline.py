"""A VM's time: a piecewise-affine map from host ticks to guest nanoseconds, kept exactly.

Each segment begins where the one before ended and has a rational rate, so nothing is rounded here; rounding happens in
the page, by the guest's own integer arithmetic.  This module reads no clock and publishes nothing.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Final, NamedTuple

from pvclock._scale import ClockScale
from pvclock.errors import RangeError
from pvclock.quantities import NS_PER_S, U64_MASK, GuestNs, HostTsc, shown, signed64
from pvclock.readings import ClockLine
from pvclock.timekeeping.catchup import MOST_PPM, PPM, SlewPolicy

__all__ = ["STRETCH_S", "RateTerms", "Timeline"]

DENOMINATOR_BITS: Final = 1024
"""Caps the denominator; costs under 2^-1024 ns per rate change."""

STRETCH_S: Final = 2
"""Length of a slew's last stretch, in host seconds; a caller that replans at least this often does not overshoot."""

SLOWEST: Final = Fraction(1, 2)
"""Most that a slew slows a clock that is ahead, as a fraction of its rate, whatever the policy allows."""

RATE_BOUNDS: Final = (1 - SLOWEST - Fraction(1, 10), 1 + Fraction(MOST_PPM, PPM) + Fraction(1, 10))
"""Bounds of rate / dilation: a slew at its bound, and a frequency adjustment of up to 10 % either way."""

PAGE_RATES: Final = (Fraction(1, 2**63), Fraction(2**31))
"""Range of ns in a tick that a page can show, upper end excluded: from 2^31 on Linux has no shift."""


class RateTerms(NamedTuple):
    """The terms of a segment's rate.

    dilation: guest seconds in a host second.  slew: fraction by which a slew speeds the clock up now, negative to slow
    it down.  frequency_adjustment: relative correction of the host's nominal rate, found by a discipline.
    """

    dilation: Fraction = Fraction(1)
    slew: Fraction = Fraction(0)
    frequency_adjustment: Fraction = Fraction(0)

    @property
    def rate(self) -> Fraction:
        """Guest seconds in a nominal host second."""
        if not self.frequency_adjustment and not self.slew:  # the usual case: fractions are slow
            return self.dilation
        return self.dilation * (1 + self.frequency_adjustment + self.slew)


class Timeline:
    """Guest time as a function of host TSC: `ns` at `tsc`, then at the rate of `terms` (default: nominal)."""

    def __init__(self, tsc: HostTsc, tsc_hz: int, ns: Fraction = Fraction(0), terms: RateTerms | None = None) -> None:
        self.tsc_hz = tsc_hz
        self._tsc = tsc
        self._ns = ns
        self._host_ns = Fraction(0)  # at _tsc
        self._stopped_host_ns: Fraction | None = None
        self._terms = RateTerms() if terms is None else terms
        self._slew: SlewPolicy | None = None
        self._skew_ns = Fraction(0)  # still to slew in, at _tsc
        self._stretch_end: HostTsc | None = None
        self._planned_at = tsc  # when the stretch was last looked at
        self._line_rate: tuple[int, int] | None = None  # ns_per_tick() of these terms, once a line has asked

    # What time it is

    @property
    def terms(self) -> RateTerms:
        """The rate's terms, in effect while the clock runs."""
        return self._terms

    @property
    def rate(self) -> Fraction:
        """Guest seconds in a nominal host second, in effect while the clock runs."""
        return self._terms.rate

    @property
    def is_running(self) -> bool:
        """False between stop() and start()."""
        return self._stopped_host_ns is None

    @property
    def slew_policy(self) -> SlewPolicy | None:
        """The policy that works the skew off; None without a skew."""
        return self._slew

    @property
    def is_slewing(self) -> bool:
        """Is a skew being worked off?"""
        return self._slew is not None

    @property
    def skew_is_worked_off(self) -> bool:
        """Was the skew worked off when this segment began?"""
        return self._is_done(self._skew_ns)

    def at(self, tsc: HostTsc) -> Fraction:
        """Guest time in ns at host TSC `tsc`, exactly, from the current segment's start on.

        Before that it returns the time at the start; History.at() looks up earlier segments.
        """
        ticks = signed64(tsc - self._tsc) if self.is_running else 0
        if ticks <= 0:
            return self._ns
        num, den = self.rate.as_integer_ratio()  # one fraction, not four: every event asks
        return self._ns + Fraction(ticks * NS_PER_S * num, self.tsc_hz * den)

    def host_at(self, tsc: HostTsc) -> Fraction:
        """Host time in ns since this timeline began, each part with its frequency adjustment; it runs while stopped."""
        passed_ns = self.host_ns_between(self._tsc, tsc)
        if not self._terms.frequency_adjustment:  # the usual case: fractions are slow
            return self._host_ns + passed_ns
        return self._host_ns + passed_ns * (1 + self._terms.frequency_adjustment)

    def missed_at(self, tsc: HostTsc) -> Fraction:
        """Host time in ns since stop(): negative if the TSC went back, 0 while the clock runs."""
        return Fraction(0) if self._stopped_host_ns is None else self.host_at(tsc) - self._stopped_host_ns

    def skew_at(self, tsc: HostTsc) -> Fraction:
        """Guest ns still to slew in at host TSC `tsc`; negative for a clock that is ahead."""
        if not self._terms.slew:  # the usual case: fractions are slow
            return self._skew_ns
        return self._skew_ns - self._run_ns(tsc) * self._terms.dilation * self._terms.slew

    def host_ns_between(self, begin: HostTsc, end: HostTsc) -> Fraction:
        """Nominal host time in ns between two TSC values; negative if `end` is behind."""
        return Fraction(signed64(end - begin) * NS_PER_S, self.tsc_hz)

    def tsc_at(self, ns: Fraction) -> HostTsc:
        """The first host TSC at which guest time is `ns` or more, extrapolating the current segment.

        RangeError from 2^63 ticks after the segment's start on: a 64-bit counter cannot tell that from the past.
        """
        ticks = -((self._ns - ns) * self.tsc_hz / (NS_PER_S * self.rate)).__floor__()
        if ticks > U64_MASK // 2:
            raise RangeError(f"guest time {round(ns)} ns is {ticks} ticks away; up to 2^63 - 1 can be waited for")
        return HostTsc((self._tsc + max(ticks, 0)) & U64_MASK)

    @property
    def begin_tsc(self) -> HostTsc:
        """Host TSC at which the current segment begins."""
        return self._tsc

    # What changes it

    def copy(self) -> Timeline:
        """A copy in the same state."""
        copied = Timeline.__new__(Timeline)  # copy.copy() takes three times as long
        vars(copied).update(vars(self))
        return copied

    def rebase(self, before: HostTsc, after: HostTsc) -> None:
        """The host TSC stepped from `before` to `after`: begin a segment there; guest and host time are continuous."""
        self.begin_segment(before, self._terms)
        if self._stretch_end is not None:
            self._stretch_end = HostTsc((self._stretch_end + after - before) & U64_MASK)
            self._planned_at = HostTsc((self._planned_at + after - before) & U64_MASK)
        self._tsc = after

    def begin_segment(self, tsc: HostTsc, terms: RateTerms) -> None:
        """End the current segment at `tsc` and begin one with the rate of `terms` there."""
        self._ns, self._skew_ns = _bounded(self.at(tsc)), _bounded(self.skew_at(tsc))
        self._host_ns = _bounded(self.host_at(tsc))
        if terms.dilation != self._terms.dilation:
            self._stretch_end = None  # computed for the old rate
        if terms != self._terms:
            self._line_rate = None
        self._tsc, self._terms = tsc, terms

    def stop(self, tsc: HostTsc) -> None:
        """Stop guest time at `tsc`."""
        self.begin_segment(tsc, self._terms)
        self._stopped_host_ns = self._host_ns

    def start(self, tsc: HostTsc) -> None:
        """Let guest time go on at `tsc` from where it stopped."""
        self.begin_segment(tsc, self._terms)
        self._stopped_host_ns = self._stretch_end = None

    def jump(self, ns: Fraction) -> None:
        """Step guest time by `ns` at the segment's start."""
        self._ns += ns

    def resume_from(self, line: ClockLine, terms: RateTerms) -> None:
        """Begin a segment at the anchor of `line`, which C code computed from this timeline."""
        self._host_ns = _bounded(self.host_at(line.tsc))
        self._ns, self._tsc, self._terms = line.ns + Fraction(line.rem, line.den), line.tsc, terms
        self._line_rate = None

    # Slewing

    def slew(self, tsc: HostTsc, ns: Fraction, policy: SlewPolicy) -> None:
        """Add `ns` of guest time to the skew at `tsc` (negative: the clock is ahead), and slew it in by `policy`."""
        self.begin_segment(tsc, self._terms)
        self._skew_ns += ns
        self._slew, self._stretch_end = policy, None

    def plan(self, tsc: HostTsc) -> Fraction:
        """The slew to apply from `tsc` on, as RateTerms has it; 0 once the skew is worked off.

        As fast as the policy allows, but the last stretch takes STRETCH_S at an even rate.  So the clock does not
        overshoot if the caller replans as that ends; a later call slews an overshoot back.
        """
        skew = self.skew_at(tsc)
        if self._slew is None or self._is_done(skew):
            return Fraction(0)
        if self._stretch_end is not None and self._stretch_goes_on(tsc, self._stretch_end):
            self._planned_at = tsc
            return self._terms.slew
        most = Fraction(self._slew.ppm(skew), PPM)
        if skew < 0:
            most = min(most, SLOWEST)
        needed_s = abs(skew) / (self._terms.dilation * most * NS_PER_S)
        slew = most
        if needed_s <= STRETCH_S:
            self._stretch_end, self._planned_at = HostTsc((tsc + STRETCH_S * self.tsc_hz) & U64_MASK), tsc
            slew = most * needed_s / STRETCH_S
        parts = (slew * self._slew_parts).__floor__()  # keeps denominators short over many rate changes
        return Fraction(parts if skew > 0 else -parts, self._slew_parts)

    def end_slew(self) -> Fraction:
        """End the slew, once its rate is 0, and return the skew that is left, in ns."""
        left, self._skew_ns, self._slew, self._stretch_end = self._skew_ns, Fraction(0), None, None
        return left

    def _stretch_goes_on(self, tsc: HostTsc, end: HostTsc) -> bool:
        """Is the last stretch's end nearer to the next plan than to this one, if plans come at equal intervals?

        Else a tick that comes some us before the end would leave the stretch's rate on until the next tick.
        """
        since_ns = max(self.host_ns_between(self._planned_at, tsc), Fraction(0))
        return self.host_ns_between(tsc, end) > since_ns / 2

    @property
    def _slew_parts(self) -> int:
        """The denominator of slews: the least slew, 1 / this, works off 1 ns of guest time or less in a host second."""
        return NS_PER_S * max(self._terms.dilation.__ceil__(), 1)

    def _is_done(self, skew_ns: Fraction) -> bool:
        """Does the policy tolerate this skew, or is it less than the least slew works off in STRETCH_S?"""
        least_ns = self._terms.dilation * STRETCH_S * NS_PER_S / self._slew_parts
        return self._slew is None or self._slew.is_done(skew_ns) or abs(skew_ns) < least_ns

    # For the page

    def line(self) -> ClockLine:
        """The current segment for C code; the remainder is rounded down to the line's 64-bit denominator."""
        if self._line_rate is None:
            self._line_rate = self.ns_per_tick(self.rate)
        num, den = self._line_rate
        ns, rest = divmod(self._ns.numerator, self._ns.denominator)
        rem = rest * den // self._ns.denominator
        return ClockLine(self._tsc, GuestNs(ns & U64_MASK), rem, num, den)

    def ns_per_tick(self, rate: Fraction) -> tuple[int, int]:
        """(num, den) of the ns in a tick at `rate`, scaled to fill 64 bits; RangeError if no page can show it.

        Terms of more than 64 bits are cut: the result is then slower by at most 2^-63 ns a tick, or 2^-63 of itself.
        """
        rate = rate * NS_PER_S / self.tsc_hz
        num, den = rate.as_integer_ratio()
        spare_bits = 64 - max(num.bit_length(), den.bit_length())
        if spare_bits >= 0 < num:
            return num << spare_bits, den << spare_bits
        den_bits = 63 - max(rate.__floor__().bit_length() - 1, 0)
        num = (rate * 2**den_bits).__floor__() if den_bits >= 0 else 0
        if num <= 0:
            raise RangeError(f"no page can show {shown(rate)} ns a tick")
        return num, 1 << den_bits

    def check(self, dilation: Fraction) -> None:
        """RangeError unless pages can show that dilation at any slew and frequency adjustment."""
        try:
            for part in RATE_BOUNDS:
                self.scale(dilation * part)
        except RangeError:
            least, most = (shown(rate / part) for rate, part in zip(PAGE_RATES, RATE_BOUNDS, strict=True))
            rate = dilation * NS_PER_S / self.tsc_hz
            raise RangeError(
                f"dilation {shown(dilation)} on a TSC of {self.tsc_hz} Hz is {shown(rate)} ns a tick; "
                f"a page can show {least} to {most}, with room for slews"
            ) from None

    def scale(self, rate: Fraction) -> ClockScale:
        """The page's (mul, shift): Linux's pair at the nominal rate, and never faster than the timeline.

        A page must not step back, so nothing could correct one that ran fast.
        """
        return ClockScale.from_rate(*self.ns_per_tick(rate))

    def _run_ns(self, tsc: HostTsc) -> Fraction:
        """Nominal host ns from the segment's start to `tsc`; 0 before it, and while stopped."""
        return max(self.host_ns_between(self._tsc, tsc), Fraction(0)) if self.is_running else Fraction(0)


def _bounded(ns: Fraction) -> Fraction:
    if ns.denominator.bit_length() <= DENOMINATOR_BITS:
        return ns
    return Fraction((ns * 2**DENOMINATOR_BITS).__floor__(), 2**DENOMINATOR_BITS)
