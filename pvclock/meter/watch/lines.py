"""What the lines of pvclock pages say, and how two of them differ: plain unbounded ints, floored as a guest floors.

A reading is at most floor_ns() below its exact line, so a difference of two readings is right to that.  TSCs and guest
time are taken as 64-bit counters, of which differences are signed.
"""

from __future__ import annotations

from fractions import Fraction
from math import ceil
from typing import Final, NamedTuple

from pvclock.quantities import NS_PER_S, HostTsc, signed64
from pvclock.readings import TimeInfo

__all__ = [
    "Line",
    "TscRates",
    "difference",
    "floor_ns",
    "host_instant",
    "is_legal",
    "is_one_pair",
    "is_same_line",
    "ns_per_tick",
    "step_between",
    "step_within",
    "value_at",
]

TSC_STABLE, GUEST_STOPPED = 1, 2
LEAST_MUL: Final = 1 << 31
SHIFT_MAX: Final = 31
BACKDATED_TICKS: Final = (1 << 34) + (1 << 15)
"""This engine dates its lines back, so that they are exact to fractions: by less than 2^34 ticks up to 8 GHz, and 2^14.
Source: pvclock_exact_backdate().
"""

SHIFT_BITS: Final = 128
"""A shift is a signed byte."""
ONE_TO_ONE: Final = NS_PER_S << 32 + SHIFT_BITS
SCALED_PPM: Final = 300
"""KVM takes a guest's TSC frequency for the host's within 250 ppm; what is further off than this is scaled."""


class Line(NamedTuple):
    """A page, and the TSC offset (guest TSC less host TSC, ticks) that the guest reads it with; None: unknown."""

    info: TimeInfo
    offset: int | None


class TscRates(NamedTuple):
    """The frequencies of the host's TSC and of the guest's; None: unknown, and the guest's lines may tell."""

    host_hz: int
    guest_hz: int | None = None

    def is_scaled(self, line: TimeInfo) -> bool:
        """Does the guest's TSC not count as the host's does?"""
        if self.guest_hz is not None:
            return abs(self.guest_hz - self.host_hz) * 10**6 > SCALED_PPM * self.host_hz
        counted = line.tsc_to_system_mul * self.host_hz << SHIFT_BITS + line.tsc_shift
        return abs(counted - ONE_TO_ONE) * 10**6 > SCALED_PPM * ONE_TO_ONE

    def speed(self, line: TimeInfo) -> Fraction | None:
        """The guest's seconds in a nominal second of its host; None if its TSC is scaled by an unknown ratio."""
        tsc_hz = self.guest_hz if self.is_scaled(line) else self.host_hz
        return None if tsc_hz is None else ns_per_tick(line) * tsc_hz / NS_PER_S


def is_legal(page: TimeInfo) -> bool:
    """Can KVM, or this engine, have written that?  An even version, a normalised mul, and flags that there are."""
    is_rate = page.tsc_to_system_mul >= LEAST_MUL and abs(page.tsc_shift) <= SHIFT_MAX
    return page.version % 2 == 0 and is_rate and page.flags | TSC_STABLE | GUEST_STOPPED == TSC_STABLE | GUEST_STOPPED


def value_at(line: TimeInfo, tsc: int) -> int:
    """The ns that a line gives at guest TSC `tsc`, and before its tsc_timestamp, where a guest would read centuries."""
    ticks = signed64(tsc - line.tsc_timestamp)
    shifted = ticks << line.tsc_shift if line.tsc_shift >= 0 else ticks >> -line.tsc_shift
    return line.system_time + (shifted * line.tsc_to_system_mul >> 32)


def floor_ns(line: TimeInfo) -> int:
    """A reading is less than this below the exact line: whole ns cut off 1, and a shift to the right another."""
    return 1 if line.tsc_shift >= 0 else 2


def ns_per_tick(line: TimeInfo) -> Fraction:
    """How fast a line is, exactly."""
    return Fraction(line.tsc_to_system_mul, 1 << 32) * Fraction(2) ** line.tsc_shift


def is_same_line(one: TimeInfo, other: TimeInfo) -> bool:
    """Do both say the same?  Versions and flags may differ."""
    return one[1:5] == other[1:5]


def is_one_pair(one: TimeInfo, other: TimeInfo) -> bool:
    """Do two pages have the master clock's line of one instant, if KVM made them, so that their TSCs' offsets differ?

    Under a master clock each page has the VM's system_time, and that instant as the vCPU's own TSC counts.
    """
    are_stable = one.flags & other.flags & TSC_STABLE
    return bool(are_stable) and one[2:5] == other[2:5] and one.tsc_timestamp != other.tsc_timestamp


def host_instant(line: Line, near: HostTsc) -> int:
    """The host's TSC at the line's tsc_timestamp, which is within 2^63 ticks of `near`; its offset is known."""
    assert line.offset is not None  # noqa: S101  # the caller's part
    return near + signed64(line.info.tsc_timestamp - line.offset - near)


def step_between(
    before: TimeInfo, offset_before: int | None, after: TimeInfo, offset_after: int | None
) -> tuple[int, int]:
    """(step_ns, bound_ns): what `after` gives more at its tsc_timestamp than `before` gives at that instant.

    Unless both offsets are known, they are taken to be the same.
    """
    moved = offset_before - offset_after if offset_before is not None and offset_after is not None else 0
    return signed64(after.system_time - value_at(before, after.tsc_timestamp + moved)), floor_ns(before)


def step_within(before: Line, after: Line, since: HostTsc, at: HostTsc, *, is_scaled: bool) -> tuple[int, int]:
    """(step_ns, bound_ns): what `after` gives more than `before` when it took its place, from `since` to `at`.

    Lines of one rate differ by as much at all times.  Of two rates the step is that at the earliest possible instant,
    and the bound goes to the latest: known by the offsets, unless the guest's TSC is scaled.
    """
    bend = abs(ns_per_tick(after.info) - ns_per_tick(before.info))
    if not bend or is_scaled or before.offset is None or after.offset is None:
        step_ns, bound_ns = step_between(before.info, before.offset, after.info, after.offset)
        return step_ns, bound_ns + ceil(bend * BACKDATED_TICKS)
    made = HostTsc(host_instant(after, at)) if after.offset == before.offset else since
    earliest = made if since <= made <= at else since
    step_ns, bound_ns = difference(after, before, earliest)
    return step_ns, bound_ns + ceil(bend * (at - earliest))


def difference(one: Line, other: Line, at: HostTsc) -> tuple[int, int]:
    """(difference_ns, bound_ns): what `one` gives more than `other` at the host's TSC `at`.

    Unless both offsets are known, both are taken at one guest TSC, the newer tsc_timestamp; there the pages of one pair
    differ by nothing, since their TSCs differ.
    """
    bound_ns = max(floor_ns(one.info), floor_ns(other.info))
    if one.offset is not None and other.offset is not None:
        values = value_at(one.info, at + one.offset), value_at(other.info, at + other.offset)
    elif is_one_pair(one.info, other.info):
        return 0, bound_ns
    else:
        ahead = signed64(one.info.tsc_timestamp - other.info.tsc_timestamp)
        tsc = one.info.tsc_timestamp if ahead > 0 else other.info.tsc_timestamp
        values = value_at(one.info, tsc), value_at(other.info, tsc)
        bound_ns += ceil(abs(ns_per_tick(one.info) - ns_per_tick(other.info)) * BACKDATED_TICKS)
    return signed64(values[0] - values[1]), bound_ns
