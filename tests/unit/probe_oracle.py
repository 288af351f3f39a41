"""The probe's arithmetic in unbounded integers, from what its headers say that it does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

U64: Final = 1 << 64
FAR: Final = (2**63 - 1) // 8
"""What step_search.h cuts advances to."""
SPANS: Final = 15
SPAN_HZ: Final = 100
SPANS_GROW: Final = 4
GRAIN_HZ: Final = 10**7
RATE_BITS: Final = 56
SLEW_PPM: Final = 1001
UNSLEWED_PPM: Final = 1
PASTS: Final = 16
CELL_FAR: Final = 2**57 - 2


def signed64(number: int) -> int:
    """Return what a 64-bit register holds of a number, as a signed one."""
    return (number + U64 // 2) % U64 - U64 // 2


def window(rounds: Iterable[tuple[int, int, int]]) -> tuple[int, int]:
    """Return the bounds of b's reading less a's, of rounds (a before, b, a after)."""
    all_rounds = list(rounds)
    low = max((signed64(b - after) for _, b, after in all_rounds), default=-(2**63))
    high = min((signed64(b - before) for before, b, _ in all_rounds), default=2**63 - 1)
    return low, high


def warp(base: int, earlier: int, later: int) -> int:
    """Return by how much `later` is less than `earlier`, as far as the shared cell can say."""
    told, read = (max(-CELL_FAR, min(CELL_FAR, signed64(reading - base))) for reading in (earlier, later))
    return max(0, told - read)


class Reading(NamedTuple):
    """A clock's, between two of the TSC."""

    before: int
    clock: int
    after: int

    @property
    def width(self) -> int:
        """Ticks between the two TSCs."""
        return (self.after - self.before) % U64


class Span(NamedTuple):
    """What may have been added to the clock between two readings, and in how many ticks."""

    low: int
    high: int
    ticks_least: int
    ticks_most: int

    @property
    def least(self) -> int:
        """The least size of a step in it."""
        return max(self.low, -self.high, 0)

    @property
    def is_forward(self) -> bool:
        """Is it a step forward, if one?"""
        return self.low > 0


class Step(NamedTuple):
    """One that was found."""

    low: int
    high: int
    at_tsc: int


def cut(units: int) -> int:
    """Return an advance, cut to what sums of a few can hold."""
    return max(-FAR, min(FAR, units))


def rate_of(units: int, ticks: int) -> int:
    """Return units a tick as a binary fraction, the largest 64-bit number where it is larger."""
    return min((units << RATE_BITS) // ticks, U64 - 1) if units > 0 and ticks > 0 else (U64 - 1) * (units > 0)


def is_as_sharp(span: Span, candidate: Span) -> bool:
    """Does a span say as much of the rate as the candidate's?"""
    return (span.high - span.low) * candidate.ticks_most <= (candidate.high - candidate.low) * span.ticks_least


def goes_on(span: Span, candidate: Span) -> bool:
    """May the clock have gone as fast, or as slow, in this span as in the candidate's?"""
    most = span.high if candidate.is_forward else -span.low
    return most > 0 and most * candidate.ticks_most >= candidate.least * span.ticks_least


class StepSearch:
    """step_search.h's."""

    def __init__(self, tsc_hz: int, clock_hz: int, *, unslewed: bool, grain: int = 0) -> None:
        self.tsc_hz = tsc_hz
        self.first_span_ticks = self.span_ticks = tsc_hz // SPAN_HZ
        self.learned: list[Reading] = []
        self.has_lost_line = False
        self.twice_span_ticks = 2 * tsc_hz // SPAN_HZ
        self.grain = max(grain, clock_hz // GRAIN_HZ + 1)
        self.slew_ppm = UNSLEWED_PPM if unslewed else SLEW_PPM
        self.reads = 0
        self.floor = 2**63 - 1
        self.steps: list[Step] = []
        self.last: Reading | None = None
        self.narrowest = U64
        self.is_unslewed = unslewed
        self.span_begin: Reading | None = None
        self.rates: list[tuple[int, int]] = []
        self.bounds: tuple[int, int] | None = None
        self.candidate: tuple[Span, int] | None = None
        self.past: list[Reading] = []
        self.past_ticks = 0

    def add(self, reading: Reading) -> None:
        """Take one more reading."""
        self.reads += 1
        self.narrowest = min(self.narrowest, reading.width)
        if self.last is None or self.span_begin is None:
            self._begin_line(reading)
        elif signed64(reading.before - self.last.after) < 0:
            self.has_lost_line = True
            self._begin_line(reading)
        elif self._is_wide(reading, self.last):
            return
        elif not self._knows_rate():
            if self._learn(reading, self.span_begin):
                self.last = reading
                if self._knows_rate():
                    self._judge_learned()
        else:
            self._judge(reading, self.last)
            if self._knows_rate() and self.is_unslewed:
                self._learn(reading, self.span_begin)

    def end(self) -> None:
        """Take what is not decided, and what was not seen, into the floor."""
        if self.candidate is not None:
            span, _ = self.candidate
            self.floor = max(self.floor, span.high if span.is_forward else -span.low)
        if self.bounds is None or self.has_lost_line:
            self.floor = 2**63 - 1

    def _knows_rate(self) -> bool:
        return self.bounds is not None

    def _begin_line(self, reading: Reading) -> None:
        self.last, self.span_begin, self.candidate, self.past = reading, reading, None, []
        if self.bounds is None:
            self._begin_learning(reading)

    def _begin_learning(self, reading: Reading) -> None:
        self.span_ticks, self.rates = self.first_span_ticks, []
        self.span_begin, self.learned = reading, [reading]

    def _judge_learned(self) -> None:
        first, *rest = self.learned
        self.last = first
        for reading in rest:
            if not self._knows_rate():
                break
            self._judge(reading, self.last)

    def largest(self, sign: int) -> Step | None:
        """Return the largest step that way, the earliest of those alike."""
        steps = [step for step in self.steps if (step.low > 0) == (sign > 0)]
        return max(steps, key=lambda step: step.low if sign > 0 else -step.high, default=None)

    def _take_medians(self) -> None:
        low, high = (sorted(rates)[SPANS // 2] for rates in zip(*self.rates, strict=True))
        low -= min(low, (low // 10**6 + 1) * self.slew_ppm)
        high = min(high + (high // 10**6 + 1) * self.slew_ppm, U64 - 1)
        if self.bounds is not None:
            low, high = max(low, self.bounds[0]), min(high, self.bounds[1])
        if low <= high:
            self.bounds = low, high
            self.floor = 0 if self.floor == 2**63 - 1 else self.floor

    def _bounds(self) -> tuple[int, int]:
        assert self.bounds is not None
        return self.bounds

    def _is_wide(self, reading: Reading, last: Reading) -> bool:
        ticks = (reading.before - last.after) % U64
        if reading.width // 2 <= self.narrowest:
            return False
        if self.bounds is None:
            return ticks < self.twice_span_ticks
        low, high = self._bounds()
        return cut(high * reading.width >> RATE_BITS) > cut((high - low) * ticks >> RATE_BITS)

    def _learn(self, reading: Reading, begin: Reading) -> bool:
        least, most = (reading.before - begin.after) % U64, (reading.after - begin.before) % U64
        if least < self.span_ticks:
            return False
        advance = cut(signed64(reading.clock - begin.clock))
        fastest = rate_of(advance + self.grain, least)
        self.rates.append((rate_of(advance - self.grain, most), min(fastest + 1, U64 - 1)))
        self.span_begin = reading
        if self.bounds is None:
            self.learned.append(reading)
        if len(self.rates) == SPANS:
            self._take_medians()
            self.rates = []
            self.span_ticks *= SPANS_GROW if self.span_ticks < self.tsc_hz else 1
        return True

    def _span(self, reading: Reading, last: Reading) -> Span:
        least, most = (reading.before - last.after) % U64, (reading.after - last.before) % U64
        advance, (slow, fast) = cut(signed64(reading.clock - last.clock)), self._bounds()
        return Span(
            advance - self.grain - cut(fast * most >> RATE_BITS) - 1,
            advance + self.grain - cut(slow * least >> RATE_BITS),
            least,
            most,
        )

    def _judge(self, reading: Reading, last: Reading) -> None:
        span = self._span(reading, last)
        if self.candidate is not None and not self._decide(span, *self.candidate):
            return
        if self.bounds is not None:
            self.floor = max(self.floor, 2 * (span.high - span.low))
            self._sort(span, reading, last)
        self.last = reading
        if self.bounds is None:
            self._begin_learning(reading)

    def _sort(self, span: Span, reading: Reading, last: Reading) -> None:
        if span.least == 0:
            self._keep(reading)
        elif span.least > cut(self._bounds()[1] * span.ticks_most >> RATE_BITS) // 4:
            self.steps.append(Step(span.low, span.high, reading.before))
            self.past = []
        elif self._was_so_before(span, last):
            self._forget_rate(span)
        else:
            self.candidate = span, reading.before
            self.past = []

    def _keep(self, reading: Reading) -> None:
        if not self.past:
            self.past_ticks = self.tsc_hz // 1000
        elif (reading.before - self.past[-1].before) % U64 < self.past_ticks:
            return
        if len(self.past) == PASTS:
            self.past = self.past[::2]
            self.past_ticks *= 2
        self.past.append(reading)

    def _was_so_before(self, span: Span, last: Reading) -> bool:
        before = [self._span(last, past) for past in reversed(self.past) if signed64(last.before - past.after) > 0]
        return next((goes_on(each, span) for each in before if is_as_sharp(each, span)), True)

    def _forget_rate(self, span: Span) -> None:
        self.floor = max(self.floor, span.high if span.is_forward else -span.low)
        self.bounds, self.past = None, []

    def _decide(self, span: Span, candidate: Span, at_tsc: int) -> bool:
        if not is_as_sharp(span, candidate):
            return False
        if goes_on(span, candidate):
            self._forget_rate(candidate)
        else:
            self.steps.append(Step(candidate.low, candidate.high, at_tsc))
        self.candidate = None
        return True
