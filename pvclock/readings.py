"""Values that layers hand each other: instants of the host's clocks, a line of guest time, what a page shows.

Each is a plain tuple, made in one layer and read in another.  Field names are the ABI's where the ABI has one.
"""

from __future__ import annotations

from enum import StrEnum
from fractions import Fraction
from typing import NamedTuple

from pvclock.quantities import U64_MASK, GuestNs, GuestTsc, HostTsc, RefNs

__all__ = ["ClockLine", "HostStamps", "Reading", "Reference", "ReferenceTscPage", "RunReport", "Sample", "TimeInfo"]


class Reference(StrEnum):
    """A clock of the host that guest time can follow."""

    RAW = "raw"
    """CLOCK_MONOTONIC_RAW: the host's oscillator, as its kernel counts it."""
    MONOTONIC = "monotonic"
    """CLOCK_MONOTONIC: the same, slewed by NTP or PTP."""
    REALTIME = "realtime"
    """CLOCK_REALTIME: UTC, slewed and stepped."""


class Sample(NamedTuple):
    """One instant on the host TSC and on a reference clock (ns): the clock is at most bound_ns from what is said."""

    tsc: HostTsc
    ns: int
    bound_ns: float


def shown_khz(mul: int, shift: int) -> int:
    """The TSC frequency that a guest computes from its page's scale.  Source: Linux pvclock_tsc_khz()."""
    khz = (10**6 << 32) // mul
    return khz >> shift if shift >= 0 else khz << -shift


class TimeInfo(NamedTuple):
    """One pvclock page (struct pvclock_vcpu_time_info) as it lies in guest memory."""

    version: int
    tsc_timestamp: GuestTsc
    system_time: GuestNs
    tsc_to_system_mul: int
    tsc_shift: int
    flags: int

    @property
    def shown_khz(self) -> int:
        """What a guest takes its TSC's frequency to be."""
        return shown_khz(self.tsc_to_system_mul, self.tsc_shift)

    def described(self) -> str:
        """One line of it, for a log."""
        return (
            f"version {self.version}, TSC {self.tsc_timestamp}, {self.system_time} ns, "
            f"mul {self.tsc_to_system_mul:#x}, shift {self.tsc_shift}, flags {self.flags:#x}, "
            f"which shows a TSC of {self.shown_khz} kHz"
        )


class ReferenceTscPage(NamedTuple):
    """A reference TSC page as it lies in guest memory; source: TLFS, HV_REFERENCE_TSC_PAGE.

    sequence: 0 and 2^32 - 1 say that nobody may use the page.  scale: units of 100 ns in 2^64 ticks.  offset: units.
    """

    sequence: int
    scale: int
    offset: int

    @property
    def is_valid(self) -> bool:
        """May its guest use it, or has it to read the counter?"""
        return self.sequence not in (0, 0xFFFFFFFF)

    def units(self, guest_tsc: int) -> int:
        """What a guest computes at `guest_tsc`: reference time in units of 100 ns."""
        return (guest_tsc * self.scale >> 64) + self.offset & U64_MASK

    def described(self) -> str:
        """One line of it, for a log."""
        return f"sequence {self.sequence}, scale {self.scale:#x}, offset {self.offset}"


class Reading(NamedTuple):
    """What a vCPU's guest computes at one instant: its TSC, its clock (ns), and the page's version and flags."""

    tsc: GuestTsc
    ns: GuestNs
    version: int
    flags: int


class HostStamps(NamedTuple):
    """One instant on all of a host's clocks.

    tsc: host ticks.  raw_ns: CLOCK_MONOTONIC_RAW, which stands still while the host sleeps.  real_ns: UTC since 1970.
    boot_id: within one boot of one host all but real_ns can be compared, beyond it only that can; None if unknown.
    asleep_ns: how long the host has slept since it booted (CLOCK_BOOTTIME - CLOCK_MONOTONIC).
    """

    tsc: HostTsc
    raw_ns: RefNs
    real_ns: int
    boot_id: str | None
    asleep_ns: int = 0


class ClockLine(NamedTuple):
    """A straight piece of guest time: ns + rem/den at host TSC `tsc`, and num/den ns more with each tick."""

    tsc: HostTsc
    ns: GuestNs
    rem: int
    num: int
    den: int


class RunReport(NamedTuple):
    """What run_for() did: guest time that passed, and how much of it was beyond what was asked for, in ns."""

    ran_ns: Fraction
    overshoot_ns: Fraction
