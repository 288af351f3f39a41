"""A timeline that follows a clock of its host: by its rate alone, tick by tick, and never by a step."""

from __future__ import annotations

import threading
from fractions import Fraction
from functools import partial
from typing import Final, NamedTuple

from pvclock._memory import GuestMemory
from pvclock.backend import Backend
from pvclock.controlled import ControlledTimeline
from pvclock.discipline import MAX_PPM, Discipline, Steering
from pvclock.errors import ConfigError
from pvclock.events import EventKind
from pvclock.readings import Reference, Sample
from pvclock.sampling import Sampler, SampleSource

__all__ = ["INJECTED", "OFF", "DisciplinedTimeline"]

OFF: Final = "off"
"""No reference: the TSC at its nominal rate, bit-equal to Linux."""

INJECTED: Final = "injected"
"""A source of samples of the caller's."""


class Following(NamedTuple):
    """What is followed, and how."""

    sampler: Sampler
    discipline: Discipline


class DisciplinedTimeline(ControlledTimeline):
    """The time of one VM, which can follow() a reference of the host, as often as tick() is called."""

    def __init__(self, memory: GuestMemory, vcpus: int, backend: Backend) -> None:
        super().__init__(memory, vcpus, backend)
        self.reference = OFF
        """What is followed: "off", a Reference or "injected"."""
        self.steering: Steering | None = None
        """What the last tick found and did; None before the first, and while nothing is followed."""
        self._following: Following | None = None
        self._ticking = threading.RLock()  # taken before the clock's own: samples come in order, and may take a while

    def follow(self, reference: Reference | str | SampleSource, *, max_ppm: float = MAX_PPM) -> None:
        """From now on let guest time keep step with a reference, as far as tick() is called; "off" ends that.

        A guest second is then a second of the reference, times the dilation.  Guest time is taken as right at the first
        tick, and is never stepped: a reference that is set is slewed after, its own rate included within max_ppm of
        nominal.  A callable gives samples of the caller's, whose TSCs rise.  ConfigError for any other reference, or
        where time passes only while the guest executes; RangeError for max_ppm.
        """
        name, source = _source(reference, self.backend)
        with self._changing():
            known = self._following.discipline.held if self._following else Fraction(0)
            following = Following(Sampler(source), Discipline(self.backend.tsc_hz, max_ppm, known)) if source else None
            self._correct(following.discipline.held if following else Fraction(0), f"follow({name})")
            self._following, self.reference, self.steering = following, name, None

    def tick(self) -> Steering | None:
        """Look at the reference, correct the rate if there is reason to, and republish: call it every second or so.

        At least every MAX_AGE_S of guest time, as refresh(), which it includes.  Returns what was found, None without a
        reference.  What an injected source raises comes out; the clock has kept its rate then, and is republished.
        """
        with self._ticking:
            following = self._following
            try:
                sample = following.sampler.sample() if following else None
            except Exception:
                self._take_tick(following, None)
                raise
            return self._take_tick(following, sample)

    def pause(self) -> None:
        """See ControlledTimeline: an error that is being worked off waits, lest the pause be counted at that rate."""
        with self._changing():
            if self._following and not self.is_paused:
                self._correct(self._following.discipline.held, "pause()")
            super().pause()

    def _take_tick(self, following: Following | None, sample: Sample | None) -> Steering | None:
        """Publish, corrected by what the sample says; without one, at the rate that is known."""
        with self._changing():
            published = False
            if following is not None and following is self._following:
                correction, why = following.discipline.held, f"no sample of {self.reference}"
                if sample is not None:
                    self.steering = following.discipline.steer(sample, self._timeline.host_at(sample.tsc))
                    correction, why = self.steering.correction, _described(self.reference, self.steering)
                published = self._correct(correction, why)
            if self._timeline.is_slewing or not published:
                self.refresh()
            return self.steering

    def _correct(self, correction: Fraction, why: str) -> bool:
        """Have that correction from now on; returns if it is another one, so that pages were published."""
        tempo = self._timeline.tempo._replace(correction=correction)
        if tempo == self._timeline.tempo:
            return False
        self._turn(tempo, EventKind.RATE, why)
        return True


def _source(reference: Reference | str | SampleSource, backend: Backend) -> tuple[str, SampleSource | None]:
    """The reference's name and its samples; none for OFF."""
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
