"""How long a guest was stopped, by what its VMM tells, and what its clock did meanwhile."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from math import ceil
from typing import Final, NamedTuple

from pvclock.meter.watch.changes import Step
from pvclock.meter.watch.lines import ns_per_tick
from pvclock.meter.watch.vm import VmEvent, VmEventKind

__all__ = ["Pauses", "Stopped", "with_seen"]

UTC_BOUND_NS: Final = 1000
"""A pause lies between two stamps of whole us."""

UTC_PPM: Final = 500
"""How far NTP slews UTC at most."""


class Stopped(NamedTuple):
    """What is known at a poll.

    ended_ns: the lengths of the pauses of which the end was told with this poll.  is_stopped: a STOP was told, and no
    RESUME since.  is_late: that STOP was told with an earlier poll, so that a line that is new now tells of a RESUME
    that is still on its way.
    """

    ended_ns: tuple[int, ...] = ()
    is_stopped: bool = False
    is_late: bool = False


class Pauses:
    """STOP and RESUME as they come in pairs."""

    def __init__(self) -> None:
        self._stop: VmEvent | None = None

    def take(self, events: Iterable[VmEvent]) -> Stopped:
        """Take what was told with a poll."""
        before, ended_ns = self._stop, []
        for event in events:
            if event.kind is VmEventKind.STOP:
                self._stop = self._stop or event
            elif event.kind is VmEventKind.RESUME and self._stop is not None:
                ended_ns.append(event.utc_ns - self._stop.utc_ns)
                self._stop = None
        return Stopped(tuple(ended_ns), self._stop is not None, self._stop is not None and self._stop is before)


def with_seen(step: Step, pauses_ns: tuple[int, ...], speed: Fraction | None) -> Step:
    """The step with what the guest saw of it, if as many pauses ended meanwhile as there are new lines.

    speed: guest seconds in a second of its host, by the line of before.
    """
    if step.step_ns is None or step.bound_ns is None or speed is None or len(pauses_ns) != step.lines or not pauses_ns:
        return step
    stopped_ns = sum(pauses_ns)
    bend_ns = ceil(abs(ns_per_tick(step.after) - ns_per_tick(step.before)) * (step.at - step.since))
    bound_ns = step.bound_ns + bend_ns + UTC_BOUND_NS * len(pauses_ns) + abs(stopped_ns) * UTC_PPM // 10**6 + 1
    return step._replace(seen_ns=step.step_ns + round(stopped_ns * speed), seen_bound_ns=bound_ns)
