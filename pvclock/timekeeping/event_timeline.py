"""What was guest time at a host TSC, by a clock's events alone: the log of a VM that is gone, a file of JSON lines.

Each event that a clock records lies on its timeline, and says at what rate that goes on; so events that follow each
other without a gap are the timeline, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Final

from pvclock.arguments import instances, sequence, text, whole
from pvclock.errors import ConfigError, RangeError
from pvclock.quantities import NS_PER_S, HostTsc, signed64
from pvclock.timekeeping.events import Event, EventKind

__all__ = ["EventTimeline", "timeline_of"]

ROUNDING_NS: Final = Fraction(1, 2**900)
"""A clock's own timeline cuts its fractions at 2^-1024 ns, where it begins a segment that is no event."""


class EventTimeline:
    """Guest time as `events` have it: those of one clock's log, in its order.

    ConfigError for events of no log, or of more than one.  Where the host's TSC was numbered anew (it went back, or the
    clock was restored) only what came after that can be asked for.  Where events are missing, guest time between those
    before and after is not known.  After the last one time goes on as that says, until an event that is not here.
    """

    def __init__(self, events: Sequence[Event]) -> None:
        found = tuple(instances("events", events, Event))
        for event in found:
            if event.host_tsc is None or event.tsc_hz is None:
                raise ConfigError(f"event {event.sequence} has no {'host_tsc' if event.host_tsc is None else 'tsc_hz'}")
        for earlier, later in pairwise(found):
            if later.sequence <= earlier.sequence:
                raise ConfigError(
                    f"event {later.sequence} after {earlier.sequence}; a log's events have rising numbers"
                )
        self._events = found[_last_numbering(found) :]

    def at(self, host_tsc: HostTsc) -> Fraction:
        """Guest time in ns at `host_tsc`, exactly; at a step, that after it.

        RangeError before the first event that can be asked for, and where events are missing.
        """
        tsc = HostTsc(whole("host_tsc", host_tsc))
        following: Event | None = None
        for event in reversed(self._events):
            if _ticks(event, tsc) >= 0:
                if following is not None and following.sequence != event.sequence + 1:
                    lost = f"events {event.sequence + 1} to {following.sequence - 1} are missing"
                    raise RangeError(
                        f"host TSC {tsc} is between events {event.sequence} and {following.sequence}; {lost}"
                    )
                return _goes_on(event, tsc)
            following = event
        raise RangeError(f"host TSC {tsc} is before the first event of these that names it")


def timeline_of(lines: str | Sequence[str]) -> EventTimeline:
    """The timeline in JSON lines: a text of them, as EventLog.json_lines() writes, or one by one.

    ConfigError for what is no event, and as EventTimeline has it.
    """
    each = lines.splitlines() if isinstance(lines, str) else sequence("lines", lines, "JSON lines")
    return EventTimeline([Event.from_json(text("lines", line)) for line in each])


def _ticks(event: Event, tsc: HostTsc) -> int:
    assert event.host_tsc is not None  # noqa: S101  # as EventTimeline has it
    return signed64(tsc - event.host_tsc)


def _goes_on(event: Event, tsc: HostTsc) -> Fraction:
    """Guest time at `tsc` if it goes on as the event says."""
    assert event.tsc_hz is not None  # noqa: S101  # as EventTimeline has it
    return event.guest_ns_after + _ticks(event, tsc) * event.rate_after * NS_PER_S / event.tsc_hz


def _last_numbering(events: Sequence[Event]) -> int:
    """Where the events begin whose TSCs count from where the last one's does.

    An event that does not lie where the one before it leads, none missing between, is of another numbering.
    """
    for place in range(len(events) - 1, 0, -1):
        event, earlier = events[place], events[place - 1]
        assert event.host_tsc is not None  # noqa: S101  # as EventTimeline has it
        is_next = event.sequence == earlier.sequence + 1
        is_off = is_next and abs(_goes_on(earlier, event.host_tsc) - event.guest_ns_before) > ROUNDING_NS
        may_go_back = is_next and event.kind is not EventKind.TSC_STEP  # by a few ticks: another CPU's stamp
        if is_off or (_ticks(earlier, event.host_tsc) < 0 and not may_go_back):
            return place
    return 0
