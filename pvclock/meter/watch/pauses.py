"""How long a guest was stopped, by what its VMM tells, and what its clock did meanwhile.

A VMM stamps its events by CLOCK_REALTIME, which may be slewed or set meanwhile.  Each stamp is taken for an instant of
the host's TSC by the polls around it, which know both; so what UTC did between STOP and RESUME does not matter.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import pairwise
from math import ceil
from typing import Final, NamedTuple

from pvclock.meter.watch.changes import Step, TscBasis
from pvclock.meter.watch.lines import ns_per_tick
from pvclock.meter.watch.poll import Poll
from pvclock.meter.watch.vm import VmEvent, VmEventKind
from pvclock.quantities import NS_PER_S

__all__ = ["Pause", "Pauses", "Stopped", "with_seen"]

STAMP_BOUND_NS: Final = 1000
"""A stamp is a whole us, cut off."""
POLLS_KEPT: Final = 256
"""An event is told some ms late, which may be many polls."""
SLEW_SHARE: Final = 8
"""UTC that gains or loses more than this part of the time that passes was set: adjtimex() slews by a tenth at most."""
DELAYS_NS: Final = 10_000_000
"""A clock that stood goes on by less from STOP to RESUME, or by less than half of the pause on a busy host."""


class Pause(NamedTuple):
    """How long a guest was stopped, by the host's TSC; bound_ns: None if that is known by the VMM's stamps only.

    resumed: the host's TSC at its end; None if unknown.
    """

    ns: int
    bound_ns: int | None
    resumed: int | None = None


class Stopped(NamedTuple):
    """What is known at a poll.

    ended: the pauses of which the end was told with this poll.  is_stopped: a STOP was told, and no RESUME since.
    is_late: that STOP was told with an earlier poll, so that a line that is new now tells of a RESUME that is still on
    its way.
    """

    ended: tuple[Pause, ...] = ()
    is_stopped: bool = False
    is_late: bool = False


class _Clocks(NamedTuple):
    """The host's clocks at one instant, in ns: its TSC, and UTC to bound_ns."""

    host_ns: int
    utc_ns: int
    bound_ns: int


class _Instant(NamedTuple):
    """An event, and when it was: ns of the host's TSC, true to bound_ns; None if that is unknown."""

    utc_ns: int
    host_ns: int | None = None
    bound_ns: int = 0


class Pauses:
    """STOP and RESUME as they come in pairs.  is_paused: was there a STOP already, of which nothing is known?"""

    def __init__(self, host_tsc_hz: int, *, is_paused: bool = False) -> None:
        self._host_tsc_hz = host_tsc_hz
        self._is_stopped = is_paused
        self._stop: _Instant | None = None
        self._clocks: deque[_Clocks] = deque(maxlen=POLLS_KEPT)

    def take(self, poll: Poll) -> Stopped:
        """Take what was told with a poll."""
        if poll.utc is not None:
            self._clocks.append(_Clocks(self._ns(poll.utc.tsc), poll.utc.ns, self._ns(poll.utc.width_ticks) + 1))
        before, ended = self._stop, []
        for event in poll.events:
            if event.kind is VmEventKind.STOP:
                self._stop, self._is_stopped = self._stop or self._instant(event), True
            elif event.kind is VmEventKind.RESUME:
                ended += [] if self._stop is None else [self._pause(self._stop, self._instant(event))]
                self._stop, self._is_stopped = None, False
        return Stopped(tuple(ended), self._is_stopped, self._stop is not None and self._stop is before)

    # Inside

    def _ns(self, ticks: int) -> int:
        return ticks * NS_PER_S // self._host_tsc_hz

    def _pause(self, stop: _Instant, resume: _Instant) -> Pause:
        if stop.host_ns is None or resume.host_ns is None:
            return Pause(resume.utc_ns - stop.utc_ns, None)
        bound_ns = stop.bound_ns + resume.bound_ns + STAMP_BOUND_NS
        return Pause(resume.host_ns - stop.host_ns, bound_ns, resume.host_ns * self._host_tsc_hz // NS_PER_S)

    def _instant(self, event: VmEvent) -> _Instant:
        """By UTC at the polls before and after it; of more than one pair of them, if UTC was set back."""
        utc_ns = event.utc_ns
        spans = [span for pair in pairwise(self._clocks) if (span := _span(*pair, utc_ns)) is not None]
        if not spans:
            return _Instant(utc_ns)
        early, late = min(span[0] for span in spans), max(span[1] for span in spans)
        return _Instant(utc_ns, (early + late) // 2, (late - early) // 2 + 1 + max(span[2] for span in spans))


def _span(before: _Clocks, after: _Clocks, utc_ns: int) -> tuple[int, int, int] | None:
    """(earliest, latest, bound) of a stamp between two polls, in ns of the host's TSC; None if it is not of then.

    The polls differ by what UTC did between, if it was slewed one way.  If it was set, that may have been at any
    instant; it had all values soon after the first poll's, and soon before the second's.
    """
    passed_ns, bound_ns = after.host_ns - before.host_ns, max(before.bound_ns, after.bound_ns)
    slewed_ns = passed_ns // SLEW_SHARE + before.bound_ns + after.bound_ns
    if abs(after.utc_ns - before.utc_ns - passed_ns) > slewed_ns:
        reach_ns = passed_ns + slewed_ns + STAMP_BOUND_NS
        is_near = -STAMP_BOUND_NS < utc_ns - before.utc_ns < reach_ns or 0 <= after.utc_ns - utc_ns < reach_ns
        return (before.host_ns, after.host_ns, bound_ns) if is_near else None
    if not before.utc_ns - STAMP_BOUND_NS < utc_ns <= after.utc_ns:
        return None
    instants = [clocks.host_ns + utc_ns - clocks.utc_ns for clocks in (before, after)]
    return min(instants), max(instants), bound_ns


def with_seen(step: Step, pauses: Sequence[Pause], speed: Fraction | None) -> Step:
    """The step with what the guest saw of it, if as many pauses ended meanwhile as there are new lines.

    speed: guest seconds in a nominal second of its host, by the line of before.  A clock that stood, and seems to have
    gone on or back meanwhile, is that of a guest whose TSC was changed, too: QEMU tells no more of a `loadvm`.
    """
    if step.step_ns is None or step.bound_ns is None:
        return step
    pauses = max(pauses, _by_stamps(step.events), key=len)  # those of which a late vCPU took no line count, too
    stopped_ns = sum(pause.ns for pause in pauses)
    seen_ns = step.step_ns + round(stopped_ns * (speed or 1))
    # A late vCPU took its line some time after the RESUME, and two lines of different rates had come apart by then.
    since = min([step.since, *(pause.resumed for pause in pauses if pause.resumed is not None)])
    bend_ns = ceil(abs(ns_per_tick(step.after) - ns_per_tick(step.before)) * (step.at - since))
    bound_ns = step.bound_ns + bend_ns + sum(pause.bound_ns or 0 for pause in pauses) + 1
    is_likely = abs(seen_ns) <= max(DELAYS_NS, abs(stopped_ns) // 2) + bound_ns
    if stopped_ns and step.basis is TscBasis.ASSUMED and not is_likely:
        return step._replace(basis=TscBasis.CHANGED, step_ns=None, bound_ns=None)
    if speed is None or not pauses or len(pauses) != step.lines or any(pause.bound_ns is None for pause in pauses):
        return step
    return step._replace(seen_ns=seen_ns, seen_bound_ns=bound_ns)


def _by_stamps(events: Iterable[VmEvent]) -> list[Pause]:
    told = [event for event in events if event.kind in {VmEventKind.STOP, VmEventKind.RESUME}]
    return [
        Pause(after.utc_ns - before.utc_ns, None)
        for before, after in pairwise(told)
        if (before.kind, after.kind) == (VmEventKind.STOP, VmEventKind.RESUME)
    ]
