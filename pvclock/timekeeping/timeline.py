"""A VM's time: a piecewise-affine map from host ticks to guest nanoseconds, kept exactly.

Each segment begins where the one before ended and has a rational rate, so nothing is rounded here; rounding happens in
the page, where the guest's own integer arithmetic does it.  No clock is read and nothing is published.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Final, NamedTuple

from pvclock._scale import ClockScale
from pvclock.errors import RangeError
from pvclock.quantities import NS_PER_S, U64_MASK, GuestNs, HostTsc, shown, signed64
from pvclock.readings import ClockLine
from pvclock.timekeeping.catchup import MOST_PPM, PPM, CatchUpTable, Slew

__all__ = ["STRETCH_S", "RateTerms", "Timeline"]

DENOMINATOR_BITS: Final = 1024
"""Rates without a common term would make the denominator grow for ever; beyond this, 2^-1024 ns is lost at a turn."""

STRETCH_S: Final = 2
"""The last stretch of a slew takes this long, in host time: whoever replans at least as often does not overshoot."""

SLOWEST: Final = Fraction(1, 2)
"""A clock that is ahead loses at most this part of its rate, whatever its policy would allow."""

RATE_BOUNDS: Final = (1 - SLOWEST - Fraction(1, 10), 1 + Fraction(MOST_PPM, PPM) + Fraction(1, 10))
"""A rate is this part of the dilation: a slew at its bound, and a frequency adjustment of up to 10 % either way."""

PAGE_RATES: Final = (Fraction(1, 2**63), Fraction(2**31))
"""The ns in a tick that a page can show: rate()'s least, and below that for which Linux has no shift."""


class RateTerms(NamedTuple):
    """How fast guest time passes.

    dilation: guest seconds in a host second.  slew: by which part of that a slew makes the clock faster now, or slower
    if negative.  frequency_adjustment: by which part the host's nominal rate is wrong, as a discipline found.
    """

    dilation: Fraction = Fraction(1)
    slew: Fraction = Fraction(0)
    frequency_adjustment: Fraction = Fraction(0)

    @property
    def rate(self) -> Fraction:
        """Guest seconds in a nominal host second."""
        return self.dilation * (1 + self.frequency_adjustment + self.slew)


class Timeline:
    """Guest time as a function of host TSC: from `tsc` on, at the host's nominal rate."""

    def __init__(self, tsc: HostTsc, tsc_hz: int, ns: Fraction = Fraction(0), terms: RateTerms | None = None) -> None:
        self.tsc_hz = tsc_hz
        self._tsc = tsc
        self._ns = ns
        self._host_ns = Fraction(0)  # at _tsc
        self._stopped_host_ns: Fraction | None = None
        self._terms = RateTerms() if terms is None else terms
        self._slew: Slew | CatchUpTable | None = None
        self._skew_ns = Fraction(0)  # to be slewed in from _tsc on
        self._stretch_end: HostTsc | None = None

    # What time it is

    @property
    def terms(self) -> RateTerms:
        """How fast guest time passes while the clock runs."""
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
    def slew_policy(self) -> Slew | CatchUpTable | None:
        """How the present skew is worked off; None if there is none."""
        return self._slew

    @property
    def is_slewing(self) -> bool:
        """Is there a skew that is being worked off?"""
        return self._slew is not None

    @property
    def is_slewed(self) -> bool:
        """Was the skew worked off when this segment began?"""
        return self._is_done(self._skew_ns)

    def at(self, tsc: HostTsc) -> Fraction:
        """Guest time in ns at host TSC `tsc`, exactly; before the segment's beginning it stands still."""
        return self._ns + self._run_ns(tsc) * self.rate

    def host_at(self, tsc: HostTsc) -> Fraction:
        """Host time in ns since this timeline began, corrected as its rate was at the time; it never stops."""
        return self._host_ns + self.host_ns_between(self._tsc, tsc) * (1 + self._terms.frequency_adjustment)

    def missed_at(self, tsc: HostTsc) -> Fraction:
        """Host time in ns since stop(); negative if the TSC went back, 0 while the clock runs."""
        return Fraction(0) if self._stopped_host_ns is None else self.host_at(tsc) - self._stopped_host_ns

    def skew_at(self, tsc: HostTsc) -> Fraction:
        """What is still to be slewed in at host TSC `tsc`, in ns of guest time; negative for a clock that is ahead."""
        return self._skew_ns - self._run_ns(tsc) * self._terms.dilation * self._terms.slew

    def host_ns_between(self, begin: HostTsc, end: HostTsc) -> Fraction:
        """Nominal host time from one TSC to another in ns; negative if the TSC went back."""
        return Fraction(signed64(end - begin) * NS_PER_S, self.tsc_hz)

    def tsc_at(self, ns: Fraction) -> HostTsc:
        """The first host TSC at which guest time is `ns` or more, if the present segment goes on.

        RangeError if that is 2^63 ticks or more after the segment began: no counter can tell it from the past.
        """
        ticks = -((self._ns - ns) * self.tsc_hz / (NS_PER_S * self.rate)).__floor__()
        if ticks > U64_MASK // 2:
            raise RangeError(f"guest time {round(ns)} ns is {ticks} ticks away; up to 2^63 - 1 can be waited for")
        return HostTsc((self._tsc + max(ticks, 0)) & U64_MASK)

    @property
    def begin_tsc(self) -> HostTsc:
        """Where the present segment begins."""
        return self._tsc

    # What changes it

    def copy(self) -> Timeline:
        """Another one in the same state."""
        copied = Timeline.__new__(Timeline)  # as Baseline.copy()
        vars(copied).update(vars(self))
        return copied

    def rebase(self, before: HostTsc, after: HostTsc) -> None:
        """The host's TSC stepped: what would have been `before` is `after`.  Guest and host time go on from there."""
        self.begin_segment(before, self._terms)
        if self._stretch_end is not None:
            self._stretch_end = HostTsc((self._stretch_end + after - before) & U64_MASK)
        self._tsc = after

    def begin_segment(self, tsc: HostTsc, terms: RateTerms) -> None:
        """Begin a segment at `tsc`, where the old one ends, at another rate."""
        self._ns, self._skew_ns = _bounded(self.at(tsc)), _bounded(self.skew_at(tsc))
        self._host_ns = _bounded(self.host_at(tsc))
        if terms.dilation != self._terms.dilation:
            self._stretch_end = None  # it was reckoned for the other rate
        self._tsc, self._terms = tsc, terms

    def stop(self, tsc: HostTsc) -> None:
        """Let time stand still from `tsc` on."""
        self.begin_segment(tsc, self._terms)
        self._stopped_host_ns = self._host_ns

    def start(self, tsc: HostTsc) -> None:
        """Let time go on from where it stands, from `tsc` on."""
        self.begin_segment(tsc, self._terms)
        self._stopped_host_ns = self._stretch_end = None

    def jump(self, ns: Fraction) -> None:
        """Put the clock forward by `ns`, now and for ever."""
        self._ns += ns

    def resume_from(self, line: ClockLine, terms: RateTerms) -> None:
        """Begin a segment at the anchor of `line`, to which C code has carried this timeline."""
        self._host_ns = _bounded(self.host_at(line.tsc))
        self._ns, self._tsc, self._terms = line.ns + Fraction(line.rem, line.den), line.tsc, terms

    # Slewing

    def slew(self, tsc: HostTsc, ns: Fraction, policy: Slew | CatchUpTable) -> None:
        """Owe the guest `ns` more (less, if negative) than it has, from `tsc` on, worked off as `policy` says."""
        self.begin_segment(tsc, self._terms)
        self._skew_ns += ns
        self._slew, self._stretch_end = policy, None

    def plan(self, tsc: HostTsc) -> Fraction:
        """The slew that is due from `tsc` on; 0 once nothing is left to slew.

        As fast as the policy allows, but the last STRETCH_S evenly: then a guest's clock does not overshoot if this is
        asked at least as often, and what it overshoots by else is worked off in the other direction.
        """
        skew = self.skew_at(tsc)
        if self._slew is None or self._is_done(skew):
            return Fraction(0)
        if self._stretch_end is not None and self.host_ns_between(tsc, self._stretch_end) > 0:
            return self._terms.slew
        most = Fraction(self._slew.ppm(skew), PPM)
        if skew < 0:
            most = min(most, SLOWEST)
        needed_s = abs(skew) / (self._terms.dilation * most * NS_PER_S)
        slew = most
        if needed_s <= STRETCH_S:
            self._stretch_end = HostTsc((tsc + STRETCH_S * self.tsc_hz) & U64_MASK)
            slew = most * needed_s / STRETCH_S
        parts = (slew * self._slew_parts).__floor__()  # short fractions stay short over many turns
        return Fraction(parts if skew > 0 else -parts, self._slew_parts)

    def end_slew(self) -> Fraction:
        """Owe nothing any more, once the slew is 0; returns what is left undone, in ns."""
        left, self._skew_ns, self._slew, self._stretch_end = self._skew_ns, Fraction(0), None, None
        return left

    @property
    def _slew_parts(self) -> int:
        """A slew is so many parts of this: the least one works 1 ns or less of guest time off in a host second."""
        return NS_PER_S * max(self._terms.dilation.__ceil__(), 1)

    def _is_done(self, skew_ns: Fraction) -> bool:
        """Is it within what the policy tolerates, or less than the least slew works off in a last stretch?"""
        least_ns = self._terms.dilation * STRETCH_S * NS_PER_S / self._slew_parts
        return self._slew is None or self._slew.is_done(skew_ns) or abs(skew_ns) < least_ns

    # For the page

    def line(self) -> ClockLine:
        """The present segment for C: its remainder is rounded down to the finest 64-bit denominator there is."""
        num, den = self.ns_per_tick(self.rate)
        ns = self._ns.__floor__()
        rem = ((self._ns - ns) * den).__floor__()
        return ClockLine(self._tsc, GuestNs(ns & U64_MASK), rem, num, den)

    def ns_per_tick(self, rate: Fraction) -> tuple[int, int]:
        """(num, den) of the ns in a tick at `rate`, with terms that fill 64 bits; RangeError for what no page can show.

        Terms that need more bits are cut: the rate is then slower by 2^-63 ns a tick at most, or by 2^-63 of itself.
        """
        rate = rate * NS_PER_S / self.tsc_hz
        num, den = rate.as_integer_ratio()
        spare_bits = 64 - max(num.bit_length(), den.bit_length())
        if spare_bits >= 0 < num:
            return num << spare_bits, den << spare_bits
        den_bits = 63 - max(rate.__floor__().bit_length() - 1, 0)
        num = (rate * 2**den_bits).__floor__() if den_bits >= 0 else 0
        if num <= 0:
            raise RangeError(f"rate {shown(rate)}: no page can show {shown(rate)} ns a tick")
        return num, 1 << den_bits

    def check(self, dilation: Fraction) -> None:
        """RangeError unless pages can show that dilation, and all that slews and corrections make of it."""
        try:
            for part in RATE_BOUNDS:
                self.scale(dilation * part)
        except RangeError:
            least, most = (shown(rate / part) for rate, part in zip(PAGE_RATES, RATE_BOUNDS, strict=True))
            rate = dilation * NS_PER_S / self.tsc_hz
            raise RangeError(
                f"dilation {shown(dilation)} on a TSC of {self.tsc_hz} Hz is {shown(rate)} ns a tick; "
                f"a page can show {least} to {most}, and what slews make of it"
            ) from None

    def scale(self, rate: Fraction) -> ClockScale:
        """What the page shows: Linux's pair at the nominal rate, and never faster than the timeline.

        A page may not step back, so a fast one could not be put right.
        """
        return ClockScale.from_rate(*self.ns_per_tick(rate))

    def _run_ns(self, tsc: HostTsc) -> Fraction:
        """Nominal host time in ns since the segment began, while it runs."""
        return max(self.host_ns_between(self._tsc, tsc), Fraction(0)) if self.is_running else Fraction(0)


def _bounded(ns: Fraction) -> Fraction:
    if ns.denominator.bit_length() <= DENOMINATOR_BITS:
        return ns
    return Fraction((ns * 2**DENOMINATOR_BITS).__floor__(), 2**DENOMINATOR_BITS)
