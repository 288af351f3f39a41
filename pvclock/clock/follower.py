"""Guest time that follows a clock of its host: by its rate alone, tick by tick, and never by a step."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Final, NamedTuple

from pvclock._transaction import Turns
from pvclock.clock.timekeeper import Timekeeper, nothing
from pvclock.errors import ConfigError, PvclockError, RangeError, WrongType
from pvclock.host.backend import Backend
from pvclock.quantities import HostTsc, quoted
from pvclock.readings import Reference, Sample
from pvclock.timekeeping.discipline import MAX_PPM, Discipline, Steering, SteeringState
from pvclock.timekeeping.events import Event, EventKind
from pvclock.timekeeping.sampling import Sampler, SampleSource
from pvclock.timekeeping.timeline import RateTerms

__all__ = ["INJECTED", "OFF", "Follower", "source_of"]

OFF: Final = "off"
"""No reference: the TSC at its nominal rate, bit-equal to Linux."""

INJECTED: Final = "injected"
"""A source of samples of the caller's."""


HOLDOVER_MISSES: Final = 3
"""So many ticks in a row without a sample are holdover."""


class Following(NamedTuple):
    """What is followed, and how; replaced as a whole.

    turns: who may sample: samples come in order, and may take a while.  breaks: how often the host's TSC stepped, or it
    slept.  missed: how many ticks in a row had no sample.
    """

    sampler: Sampler
    discipline: Discipline
    turns: Turns
    breaks: int = 0
    missed: int = 0


class Follower:
    """Follows a reference of the host for one clock, as often as tick() is called."""

    def __init__(self, keeper: Timekeeper) -> None:
        self.reference = OFF
        """What is followed: "off", a Reference or "injected"."""
        self.steering: Steering | None = None
        """What the last tick found and did; None before the first, and while nothing is followed."""
        self.max_ppm: float = MAX_PPM
        self.panic_ns: int | None = None
        self._keeper = keeper
        self._following: Following | None = None
        self._asleep_ns = 0  # what the reference has that the host's TSC has not, since it is followed

    def follow(
        self, reference: Reference | str | SampleSource, *, max_ppm: float = MAX_PPM, panic_ns: int | None = None
    ) -> None:
        """See GuestClock.follow()."""
        name, source = source_of(reference, self._keeper.backend)
        with self._keeper.changing:
            known = self._following.discipline.holdover if self._following else Fraction(0)
            discipline = Discipline(self._keeper.backend.tsc_hz, max_ppm, known, panic_ns)
            following = Following(Sampler(source), discipline, Turns()) if source else None

            def take() -> None:
                self._following, self.reference, self.steering, self._asleep_ns = following, name, None, 0
                self.max_ppm, self.panic_ns = max_ppm, panic_ns

            frequency_adjustment = following.discipline.holdover if following else Fraction(0)
            self._correct(frequency_adjustment, f"follow({name})", (), take)

    def tick(self, examine: Callable[[], object | None], refresh: Callable[[], object]) -> Steering | None:
        """See GuestClock.tick().

        examine: looks at the host first; None if this CPU's TSC is no good.  refresh: republishes where the rate stays.
        """
        following = self._following
        if following is None:
            return self._take_tick(examine, refresh, None, None)
        with following.turns.take() as is_mine:
            if not is_mine:  # another tick is at its sample, maybe for long, and will bring it
                return self._take_tick(examine, refresh, None, None)
            try:
                sample = following.sampler.sample()
            except Exception as failure:
                self._take_tick(examine, refresh, following, failure)
                raise
            return self._take_tick(examine, refresh, following, sample)

    def holdover(self, terms: RateTerms) -> RateTerms:
        """`terms` at the rate that is known: a pause does not count at one that works an error off."""
        return terms._replace(frequency_adjustment=self._following.discipline.holdover) if self._following else terms

    def renumbered(self, before: HostTsc, after: HostTsc) -> Following | None:
        """What is followed once the host's TSC has stepped: what would have been `before` is `after`."""
        if self._following is None:
            return None
        discipline = self._following.discipline.copy()
        discipline.renumber(before, after)
        return self._following._replace(discipline=discipline, breaks=self._following.breaks + 1)

    def take(self, following: Following | None) -> None:
        """Follow in that state from now on."""
        self._following = following

    def leave_out_sleep(self, ns: int, *, tsc_counted_on: bool) -> Callable[[], None]:
        """What leaves a sleep of the host out of what is followed: a policy settles it, it is no error of guest time.

        UTC counts a sleep and the other clocks do not; a source of the caller's is left to the caller.  What is
        returned may be called twice.
        """
        if self._following is None:
            return nothing
        following = self._following._replace(breaks=self._following.breaks + 1)
        counted = (self.reference == Reference.REALTIME) - tsc_counted_on if self.reference != INJECTED else 0
        asleep_ns = self._asleep_ns + ns * counted

        def take() -> None:
            self._following, self._asleep_ns = following, asleep_ns

        return take

    # Inside

    def _take_tick(
        self,
        examine: Callable[[], object | None],
        refresh: Callable[[], object],
        sampled: Following | None,
        sample: Sample | Exception | None,
    ) -> Steering | None:
        """Publish, corrected by what the sample says; without one, but for what failed, at the rate that is known."""
        keeper = self._keeper
        with keeper.changing:
            breaks = self._following.breaks if self._following else 0
            if examine() is None:
                return self.steering
            published, following = False, self._following
            if following is not None and sampled is not None and following.sampler is sampled.sampler:
                if isinstance(sample, Sample) and following.breaks == breaks:
                    published = self._steer(following, sample._replace(ns=sample.ns - self._asleep_ns))
                else:  # after a break nobody knows on which side of it the sample is
                    published = self._coast(following, sample if isinstance(sample, Exception) else None)
            if keeper.timeline.is_slewing or not published:
                refresh()
            return self.steering

    def _steer(self, following: Following, sample: Sample) -> bool:
        """Apply the frequency adjustment that a sample calls for; returns True if pages were published."""
        discipline = following.discipline.copy()
        found = discipline.steer(sample, self._keeper.timeline.host_at(sample.tsc))
        why = _described(self.reference, found)

        def take() -> None:
            self._following, self.steering = following._replace(discipline=discipline, missed=0), found

        return self._correct(found.frequency_adjustment, why, self._panic(found, why), take)

    def _coast(self, following: Following, failure: Exception | None) -> bool:
        """Keep the rate for want of a sample, and say so if that goes on; returns if pages were published."""
        missed = following.missed + 1
        found = self.steering
        if missed >= HOLDOVER_MISSES:
            tsc = self._keeper.host_tsc()
            found = following.discipline.coast(tsc, self._keeper.timeline.host_at(tsc))
        why = f"no sample of {self.reference}" + _failed(failure)

        def take() -> None:
            self._following, self.steering = following._replace(missed=missed), found

        return self._correct(following.discipline.holdover, why, self._missing(missed, failure, why), take)

    def _missing(self, missed: int, failure: Exception | None, why: str) -> tuple[Event, ...]:
        """Holdover is an event, once.  A value that is no sample is one at once: its source may never see the error."""
        if missed == HOLDOVER_MISSES:
            why = f"{why}, {missed} ticks in a row: the clock keeps its rate"
        elif missed > 1 or not isinstance(failure, WrongType | RangeError):
            return ()
        return (self._keeper.event(EventKind.REFUSED, why, self._keeper.backend.stamps()),)

    def _panic(self, found: Steering, why: str) -> tuple[Event, ...]:
        """A reference beyond the panic threshold is an event, once."""
        if found.state is not SteeringState.PANIC or (self.steering and self.steering.state is SteeringState.PANIC):
            return ()
        told = f"{why}: beyond the panic threshold of {self.panic_ns} ns"
        return (self._keeper.event(EventKind.REFUSED, told, self._keeper.backend.stamps()),)

    def _correct(
        self, frequency_adjustment: Fraction, why: str, events: tuple[Event, ...], taking: Callable[[], object]
    ) -> bool:
        """Apply that frequency adjustment; returns True if it is a new one, so that pages were published."""
        keeper = self._keeper
        terms = keeper.timeline.terms._replace(frequency_adjustment=frequency_adjustment)
        if terms == keeper.timeline.terms:
            keeper.record(events, taking)
            return False
        keeper.change_rate(terms, keeper.backend.stamps(), EventKind.RATE, why, events=events, taking=taking)
        return True


def source_of(reference: Reference | str | SampleSource, backend: Backend) -> tuple[str, SampleSource | None]:
    """The reference's name and its samples, none for OFF; ConfigError for what cannot be followed."""
    if reference == OFF:
        return OFF, None
    if not isinstance(reference, str) and not callable(reference):
        raise WrongType("reference", reference, f"{OFF}, {', '.join(Reference)}, or a source of samples")
    if not backend.counter_follows_host:
        raise ConfigError(
            f"reference {_named(reference)}: time that passes only while the guest executes follows no clock"
        )
    if callable(reference) and not isinstance(reference, str):
        return INJECTED, reference
    if reference not in list(Reference):
        raise ConfigError(
            f"reference {quoted(reference)}; it can be {OFF}, {', '.join(Reference)}, or a source of samples"
        )
    return reference, partial(backend.sample, Reference(reference))


def _named(reference: str | SampleSource) -> str:
    return reference if isinstance(reference, str) else INJECTED


def _failed(failure: Exception | None) -> str:
    """What failed, for an event: errors of ours in words, others by their type, for their words may be any."""
    if failure is None:
        return ""
    return f": {failure}" if isinstance(failure, PvclockError) else f": {type(failure).__name__}"


def _described(reference: str, found: Steering) -> str:
    rate = f"{found.rate.value * 1e9:+.3f} ppb, within {found.rate.bound * 1e9:.3g}"
    return f"{reference}: {rate}; guests are {found.error_ns:.0f} ns behind; {found.state}"
