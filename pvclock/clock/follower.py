"""Follows a reference clock of the host: each tick corrects the rate of guest time, and never steps it."""

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
"""The reference is a caller's own source of samples."""

HOLDOVER_MISSES: Final = 3
"""Ticks in a row without a sample after which the clock is in holdover."""


class Following(NamedTuple):
    """The reference followed and the discipline's state; replaced as a whole.

    turns: admits one sampler at a time, since samples must come in order and may block.  breaks: counts TSC steps and
    host sleeps.  missed: ticks in a row without a sample.
    """

    sampler: Sampler
    discipline: Discipline
    turns: Turns
    breaks: int = 0
    missed: int = 0


class Follower:
    """Disciplines one clock's rate to a reference, once per tick()."""

    def __init__(self, keeper: Timekeeper) -> None:
        self.reference = OFF
        """The reference: "off", a Reference or "injected"."""
        self.steering: Steering | None = None
        """The last tick's result; None before the first, and without a reference."""
        self.max_ppm: float = MAX_PPM
        self.panic_ns: int | None = None
        self._keeper = keeper
        self._following: Following | None = None
        self._asleep_ns = 0  # sleep that the reference counted and the TSC did not, since follow()

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

        examine: checks the host first; returns None if this CPU's TSC is behind.  refresh: republishes if the rate
        stays.
        """
        following = self._following
        if following is None:
            return self._take_tick(examine, refresh, None, None)
        with following.turns.take() as is_mine:
            if not is_mine:  # another thread is taking the sample, which may block
                return self._take_tick(examine, refresh, None, None)
            try:
                sample = following.sampler.sample()
            except Exception as failure:
                self._take_tick(examine, refresh, following, failure)
                raise
            return self._take_tick(examine, refresh, following, sample)

    def holdover(self, terms: RateTerms) -> RateTerms:
        """`terms` at the known rate: a pause must not be reckoned at a rate that corrects an error."""
        return terms._replace(frequency_adjustment=self._following.discipline.holdover) if self._following else terms

    def plan_renumbering(self, before: HostTsc, after: HostTsc) -> Following | None:
        """The state to take() once a host TSC step has turned `before` into `after`; None if nothing is followed."""
        if self._following is None:
            return None
        discipline = self._following.discipline.copy()
        discipline.renumber(before, after)
        return self._following._replace(discipline=discipline, breaks=self._following.breaks + 1)

    def take(self, following: Following | None) -> None:
        """Set the state."""
        self._following = following

    def leave_out_sleep(self, ns: int, *, tsc_counted_on: bool) -> Callable[[], None]:
        """Return an idempotent callable that removes a host sleep of `ns` from the reference.

        The sleep policy handles a sleep: it is not an error of guest time.  UTC counts it and the other clocks do not;
        a caller's own source is the caller's business.
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
        """Publish at the rate that `sample` calls for; at the known rate if it is None or an error."""
        keeper = self._keeper
        with keeper.changing:
            if examine() is None:
                return self.steering
            published, following = False, self._following
            if following is not None and sampled is not None and following.sampler is sampled.sampler:
                if isinstance(sample, Sample) and following.breaks == sampled.breaks:
                    published = self._steer(following, sample._replace(ns=sample.ns - self._asleep_ns))
                else:  # the sample may be from either side of a break
                    published = self._coast(following, sample if isinstance(sample, Exception) else None)
            if keeper.timeline.is_slewing or not published:
                refresh()
            return self.steering

    def _steer(self, following: Following, sample: Sample) -> bool:
        """Apply the frequency adjustment that a sample calls for; returns True if pages were published."""
        discipline = following.discipline.copy()
        found = discipline.steer(sample, self._keeper.timeline.host_at(sample.tsc))
        why = _describe(self.reference, found)

        def take() -> None:
            self._following, self.steering = following._replace(discipline=discipline, missed=0), found

        return self._correct(found.frequency_adjustment, why, self._panic_events(found, why), take)

    def _coast(self, following: Following, failure: Exception | None) -> bool:
        """Keep the known rate for want of a sample; returns True if pages were published."""
        missed = following.missed + 1
        found = self.steering
        if missed >= HOLDOVER_MISSES:
            tsc = self._keeper.host_tsc()
            found = following.discipline.coast(tsc, self._keeper.timeline.host_at(tsc))
        why = f"no sample of {self.reference}" + _describe_failure(failure)

        def take() -> None:
            self._following, self.steering = following._replace(missed=missed), found

        return self._correct(following.discipline.holdover, why, self._holdover_events(missed, failure, why), take)

    def _holdover_events(self, missed: int, failure: Exception | None, why: str) -> tuple[Event, ...]:
        """The event that holdover began.  An invalid sample is an event at once: its source may never see the error."""
        if missed == HOLDOVER_MISSES:
            why = f"{why}, {missed} ticks in a row: the clock keeps its rate"
        elif missed > 1 or not isinstance(failure, WrongType | RangeError):
            return ()
        return (self._keeper.event(EventKind.REFUSED, why, self._keeper.backend.stamps()),)

    def _panic_events(self, found: Steering, why: str) -> tuple[Event, ...]:
        """The event that the reference went beyond the panic threshold; recorded once."""
        if found.state is not SteeringState.PANIC or (self.steering and self.steering.state is SteeringState.PANIC):
            return ()
        why = f"{why}: beyond the panic threshold of {self.panic_ns} ns"
        return (self._keeper.event(EventKind.REFUSED, why, self._keeper.backend.stamps()),)

    def _correct(
        self, frequency_adjustment: Fraction, why: str, events: tuple[Event, ...], on_commit: Callable[[], object]
    ) -> bool:
        """Apply the frequency adjustment; returns True if it changed, so that pages were published."""
        keeper = self._keeper
        terms = keeper.timeline.terms._replace(frequency_adjustment=frequency_adjustment)
        if terms == keeper.timeline.terms:
            keeper.record(events, on_commit)
            return False
        keeper.change_rate(terms, keeper.backend.stamps(), EventKind.RATE, why, events=events, on_commit=on_commit)
        return True


def source_of(reference: Reference | str | SampleSource, backend: Backend) -> tuple[str, SampleSource | None]:
    """The reference's name and its source of samples, None for OFF; ConfigError if it cannot be followed."""
    if reference == OFF:
        return OFF, None
    if not isinstance(reference, str) and not callable(reference):
        raise WrongType("reference", reference, f"{OFF}, {', '.join(Reference)}, or a source of samples")
    if not backend.counter_follows_host:
        raise ConfigError(
            f"reference {_name_of(reference)}: time that passes only while the guest executes follows no clock"
        )
    if callable(reference) and not isinstance(reference, str):
        return INJECTED, reference
    if reference not in list(Reference):
        raise ConfigError(
            f"reference {quoted(reference)}; it can be {OFF}, {', '.join(Reference)}, or a source of samples"
        )
    return reference, partial(backend.sample, Reference(reference))


def _name_of(reference: str | SampleSource) -> str:
    return reference if isinstance(reference, str) else INJECTED


def _describe_failure(failure: Exception | None) -> str:
    """The failure, for an event: the message of an error of ours, else the type: foreign messages are unbounded."""
    if failure is None:
        return ""
    return f": {failure}" if isinstance(failure, PvclockError) else f": {type(failure).__name__}"


def _describe(reference: str, found: Steering) -> str:
    rate = f"{found.rate.value * 1e9:+.3f} ppb, within {found.rate.bound * 1e9:.3g}"
    return f"{reference}: {rate}; guests are {found.error_ns:.0f} ns behind; {found.state}"
