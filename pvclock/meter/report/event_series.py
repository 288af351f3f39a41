"""A clock's events as two lines over host time: how far guest time is ahead of it, and its rate.

Host time is the host TSC by its nominal frequency.  Each event holds a point of the timeline, exactly; what is a float
here was divided once, at the end.  Where events are missing, or the TSC is another one (it went back, or the clock was
restored elsewhere), the line is broken; it goes on by the host's time of day, if that is known.
"""

from __future__ import annotations

import math
from array import array
from fractions import Fraction
from typing import Final, NamedTuple, TypeAlias

from pvclock.quantities import NS_PER_S

__all__ = ["EventSeries", "Point", "Ratio", "step_ns"]

Ratio: TypeAlias = tuple[int, int]
"""Numerator and denominator, as a line of JSON has them."""

CONTRADICTION_NS: Final = 1.0
CONTRADICTION_PART: Final = 1e-12
"""An event may be off the line of the one before by as much, and that part of the time between: floats' rounding."""
AHEAD_MAX_NS: Final = 1e30
RATE_MAX: Final = 1e15
"""More than any clock is told to run at."""
GAP_MAX_NS: Final = 366 * 86_400 * NS_PER_S
"""A longer time between two numberings is taken for a time of day that was set."""
DISORDER_MAX_S: Final = 1
"""A stamp that is further behind the one before is no late writer's, nor another CPU's: the TSC went back."""
PPB: Final = 10**9


class Point(NamedTuple):
    """A point of the timeline.

    real_ns: the host's time of day, None if it is unknown.  before, after: guest time in ns; rate: after the point.
    is_restored: another guest time begins here, which owes nothing to that of the event before.
    """

    sequence: int
    host_tsc: int
    tsc_hz: int
    real_ns: int | None
    before: Ratio
    after: Ratio
    rate: Ratio
    is_restored: bool


class EventSeries:
    """The lines that points make.  ahead_ns: guest time less host time, less what it was at first."""

    def __init__(self) -> None:
        self.x_s = array("d")
        self.ahead_ns = array("d")
        self.rate_x_s = array("d")
        self.rates = array("d")
        self.rate_ppb = array("d")
        """How much faster than 1; nan while paused."""
        self.lost = 0
        """Events that are missing between others."""
        self.numberings = 0
        """How often the host's TSC became another one."""
        self.fall_ns = 0.0
        """How far guest time fell to the last point from the one before, where no line leads from one to the other and
        both are of one log; negative, or 0."""
        self._last: Point | None = None
        self._begin = _Begin(0, 1, Fraction(0), Fraction(0))
        self._ahead_ns, self._gain = 0.0, 0.0

    @property
    def now_s(self) -> float:
        """Host time of the last point; 0 before the first one."""
        return self.x_s[-1] if self.x_s else 0.0

    def take(self, point: Point) -> float:
        """Take a point; its host time in s.  OverflowError if a number is beyond all time."""
        last, self.fall_ns = self._last, 0.0
        if last is None:
            self._begin = _Begin(point.host_tsc, point.tsc_hz, Fraction(*point.before), Fraction(0))
        before_ns = self._begin.ahead_ns(point.host_tsc, point.before)
        if last is not None and self._is_renumbered(last, point, before_ns):
            self.fall_ns = _fall_ns(last, point)
            self._begin_anew(last, point)
            before_ns = self._begin.ahead_ns(point.host_tsc, point.before)
        elif last is not None and point.sequence != last.sequence + 1:
            self.fall_ns = _fall_ns(last, point)
            self.lost += point.sequence - last.sequence - 1
            self._break()
        self._add(point, before_ns)
        self._last = point
        return self.x_s[-1]

    def end(self) -> None:
        """Let the last rate reach to the end of the line."""
        if self.rate_x_s and self.rate_x_s[-1] < self.now_s:
            self._add_rate(self.now_s, self.rates[-1], self.rate_ppb[-1])

    def _add(self, point: Point, before_ns: float) -> None:
        x_s = self._begin.host_s(point.host_tsc)
        if self.x_s and x_s < self.x_s[-1]:  # stamped on another CPU
            x_s = self.x_s[-1]
        self._add_ahead(x_s, before_ns)
        if point.after != point.before:
            self._add_ahead(x_s, self._begin.ahead_ns(point.host_tsc, point.after))
        if self._last is None or point.rate != self._last.rate:
            numerator, denominator = point.rate
            if abs(numerator) > RATE_MAX * denominator:
                raise OverflowError
            ppb = (numerator - denominator) * PPB / denominator if numerator else math.nan
            self._add_rate(x_s, numerator / denominator, ppb)
        self._ahead_ns, self._gain = self.ahead_ns[-1], self.rates[-1] - 1

    def _add_ahead(self, x_s: float, ahead_ns: float) -> None:
        if abs(ahead_ns) > AHEAD_MAX_NS:
            raise OverflowError
        self.x_s.append(x_s)
        self.ahead_ns.append(ahead_ns)

    def _add_rate(self, x_s: float, rate: float, ppb: float) -> None:
        self.rate_x_s.append(x_s)
        self.rates.append(rate)
        self.rate_ppb.append(ppb)

    def _is_renumbered(self, last: Point, point: Point, ahead_ns: float) -> bool:
        """Is the TSC another one?  It went back, has another frequency, or a next event that contradicts this one."""
        passed = point.host_tsc - last.host_tsc
        is_next = point.sequence == last.sequence + 1
        went_back = passed < (-DISORDER_MAX_S * point.tsc_hz if is_next else 0)
        if point.tsc_hz != last.tsc_hz or point.sequence <= last.sequence or went_back:
            return True
        passed_ns = passed * NS_PER_S / point.tsc_hz
        off_ns = abs(ahead_ns - self._ahead_ns - self._gain * passed_ns)
        return is_next and off_ns > CONTRADICTION_NS + CONTRADICTION_PART * abs(passed_ns)

    def _begin_anew(self, last: Point, point: Point) -> None:
        """Go on from the last point by the time of day; from the same instant if that is not known."""
        gap_ns = 0
        if last.real_ns is not None and point.real_ns is not None and 0 < point.real_ns - last.real_ns < GAP_MAX_NS:
            gap_ns = point.real_ns - last.real_ns
        passed = last.host_tsc - self._begin.tsc
        host_ns = self._begin.host_ns + Fraction(passed * NS_PER_S, last.tsc_hz) + gap_ns
        self._break()
        self._begin = _Begin(point.host_tsc, point.tsc_hz, self._begin.guest_ns, host_ns)
        self.numberings += 1

    def _break(self) -> None:
        self.x_s.append(self.now_s)
        self.ahead_ns.append(math.nan)


class _Begin:
    """Where a numbering of the TSC begins: host time is host_ns there.  guest_ns: what the first event had."""

    def __init__(self, tsc: int, tsc_hz: int, guest_ns: Fraction, host_ns: Fraction) -> None:
        self.tsc = tsc
        self.guest_ns, self.host_ns = guest_ns, host_ns
        self._host_s = float(host_ns) / NS_PER_S
        self._tsc_hz = tsc_hz
        taken_out = guest_ns + host_ns
        self._scale = taken_out.denominator * tsc_hz
        self._taken_out = taken_out.numerator * tsc_hz
        self._tick = taken_out.denominator * NS_PER_S

    def host_s(self, tsc: int) -> float:
        """Host time in s, at the host's TSC."""
        return self._host_s + (tsc - self.tsc) / self._tsc_hz

    def ahead_ns(self, tsc: int, guest_ns: Ratio) -> float:
        """Guest time less host time then, less the first: guest - taken_out - ticks / tsc_hz, as one division."""
        numerator, denominator = guest_ns
        ahead = numerator * self._scale - denominator * (self._taken_out + (tsc - self.tsc) * self._tick)
        return ahead / (denominator * self._scale)


def _fall_ns(last: Point, point: Point) -> float:
    """How far guest time is behind that of the event before, as a negative number; 0 if another guest time begins."""
    if point.sequence <= last.sequence or point.is_restored:
        return 0.0
    return min(step_ns(last.after, point.before), 0.0)


def step_ns(before: Ratio, after: Ratio) -> float:
    """From one guest time to another, in ns."""
    if before == after:  # most of a million events
        return 0.0
    return (after[0] * before[1] - before[0] * after[1]) / (after[1] * before[1])
