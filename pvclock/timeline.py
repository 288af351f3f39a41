"""A VM's time: a piecewise-affine map from host ticks to guest nanoseconds, kept exactly.

Each segment begins where the one before ended and has a rational rate, so nothing is rounded here; rounding happens in
the page, where the guest's own integer arithmetic does it.  No clock is read and nothing is published.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Final

from pvclock._core import ClockScale
from pvclock.errors import RangeError
from pvclock.quantities import NS_PER_S, U64_MASK, GuestNs, HostTsc
from pvclock.readings import ClockLine

__all__ = ["Timeline"]

DENOMINATOR_BITS: Final = 1024
"""Rates without a common term would make the denominator grow for ever; beyond this, 2^-1024 ns is lost at a turn."""


class Timeline:
    """Guest time as a function of host TSC: from `tsc` on, at the host's nominal rate.

    `dilation` is how many guest seconds pass in a host second.
    """

    def __init__(self, tsc: HostTsc, tsc_hz: int) -> None:
        self.tsc_hz = tsc_hz
        self._tsc = tsc
        self._ns = Fraction(0)
        self._dilation = Fraction(1)

    @property
    def dilation(self) -> Fraction:
        """Guest seconds in a host second, now."""
        return self._dilation

    def at(self, tsc: HostTsc) -> Fraction:
        """Guest time in ns at host TSC `tsc`, exactly; before the segment's beginning it stands still."""
        ticks = (tsc - self._tsc) & U64_MASK
        if ticks > U64_MASK // 2:
            return self._ns
        return self._ns + ticks * self._ns_per_tick(self._dilation)

    def turn(self, tsc: HostTsc, dilation: Fraction) -> None:
        """Begin a segment at `tsc`, where the old one ends, with another rate."""
        ns = self.at(tsc)
        if ns.denominator.bit_length() > DENOMINATOR_BITS:
            ns = Fraction((ns * 2**DENOMINATOR_BITS).__floor__(), 2**DENOMINATOR_BITS)
        self._ns, self._tsc, self._dilation = ns, tsc, dilation

    def resume_from(self, line: ClockLine, dilation: Fraction) -> None:
        """Begin a segment at the anchor of `line`, to which C code has carried this timeline."""
        self._ns, self._tsc, self._dilation = line.ns + Fraction(line.rem, line.den), line.tsc, dilation

    def line(self) -> ClockLine:
        """The present segment for C: its remainder is rounded down to the finest 64-bit denominator there is."""
        num, den = self.rate(self._dilation)
        ns = self._ns.__floor__()
        rem = ((self._ns - ns) * den).__floor__()
        return ClockLine(self._tsc, GuestNs(ns & U64_MASK), rem, num, den)

    def rate(self, dilation: Fraction) -> tuple[int, int]:
        """(num, den) of the ns in a tick under `dilation`, both widened to fill 64 bits; RangeError if they cannot."""
        num, den = self._ns_per_tick(dilation).as_integer_ratio()
        spare_bits = 64 - max(num.bit_length(), den.bit_length())
        if num <= 0 or spare_bits < 0:
            raise RangeError(f"dilation {dilation}: it must be positive, and its terms below 2^64 / {self.tsc_hz}")
        return num << spare_bits, den << spare_bits

    def scale(self, dilation: Fraction) -> ClockScale:
        """What the page shows: Linux's pair at the nominal rate, and never faster than the timeline.

        A page may not step back, so a fast one could not be put right.
        """
        return ClockScale.from_rate(*self.rate(dilation))

    def _ns_per_tick(self, dilation: Fraction) -> Fraction:
        return dilation * NS_PER_S / self.tsc_hz
