"""A clock under stress: its pages are republished as fast as wanted, at one rate after the other, while guests read.

What no correct clock shows is a reading that is backward, wild or torn, and a step at a publish beyond 0 or +1 ns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Final, NamedTuple

from pvclock._stress import republish_in_turn
from pvclock.arguments import fraction, instance, number, sequence, whole
from pvclock.clock.guest_clock import GuestClock
from pvclock.clock.timekeeper import TimeState
from pvclock.errors import StateError
from pvclock.meter.findings import failures
from pvclock.meter.guest import EngineGuest
from pvclock.payloads.probe import ProbeRecord
from pvclock.readings import ClockLine
from pvclock.timekeeping.events import Event

__all__ = [
    "STRESS_RATES",
    "THREAD_BURSTS",
    "VCPU_BURSTS",
    "Bursts",
    "PublishStress",
    "RepublishReport",
    "republish",
    "stress_publishing",
]

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


class RepublishReport(NamedTuple):
    """What many publishes did, seen at each break point.

    Steps are new line minus old line (ns, 0 or 1 by contract); `behind` and `ahead` are how far the new line was from
    the timeline (ns, whole).
    """

    publishes: int
    least_step_ns: int
    most_step_ns: int
    most_behind_ns: int
    most_ahead_ns: int

    def plus(self, later: RepublishReport) -> RepublishReport:
        """The report of both runs."""
        instance("later", later, RepublishReport)
        return RepublishReport(
            self.publishes + later.publishes,
            min(self.least_step_ns, later.least_step_ns),
            max(self.most_step_ns, later.most_step_ns),
            max(self.most_behind_ns, later.most_behind_ns),
            max(self.most_ahead_ns, later.most_ahead_ns),
        )


def republish(
    clock: GuestClock, publishes: int, dilations: list[Fraction], *, seconds: float = float("inf")
) -> RepublishReport:
    """Publish the clock's pages `publishes` times, or for `seconds`, as fast as it goes, taking `dilations` in turn.

    At least once; the last rate used stays, and no event says so.  A simulated counter stands still meanwhile, so
    `seconds` do not pass on it.  StateError while guest time stands still or is being slewed.
    """
    instance("clock", clock, GuestClock)
    keeper, host = clock._parts.keeper, clock._parts.host  # noqa: SLF001  # no operation of a clock is for stress
    publishes, dilations = whole("publishes", publishes), _checked(dilations)
    max_ticks = int(min(number("seconds", seconds) * keeper.backend.tsc_hz, 2**63 - 1))
    with keeper.changing:
        timeline = keeper.timeline
        all_terms = [timeline.terms._replace(dilation=dilation) for dilation in dilations]
        rates = [(*timeline.ns_per_tick(terms.rate), timeline.scale(terms.rate)) for terms in all_terms]
        if keeper.is_paused or timeline.is_slewing:
            raise StateError("republish", "guest time stands still or is being slewed", "let it run at its rate first")
        host.require("republish")
        keeper.republish()
        reports: list[RepublishReport] = []

        def change(done: tuple[ClockLine, tuple[int, int, int, int, int]]) -> tuple[TimeState, tuple[Event, ...]]:
            line, totals = done
            report = RepublishReport(*totals)
            last = (report.publishes - 1) % len(rates)
            carried = timeline.copy()
            carried.resume_from(line, all_terms[last])
            reports.append(report)
            return TimeState(carried, line, rates[last][2]), ()

        publish = partial(republish_in_turn, keeper.pages, keeper.state.line, rates, publishes, max_ticks)
        keeper.publish_while_vcpus_run(None, partial(keeper.commit, publish, change))
    return reports[-1]


class PublishStress(NamedTuple):
    """What a stress did and its guest found; `publishing`: steps and errors at the break points."""

    seconds: float
    publishing: RepublishReport
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

    def publish() -> RepublishReport:
        return republish(clock, bursts.publishes, rates, seconds=bursts.limit_s)

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


def _checked(dilations: list[Fraction]) -> list[Fraction]:
    found = sequence("dilations", dilations, "a list of fractions")
    return [fraction(f"dilations[{place}]", dilation) for place, dilation in enumerate(found)]
