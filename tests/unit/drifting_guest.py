"""A guest whose clock is simulated exactly, and a reference beside it, for what measures drift."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import floor

from pvclock.meter.drift.clocks import DriftingClock
from pvclock.meter.drift.readings import ClockReadings
from pvclock.meter.guest import GuestReading
from pvclock.meter.watch.lines import value_at
from pvclock.quantities import GuestNs, GuestTsc, HostTsc
from pvclock.readings import Sample, TimeInfo
from tests.oracle import U64, ExactLine

__all__ = ["BOUND_NS", "HZ", "DriftingGuest", "clock_of", "readings_of"]

HZ = 2_000_000_000
BOUND_NS = 5.0
MUL = 1 << 31
LOOK_TICKS = 3000


class DriftingGuest:
    """A ReadableGuest and its ReferenceClock.  Each look at either takes LOOK_TICKS, a reading up to five times that.

    between: happens between a reading and the look at its page.
    ppb: how fast the reference is against the TSC's nominal rate.
    """

    tsc_hz = HZ

    def __init__(self, ppb: int = 0, offset: int = 0, bound_ticks: int = 0) -> None:
        self.now, self.offset, self.bound_ticks = 10**12, offset, bound_ticks
        self.page = TimeInfo(2, GuestTsc((self.now + offset) % U64), GuestNs(10**9), MUL, 0, 0)
        self.reference = ExactLine(self.now, Fraction(10**15), Fraction(10**9, HZ) * (1 + Fraction(ppb, 10**9)))
        self.between: Callable[[], object] = int
        self.samples = 0
        self.late_ticks = 0
        self.is_stopped: bool | None = False
        self.set_ns = 0
        """By how much the reference was set."""

    @property
    def tsc(self) -> int:
        """The guest's, as it is."""
        return (self.now + self.offset) % U64

    def pass_s(self, seconds: Fraction | float) -> None:
        """Let time pass."""
        self.now += floor(seconds * HZ)

    def pass_before_reading(self, seconds: float) -> None:
        """Let time pass between the sample of the reference and the next reading."""
        self.late_ticks = floor(seconds * HZ)

    def step(self, ns: int, mul: int = MUL) -> None:
        """Write the page anew: its line begins now, `ns` further."""
        shown = GuestNs(value_at(self.page, self.tsc) + ns)
        self.page = TimeInfo(self.page.version + 2, GuestTsc(self.tsc), shown, mul, 0, 0)

    def reading(self) -> GuestReading:
        """See ReadableGuest."""
        self.now += LOOK_TICKS * (1 + self.samples % 5) + self.late_ticks
        self.late_ticks = 0
        seen = GuestReading(
            GuestTsc(self.tsc), GuestNs(value_at(self.page, self.tsc)), HostTsc(self.now), self.bound_ticks
        )
        self.between()
        return seen

    def pages(self) -> list[TimeInfo]:
        """See ReadableGuest."""
        self.now += LOOK_TICKS
        return [self.page]

    def sample(self) -> Sample:
        """The reference at this instant, wrong by up to BOUND_NS."""
        self.now += LOOK_TICKS
        self.samples += 1
        error_ns = self.samples * 7 % 9 - 4
        return Sample(HostTsc(self.now), floor(self.reference.at(self.now)) + self.set_ns + error_ns, BOUND_NS)

    def set_by_ns(self) -> int:
        """See ReferenceClock."""
        return self.set_ns

    def ahead_ns(self) -> Fraction:
        """How far its clock is ahead of the reference, exactly but for the floor of its reading."""
        return value_at(self.page, self.tsc) - self.reference.at(self.now)


def readings_of(guest: DriftingGuest, settle_s: float = 0.0, name: str = "a guest") -> ClockReadings:
    """Its readings."""
    return ClockReadings(name, guest, guest, settle_s, lambda: guest.is_stopped, lambda: guest.now)


def clock_of(word: str, guest: DriftingGuest, settle_s: float = 0.0) -> DriftingClock:
    """Its clock under a name."""
    return DriftingClock(word, readings_of(guest, settle_s, f"the {word}"))
