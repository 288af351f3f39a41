"""Guest time that follows a clock of its host: by its rate alone, tick by tick, and never by a step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Final, NamedTuple

from pvclock.backend import Backend
from pvclock.clock.timekeeper import Timekeeper
from pvclock.discipline import MAX_PPM, Discipline, Steering, SteeringState
from pvclock.errors import ConfigError
from pvclock.events import EventKind
from pvclock.quantities import HostTsc
from pvclock.readings import Reference, Sample
from pvclock.sampling import Sampler, SampleSource

__all__ = ["INJECTED", "OFF", "Follower", "source_of"]

OFF: Final = "off"
"""No reference: the TSC at its nominal rate, bit-equal to Linux."""

INJECTED: Final = "injected"
"""A source of samples of the caller's."""


class Following(NamedTuple):
    """What is followed, and how."""

    sampler: Sampler
    discipline: Discipline


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
        self._breaks = 0  # of the host's time, by a step of its TSC or a sleep
        self._asleep_ns = 0  # what the reference has that the host's TSC has not, since it is followed
        self._ticking = threading.RLock()  # taken before the clock's own: samples come in order, and may take a while

    def follow(
        self, reference: Reference | str | SampleSource, *, max_ppm: float = MAX_PPM, panic_ns: int | None = None
    ) -> None:
        """See GuestClock.follow()."""
        name, source = source_of(reference, self._keeper.backend)
        with self._keeper.changing:
            known = self._following.discipline.held if self._following else Fraction(0)
            following = None
            if source:
                discipline = Discipline(self._keeper.backend.tsc_hz, max_ppm, known, panic_ns)
                following = Following(Sampler(source), discipline)
            self._correct(following.discipline.held if following else Fraction(0), f"follow({name})")
            self._following, self.reference, self.steering, self._asleep_ns = following, name, None, 0
            self.max_ppm, self.panic_ns = max_ppm, panic_ns

    def tick(self, examine: Callable[[], object | None], refresh: Callable[[], object]) -> Steering | None:
        """See GuestClock.tick().

        examine: looks at the host first; None if this CPU's TSC is no good.  refresh: republishes where the rate stays.
        """
        with self._ticking:
            following = self._following
            try:
                sample = following.sampler.sample() if following else None
            except Exception:
                self._take_tick(examine, refresh, following, None)
                raise
            return self._take_tick(examine, refresh, following, sample)

    def hold(self) -> None:
        """Keep to the rate that is known: an error that is being worked off waits, else a pause counts at that rate."""
        if self._following and not self._keeper.is_paused:
            self._correct(self._following.discipline.held, "pause()")

    def renumber(self, before: HostTsc, after: HostTsc) -> None:
        """The host's TSC stepped: what would have been `before` is `after`."""
        self._breaks += 1
        if self._following:
            self._following.discipline.renumber(before, after)

    def leave_out_sleep(self, ns: int, *, tsc_counted_on: bool) -> None:
        """The host slept: that is for a policy to settle, and no error of guest time.

        UTC counts a sleep and the other clocks do not; a source of the caller's is left to the caller.
        """
        self._breaks += 1
        if self.reference != INJECTED:
            self._asleep_ns += ns * ((self.reference == Reference.REALTIME) - tsc_counted_on)

    def _take_tick(
        self,
        examine: Callable[[], object | None],
        refresh: Callable[[], object],
        following: Following | None,
        sample: Sample | None,
    ) -> Steering | None:
        """Publish, corrected by what the sample says; without one, at the rate that is known."""
        keeper = self._keeper
        with keeper.changing:
            breaks = self._breaks
            if examine() is None:
                return self.steering
            if self._breaks != breaks:
                sample = None  # nobody knows on which side of it the sample was taken
            published = False
            if following is not None and following is self._following:
                correction, why = following.discipline.held, f"no sample of {self.reference}"
                if sample is not None:
                    sample = sample._replace(ns=sample.ns - self._asleep_ns)
                    before = self.steering
                    self.steering = following.discipline.steer(sample, keeper.timeline.host_at(sample.tsc))
                    correction, why = self.steering.correction, _described(self.reference, self.steering)
                    self._tell_panic(before, why)
                published = self._correct(correction, why)
            if keeper.timeline.is_slewing or not published:
                refresh()
            return self.steering

    def _tell_panic(self, before: Steering | None, why: str) -> None:
        """A reference beyond the panic threshold is an event, once."""
        if self.steering is None or self.steering.state is not SteeringState.PANIC:
            return
        if before is None or before.state is not SteeringState.PANIC:
            self._keeper.tell(EventKind.REFUSED, f"{why}: beyond the panic threshold of {self.panic_ns} ns")

    def _correct(self, correction: Fraction, why: str) -> bool:
        """Have that correction from now on; returns if it is another one, so that pages were published."""
        keeper = self._keeper
        tempo = keeper.timeline.tempo._replace(correction=correction)
        if tempo == keeper.timeline.tempo:
            return False
        keeper.change_rate(tempo, keeper.backend.stamps(), EventKind.RATE, why)
        return True


def source_of(reference: Reference | str | SampleSource, backend: Backend) -> tuple[str, SampleSource | None]:
    """The reference's name and its samples, none for OFF; ConfigError for what cannot be followed."""
    if reference == OFF:
        return OFF, None
    if not backend.is_slaved:
        raise ConfigError(f"reference {reference!r}: time that passes only while the guest executes follows no clock")
    if callable(reference) and not isinstance(reference, str):
        return INJECTED, reference
    if reference not in list(Reference):
        raise ConfigError(f"reference {reference!r}; it can be {OFF}, {', '.join(Reference)}, or a source of samples")
    return reference, partial(backend.sample, Reference(reference))


def _described(reference: str, found: Steering) -> str:
    rate = f"{found.rate.value * 1e9:+.3f} ppb, within {found.rate.bound * 1e9:.3g}"
    return f"{reference}: {rate}; guests are {found.error_ns:.0f} ns behind; {found.state}"
