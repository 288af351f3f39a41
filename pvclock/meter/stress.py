"""A clock under stress: its pages are republished as fast as wanted, at one rate after the other, while guests read.

What no correct clock shows is a reading that is backward, wild or torn, and a step at a publish beyond 0 or +1 ns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from fractions import Fraction
from typing import Final, NamedTuple

from pvclock.meter.guest import EngineGuest
from pvclock.meter.probe import failures
from pvclock.payloads.probe import ProbeRecord
from pvclock.readings import Churn

__all__ = ["STRESS_RATES", "THREAD_BURSTS", "VCPU_BURSTS", "Bursts", "PublishStress", "stress_publishing"]

STRESS_RATES: Final = [Fraction(n, d) for n, d in ((10, 1), (1, 10), (1, 1), (355, 113), (7, 3), (1, 3), (9, 8))]
"""Rates from 1/10 to 10/1, taken in turn."""

REST_S: Final = 0.001


class Bursts(NamedTuple):
    """How publishes come: in bursts of `publishes`, each cut after limit_s, and at most `per_second` over all."""

    publishes: int
    limit_s: float
    per_second: float


VCPU_BURSTS: Final = Bursts(1000, float("inf"), 150_000)
"""For vCPUs: between bursts they have the CPUs to themselves."""
THREAD_BURSTS: Final = Bursts(1 << 40, 0.05, float("inf"))
"""For threads of this process: they read while the interpreter waits for a burst's end."""


class PublishStress(NamedTuple):
    """What a stress did and its guest found; `publishing`: steps and errors at the break points."""

    seconds: float
    publishing: Churn
    records: list[ProbeRecord]

    @property
    def publishes_per_second(self) -> float:
        """Over the whole run, rests included."""
        return self.publishing.publishes / max(self.seconds, 1e-9)

    @property
    def reads(self) -> int:
        """Of all vCPUs."""
        return sum(record.reads for record in self.records)

    @property
    def failures(self) -> dict[str, int]:
        """Readings that no correct clock gives, by kind, over all vCPUs."""
        return failures(self.records)


def stress_publishing(
    guest: EngineGuest,
    seconds: float,
    rates: list[Fraction] = STRESS_RATES,
    bursts: Bursts = VCPU_BURSTS,
    progress: Callable[[PublishStress], None] = lambda _: None,
) -> PublishStress:
    """Start `guest`, republish its pages at `rates` in turn for `seconds` while it reads, and end it.

    progress: is called after each burst with the result so far.
    """
    clock = guest.engine_clock

    def publish() -> Churn:
        return clock.churn(bursts.publishes, rates, seconds=bursts.limit_s)

    guest.start()
    begin = time.monotonic()
    so_far = PublishStress(0.0, publish(), [])
    while so_far.seconds < seconds:
        if so_far.publishes_per_second > bursts.per_second:
            time.sleep(REST_S)
        publishing = so_far.publishing.plus(publish())
        so_far = PublishStress(time.monotonic() - begin, publishing, guest.records())
        progress(so_far)
    return so_far._replace(records=guest.finish())
