"""Guest time at a host TSC, from a clock's events alone: the log of a VM that is gone, a file of JSON lines.

Each event holds a point of the timeline and the rate after it, so events without a gap give the timeline exactly.
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
"""Tolerance when matching events: a timeline cuts fractions at 2^-1024 ns at each segment, with or without an event."""


class EventTimeline:
    """Guest time by `events`, which are one clock's log in its order.

    ConfigError for events without host_tsc or tsc_hz, or whose sequence numbers do not rise.  Where the host TSC was
    renumbered (it went back, or the clock was restored) only the time after the last renumbering is known.  Where
    events are missing, the time between their neighbours is unknown.  After the last event its rate is extrapolated.
    """

    def __init__(self, events: Sequence[Event]) -> None:
        found = tuple(instances("events", events, Event))
        for event in found:
            if event.host_tsc is None or event.tsc_hz is None:
                raise ConfigError(f"event {event.sequence} has no {'host_tsc' if event.host_tsc is None else 'tsc_hz'}")
        for earlier, later in pairwise(found):
            if later.sequence <= earlier.sequence:
                raise ConfigError(f"event {later.sequence} after {earlier.sequence}; sequence numbers must rise")
        self._events = found[_last_numbering(found) :]

    def at(self, host_tsc: HostTsc) -> Fraction:
        """Guest time in ns at `host_tsc`, exactly; at a step, the time after it.

        RangeError before the first event since the last renumbering, and where events are missing.
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
                return _extrapolated(event, tsc)
            following = event
        raise RangeError(f"host TSC {tsc} is before the first event that covers it")


def timeline_of(lines: str | Sequence[str]) -> EventTimeline:
    """The timeline in JSON lines: one text, as EventLog.json_lines() writes it, or a sequence of lines.

    ConfigError for a line that is not an event, and as EventTimeline raises it.
    """
    each = lines.splitlines() if isinstance(lines, str) else sequence("lines", lines, "JSON lines")
    return EventTimeline([Event.from_json(text("lines", line)) for line in each])


def _ticks(event: Event, tsc: HostTsc) -> int:
    assert event.host_tsc is not None  # noqa: S101  # checked by EventTimeline
    return signed64(tsc - event.host_tsc)


def _extrapolated(event: Event, tsc: HostTsc) -> Fraction:
    """Guest time at `tsc`, extrapolated from the event."""
    assert event.tsc_hz is not None  # noqa: S101  # checked by EventTimeline
    return event.guest_ns_after + _ticks(event, tsc) * event.rate_after * NS_PER_S / event.tsc_hz


def _last_numbering(events: Sequence[Event]) -> int:
    """Index of the first event in the last event's TSC numbering.

    An event that contradicts its direct predecessor, or whose TSC went back, begins a new numbering.
    """
    for place in range(len(events) - 1, 0, -1):
        event, earlier = events[place], events[place - 1]
        assert event.host_tsc is not None  # noqa: S101  # checked by EventTimeline
        is_next = event.sequence == earlier.sequence + 1
        is_off = is_next and abs(_extrapolated(earlier, event.host_tsc) - event.guest_ns_before) > ROUNDING_NS
        may_go_back = is_next and event.kind is not EventKind.TSC_STEP  # by a few ticks: stamped on another CPU
        if is_off or (_ticks(earlier, event.host_tsc) < 0 and not may_go_back):
            return place
    return 0
