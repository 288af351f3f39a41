"""A published timeline that follows a clock of its host: by its rate alone, tick by tick, and never by a step."""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from typing import Final

from pvclock._core import GuestMemory
from pvclock.backend import Backend
from pvclock.discipline import MAX_PPM, Discipline, Steering
from pvclock.errors import ConfigError
from pvclock.events import EventKind
from pvclock.published import PublishedTimeline
from pvclock.readings import Reference
from pvclock.sampling import Sampler, SampleSource

__all__ = ["INJECTED", "OFF", "DisciplinedTimeline"]

OFF: Final = "off"
"""No reference: the TSC at its nominal rate, bit-equal to Linux."""

INJECTED: Final = "injected"
"""A source of samples of the caller's."""


class DisciplinedTimeline(PublishedTimeline):
    """The time of one VM, which can follow() a reference of the host, as often as tick() is called."""

    def __init__(self, memory: GuestMemory, vcpus: int, backend: Backend) -> None:
        super().__init__(memory, vcpus, backend)
        self.reference = OFF
        """What is followed: "off", a Reference or "injected"."""
        self.steering: Steering | None = None
        """What the last tick found and did; None before the first, and while nothing is followed."""
        self._sampler: Sampler | None = None
        self._discipline: Discipline | None = None

    def follow(self, reference: Reference | str | SampleSource, *, max_ppm: float = MAX_PPM) -> None:
        """From now on let guest time keep step with a reference, as far as tick() is called; "off" ends that.

        A guest second is then a second of the reference, times the dilation.  Guest time is taken as right now, and is
        never stepped: a reference that is set is slewed after, its own rate included within max_ppm of nominal.  A
        callable gives samples of the caller's.  ConfigError for any other reference; RangeError for max_ppm.
        """
        name, source = _source(reference, self.backend)
        with self._changing():
            correction = self._timeline.tempo.correction if source else Fraction(0)
            discipline = Discipline(self.backend.tsc_hz, max_ppm, correction) if source else None
            self._correct(correction, f"follow({name})")
            self._sampler = Sampler(source) if source else None
            self._discipline, self.reference, self.steering = discipline, name, None

    def tick(self) -> Steering | None:
        """Look at the reference, correct the rate if there is reason to, and republish: call it every second or so.

        At least every MAX_AGE_S, as refresh(), which it includes.  Returns what was found, None without a reference.
        Errors of an injected source come out, with nothing changed.
        """
        with self._changing():
            published = False
            if self._sampler is not None and self._discipline is not None:
                sample = self._sampler.sample()
                self.steering = self._discipline.steer(sample, self._timeline.host_at(sample.tsc))
                published = self._correct(self.steering.correction, _described(self.reference, self.steering))
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
    if callable(reference) and not isinstance(reference, str):
        return INJECTED, reference
    if reference == OFF:
        return OFF, None
    if reference not in list(Reference):
        raise ConfigError(f"reference {reference!r}; it can be {OFF}, {', '.join(Reference)}, or a source of samples")
    return reference, partial(backend.sample, Reference(reference))


def _described(reference: str, found: Steering) -> str:
    rate = f"{found.rate.value * 1e9:+.3f} ppb, within {found.rate.bound * 1e9:.3g}"
    return f"{reference}: {rate}; guests are {found.error_ns:.0f} ns behind; {found.state}"
