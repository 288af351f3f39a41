"""The clocks of a stock Linux guest as it reads them itself, held against its machine's: see clock_sampler.c."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Final, NamedTuple

from pvclock.clock.guest_clock import GuestClock
from pvclock.quantities import U64_MASK, HostTsc, signed64
from tests.guest_programs import Triple
from tests.kvm.guest_shell import GuestShell
from tests.kvm.stock_linux import StockLinux

__all__ = ["ClockSampler", "Offsets", "ROUNDING_NS", "SampledClock", "Span", "common"]

ROUNDING_NS: Final = 16
"""What a page may differ from its timeline, with room: 2 ns, and 0.47 ppb of its age."""


class SampledClock(NamedTuple):
    """What the sampler saw of one clock.

    backs: how often it went back.  older, newer: the two successive readings furthest apart.  points: the narrowest
    readings, one of each interval.  due_ns: when its timer was to expire; expired: the first reading after it had.
    """

    readings: int
    backs: int
    older: Triple
    newer: Triple
    points: tuple[Triple, ...]
    due_ns: int | None = None
    expired: Triple | None = None


class ClockSampler:
    """The sampler at work in a guest, from its first reading on.

    interval_ms: of its points.  timer_ms: when its timers expire; it goes on until then.  points_of: a clock, if only
    its points are wanted.
    """

    def __init__(self, guest: StockLinux | GuestShell, interval_ms: int, timer_ms: int, points_of: str = "") -> None:
        self._guest = guest
        self._command = guest.begin(f"clock_sampler {interval_ms} {timer_ms} {points_of}")
        self._command.wait_for_line("sampling")

    def finish(self) -> dict[str, SampledClock]:
        """What it saw, by clock."""
        self._guest.type("\n")
        lines = [line.split() for line in self._command.printed().splitlines()]
        return {words[1]: _clock(words, lines) for words in lines if words and words[0] == "clock"}


def _clock(words: list[str], lines: list[list[str]]) -> SampledClock:
    """The clock that a line of `words` is about, with its points and its timer."""
    name = words[1]
    about = [line for line in lines if line[1:2] == [name]]
    points = tuple(_triple(line[2:]) for line in about if line[0] == "point")
    found = SampledClock(int(words[2]), int(words[3]), _triple(words[4:7]), _triple(words[7:10]), points)
    for line in about:
        if line[0] == "timer":
            return found._replace(due_ns=int(line[2]), expired=_triple(line[3:]))
    return found


def _triple(words: list[str]) -> Triple:
    before, ns, width = map(int, words)
    return Triple(before, ns, before + width)


class Span(NamedTuple):
    """A quantity that is known to be from `low` to `high`, in ns."""

    low: Fraction
    high: Fraction


def common(spans: Sequence[Span]) -> Span:
    """What they have in common; low is above high if that is nothing."""
    return Span(max(each.low for each in spans), min(each.high for each in spans))


class Offsets:
    """Where a guest's TSC is against its host's: as of now, and up to each pause that was noted as it was before.

    Only for a guest whose vCPUs agree, and whose TSC nobody writes.
    """

    def __init__(self, clock: GuestClock) -> None:
        self._clock = clock
        self._until: list[tuple[int, int]] = []  # the guest's TSC at a pause, and its offset before

    def note_pause(self) -> None:
        """The clock is paused, and may go on at another offset."""
        paused_tsc = self._clock.line.tsc
        tsc = self._clock.guest_tsc(0, paused_tsc)
        self._until.append((tsc, self._now()))

    def host_tsc(self, guest_tsc: int) -> HostTsc:
        """When the guest read `guest_tsc`."""
        offset = next((offset for until, offset in self._until if guest_tsc <= until), None)
        return HostTsc((guest_tsc - (self._now() if offset is None else offset)) & U64_MASK)

    def ahead_ns(self, triple: Triple) -> Span:
        """How far the guest's clock was ahead of the engine's timeline."""
        latest, earliest = (self._clock.at(self.host_tsc(tsc)) for tsc in (triple.after, triple.before))
        return Span(triple.ns - latest, triple.ns - earliest)

    def _now(self) -> int:
        tsc = self._clock.backend.stamps().tsc
        return signed64(self._clock.guest_tsc(0, tsc) - tsc)
