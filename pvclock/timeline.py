"""A VM's time: a piecewise-affine map from host ticks to guest nanoseconds, kept exactly.

Each segment begins where the one before ended and has a rational rate, so nothing is rounded here; rounding happens in
the page, where the guest's own integer arithmetic does it.  No clock is read and nothing is published.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Final

from pvclock._core import ClockScale
from pvclock.catchup import PPM, CatchUpTable, Slew
from pvclock.errors import RangeError
from pvclock.quantities import NS_PER_S, U64_MASK, GuestNs, HostTsc
from pvclock.readings import ClockLine

__all__ = ["STRETCH_S", "Timeline"]

DENOMINATOR_BITS: Final = 1024
"""Rates without a common term would make the denominator grow for ever; beyond this, 2^-1024 ns is lost at a turn."""

STRETCH_S: Final = 2
"""The last stretch of a slew takes this long, in host time: whoever replans at least as often does not overshoot."""

SLOWEST: Final = Fraction(1, 2)
"""A clock that is ahead loses at most this part of its pace, whatever its policy would allow."""


class Timeline:
    """Guest time as a function of host TSC: from `tsc` on, at the host's nominal rate.

    `dilation` is how many guest seconds pass in a host second; `pace` is the same with what a slew adds or takes.
    """

    def __init__(self, tsc: HostTsc, tsc_hz: int, ns: Fraction = Fraction(0), dilation: Fraction = Fraction(1)) -> None:
        self.tsc_hz = tsc_hz
        self._tsc = tsc
        self._ns = ns
        self._dilation = dilation
        self._running = True
        self._slew: Slew | CatchUpTable | None = None
        self._skew_ns = Fraction(0)  # to be slewed in from _tsc on
        self._boost = Fraction(0)  # of the dilation
        self._correction = Fraction(0)  # of the dilation, too: what a discipline found
        self._stretch_end: HostTsc | None = None

    # What time it is

    @property
    def dilation(self) -> Fraction:
        """Guest seconds in a host second, without any slew."""
        return self._dilation

    @property
    def boost(self) -> Fraction:
        """By which part of the dilation a slew makes the clock faster now, or slower if negative."""
        return self._boost

    @property
    def correction(self) -> Fraction:
        """By which part of the dilation a discipline corrects the host's nominal rate."""
        return self._correction

    @property
    def pace(self) -> Fraction:
        """Guest seconds in a nominal host second, in effect while the clock runs."""
        return self._dilation * (1 + self._correction + self._boost)

    @property
    def is_running(self) -> bool:
        """False between stop() and start()."""
        return self._running

    @property
    def slew_policy(self) -> Slew | CatchUpTable | None:
        """How the present skew is worked off; None if there is none."""
        return self._slew

    @property
    def is_slewing(self) -> bool:
        """Is there a skew that is being worked off?"""
        return self._slew is not None

    def at(self, tsc: HostTsc) -> Fraction:
        """Guest time in ns at host TSC `tsc`, exactly; before the segment's beginning it stands still."""
        return self._ns + self._host_ns(tsc) * self.pace

    def skew_at(self, tsc: HostTsc) -> Fraction:
        """What is still to be slewed in at host TSC `tsc`, in ns of guest time; negative for a clock that is ahead."""
        return self._skew_ns - self._host_ns(tsc) * self._dilation * self._boost

    def host_ns_between(self, begin: HostTsc, end: HostTsc) -> Fraction:
        """Nominal host time from one TSC to another in ns; negative if the TSC went back."""
        ticks = (end - begin) & U64_MASK
        return Fraction((ticks if ticks <= U64_MASK // 2 else ticks - U64_MASK - 1) * NS_PER_S, self.tsc_hz)

    def tsc_at(self, ns: Fraction) -> HostTsc:
        """The first host TSC at which guest time is `ns` or more, if the present segment goes on."""
        ticks = -((self._ns - ns) * self.tsc_hz / (NS_PER_S * self.pace)).__floor__()
        return HostTsc((self._tsc + max(ticks, 0)) & U64_MASK)

    # What changes it

    def turn(self, tsc: HostTsc, dilation: Fraction, boost: Fraction = Fraction(0)) -> None:
        """Begin a segment at `tsc`, where the old one ends, with another rate."""
        self._ns, self._skew_ns = _bounded(self.at(tsc)), _bounded(self.skew_at(tsc))
        if dilation != self._dilation:
            self._stretch_end = None  # it was reckoned for the other rate
        self._tsc, self._dilation, self._boost = tsc, dilation, boost

    def correct(self, tsc: HostTsc, correction: Fraction) -> None:
        """Begin a segment at `tsc` at the same dilation and boost, of a host whose nominal rate is off by that much."""
        self.turn(tsc, self._dilation, self._boost)
        self._correction = correction

    def stop(self, tsc: HostTsc) -> None:
        """Let time stand still from `tsc` on."""
        self.turn(tsc, self._dilation, self._boost)
        self._running = False

    def start(self, tsc: HostTsc) -> None:
        """Let time go on from where it stands, from `tsc` on."""
        self._tsc, self._running, self._stretch_end = tsc, True, None

    def jump(self, ns: Fraction) -> None:
        """Put the clock forward by `ns`, now and for ever."""
        self._ns += ns

    def resume_from(self, line: ClockLine, dilation: Fraction) -> None:
        """Begin a segment at the anchor of `line`, to which C code has carried this timeline."""
        self._ns, self._tsc, self._dilation = line.ns + Fraction(line.rem, line.den), line.tsc, dilation

    # Slewing

    def slew(self, tsc: HostTsc, ns: Fraction, policy: Slew | CatchUpTable) -> None:
        """Owe the guest `ns` more (less, if negative) than it has, from `tsc` on, worked off as `policy` says."""
        self.turn(tsc, self._dilation, self._boost)
        self._skew_ns += ns
        self._slew, self._stretch_end = policy, None

    def plan(self, tsc: HostTsc) -> Fraction:
        """The boost that is due from `tsc` on; 0 once nothing is left to slew.

        As fast as the policy allows, but the last STRETCH_S evenly: then a guest's clock does not overshoot if this is
        asked at least as often, and what it overshoots by else is worked off in the other direction.
        """
        skew = self.skew_at(tsc)
        if self._slew is None or self._slew.is_done(skew):
            return Fraction(0)
        if self._stretch_end is not None and self.host_ns_between(tsc, self._stretch_end) > 0:
            return self._boost
        most = Fraction(self._slew.ppm(skew), PPM)
        if skew < 0:
            most = min(most, SLOWEST)
        needed_s = abs(skew) / (self._dilation * most * NS_PER_S)
        boost = most
        if needed_s <= STRETCH_S:
            self._stretch_end = HostTsc((tsc + STRETCH_S * self.tsc_hz) & U64_MASK)
            boost = most * needed_s / STRETCH_S
        parts = (boost * NS_PER_S).__floor__()  # of 10^9: rates must fit the page's arithmetic
        return Fraction(parts if skew > 0 else -parts, NS_PER_S)

    def end_slew(self) -> Fraction:
        """Owe nothing any more, once the boost is 0; returns what is left undone, in ns."""
        left, self._skew_ns, self._slew, self._stretch_end = self._skew_ns, Fraction(0), None, None
        return left

    # For the page

    def line(self) -> ClockLine:
        """The present segment for C: its remainder is rounded down to the finest 64-bit denominator there is."""
        num, den = self.rate(self.pace)
        ns = self._ns.__floor__()
        rem = ((self._ns - ns) * den).__floor__()
        return ClockLine(self._tsc, GuestNs(ns & U64_MASK), rem, num, den)

    def rate(self, pace: Fraction) -> tuple[int, int]:
        """(num, den) of the ns in a tick at `pace`, both widened to fill 64 bits; RangeError if they cannot."""
        num, den = (pace * NS_PER_S / self.tsc_hz).as_integer_ratio()
        spare_bits = 64 - max(num.bit_length(), den.bit_length())
        if num <= 0 or spare_bits < 0:
            raise RangeError(f"dilation {pace}: it must be positive, and its terms below 2^64 / {self.tsc_hz}")
        return num << spare_bits, den << spare_bits

    def scale(self, pace: Fraction) -> ClockScale:
        """What the page shows: Linux's pair at the nominal rate, and never faster than the timeline.

        A page may not step back, so a fast one could not be put right.
        """
        return ClockScale.from_rate(*self.rate(pace))

    def _host_ns(self, tsc: HostTsc) -> Fraction:
        """Host time in ns since the segment began, while it runs."""
        return max(self.host_ns_between(self._tsc, tsc), Fraction(0)) if self._running else Fraction(0)


def _bounded(ns: Fraction) -> Fraction:
    if ns.denominator.bit_length() <= DENOMINATOR_BITS:
        return ns
    return Fraction((ns * 2**DENOMINATOR_BITS).__floor__(), 2**DENOMINATOR_BITS)
