"""A guest whose clock is simulated exactly, and a reference beside it, for what measures drift."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import floor

from pvclock.meter.drift import DriftingClock
from pvclock.meter.guest import GuestReading
from pvclock.meter.series import Series
from pvclock.meter.watch.lines import value_at
from pvclock.quantities import GuestNs, GuestTsc, HostTsc
from pvclock.readings import Sample, TimeInfo
from pvclock.timekeeping.sampling import Sampler
from tests.oracle import U64, ExactLine

__all__ = ["BOUND_NS", "HZ", "DriftingGuest", "clock_of", "series_of"]

HZ = 2_000_000_000
BOUND_NS = 5.0
MUL = 1 << 31
LOOK_TICKS = 3000


class DriftingGuest:
    """A SeriesGuest.  Each look at it takes LOOK_TICKS, a reading up to five times that.

    between: happens between a reading and the look at its page.
    ppb: how fast the reference is against the TSC's nominal rate.
    """

    def __init__(self, ppb: int = 0, offset: int = 0, bound_ticks: int = 0) -> None:
        self.now, self.offset, self.bound_ticks = 10**12, offset, bound_ticks
        self.page = TimeInfo(2, GuestTsc((self.now + offset) % U64), GuestNs(10**9), MUL, 0, 0)
        self.reference = ExactLine(self.now, Fraction(10**15), Fraction(10**9, HZ) * (1 + Fraction(ppb, 10**9)))
        self.between: Callable[[], object] = int
        self.samples = 0

    @property
    def tsc(self) -> int:
        """The guest's, as it is."""
        return (self.now + self.offset) % U64

    def pass_s(self, seconds: Fraction | float) -> None:
        """Let time pass."""
        self.now += floor(seconds * HZ)

    def step(self, ns: int, mul: int = MUL) -> None:
        """Write the page anew: its line begins now, `ns` further."""
        shown = GuestNs(value_at(self.page, self.tsc) + ns)
        self.page = TimeInfo(self.page.version + 2, GuestTsc(self.tsc), shown, mul, 0, 0)

    def reading(self) -> GuestReading:
        """See SeriesGuest."""
        self.now += LOOK_TICKS * (1 + self.samples % 5)
        seen = GuestReading(
            GuestTsc(self.tsc), GuestNs(value_at(self.page, self.tsc)), HostTsc(self.now), self.bound_ticks
        )
        self.between()
        return seen

    def pages(self) -> list[TimeInfo]:
        """See SeriesGuest."""
        self.now += LOOK_TICKS
        return [self.page]

    def sample(self) -> Sample:
        """The reference at this instant, wrong by up to BOUND_NS."""
        self.now += LOOK_TICKS
        self.samples += 1
        error_ns = self.samples * 7 % 9 - 4
        return Sample(HostTsc(self.now), floor(self.reference.at(self.now)) + error_ns, BOUND_NS)

    def ahead_ns(self) -> Fraction:
        """How far its clock is ahead of the reference, exactly but for the floor of its reading."""
        return value_at(self.page, self.tsc) - self.reference.at(self.now)


def series_of(guest: DriftingGuest, settle_s: float = 0.0, name: str = "a guest") -> Series:
    """Its readings."""
    return Series(name, guest, Sampler(guest.sample), HZ, settle_s, lambda: guest.now)


def clock_of(word: str, guest: DriftingGuest, settle_s: float = 0.0) -> DriftingClock:
    """Its clock under a name."""
    return DriftingClock(word, series_of(guest, settle_s, f"the {word}"))
