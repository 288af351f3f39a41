"""What happened to a VM's time: each change of its timeline, and each trouble of its host, as a numbered event.

An event says what, why, when on the host's clocks, and what it did to guest time.  The log keeps the newest ones in
bounded memory; it can be read, subscribed to and written out as JSON lines.  No clock is read here: stamps are handed
in.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable
from enum import StrEnum
from fractions import Fraction
from itertools import islice
from typing import Final, NamedTuple

from pvclock.errors import ConfigError, RangeError
from pvclock.quantities import U64_MASK, HostTsc

__all__ = ["DEFAULT_CAPACITY", "Event", "EventBatch", "EventKind", "EventLog", "SubscriberFailure"]

DEFAULT_CAPACITY: Final = 4096
"""Events kept unless told otherwise; some 3 MB when full."""

FAILURES_KEPT: Final = 16


class EventKind(StrEnum):
    """What an event is: its word in JSON."""

    START = "start"
    """The guest's interface was chosen; or why its clock may be no good."""
    PAGE = "page"
    """A guest said where its clock is to be."""
    PAUSE = "pause"
    RESUME = "resume"
    SKIP = "skip"
    OFFSET = "offset"
    DILATE = "dilate"
    SLEW = "slew"
    SLEW_END = "slew_end"
    RATE = "rate"
    """The discipline corrected the rate."""
    RESTORE = "restore"
    RESET = "reset"
    """The VM was reset: what its guest wrote is gone, its time goes on."""
    TSC = "tsc"
    """A write by guest or host moved a vCPU's TSC offset."""
    REFUSED = "refused"
    """What the guest or the VMM asked for could not be done, and nothing changed."""
    CLOCKSOURCE = "clocksource"
    """The host kernel left clocksource tsc, or came back to it."""
    TSC_UNSTABLE = "tsc_unstable"
    """The host kernel marked its TSC unstable."""
    TSC_STEP = "tsc_step"
    """The host's TSC went back."""
    TSC_RATE = "tsc_rate"
    """The host's TSC jumped, or left its rate."""
    SUSPEND = "suspend"
    """The host slept."""
    STALL = "stall"
    """The VMM did not run for a while."""


class Event(NamedTuple):
    """One thing that happened to a VM's time.

    host_tsc (ticks), raw_ns (CLOCK_MONOTONIC_RAW) and real_ns (UTC since 1970): when, None where that is not known.
    guest_ns_before, guest_ns_after: guest time at that instant by the segment that ends and by the one that begins, in
    ns, exactly.  dilation_before, dilation_after: guest seconds in a host second, 0 while paused.  What leaves the
    timeline alone has the same values before and after.  sequence: its place in the log, from 1 on; 0 outside of one.
    """

    kind: EventKind
    why: str
    host_tsc: HostTsc | None = None
    raw_ns: int | None = None
    real_ns: int | None = None
    guest_ns_before: Fraction = Fraction(0)
    guest_ns_after: Fraction = Fraction(0)
    dilation_before: Fraction = Fraction(1)
    dilation_after: Fraction = Fraction(1)
    sequence: int = 0

    @property
    def jump_ns(self) -> Fraction:
        """By how much guest time stepped, in ns; 0 where one segment meets the next."""
        return self.guest_ns_after - self.guest_ns_before

    def to_json(self) -> str:
        """One line of ASCII without its end: ints as ints, fractions as [numerator, denominator], unknown as null."""
        record: dict[str, object] = {"sequence": self.sequence, "kind": self.kind.value, "why": self.why}
        for name in STAMPS:
            record[name] = getattr(self, name)
        for name in ("jump_ns", *FRACTIONS):
            record[name] = getattr(self, name).as_integer_ratio()
        return json.dumps(record)

    @classmethod
    def from_json(cls, line: str) -> Event:
        """The event that to_json() wrote.  ConfigError if `line` is anything else."""
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"event: no JSON: {error}") from None
        if not isinstance(record, dict) or set(record) != FIELDS | {"jump_ns"}:
            raise ConfigError(f"event: a JSON object with {', '.join(sorted(FIELDS))} and jump_ns was expected")
        host_tsc, raw_ns, real_ns = (_stamp(name, record[name]) for name in STAMPS)
        before, after, dilation_before, dilation_after = (_fraction(name, record[name]) for name in FRACTIONS)
        event = cls(
            _kind(record["kind"]),
            _text(record["why"]),
            None if host_tsc is None else HostTsc(host_tsc),
            raw_ns,
            real_ns,
            before,
            after,
            dilation_before,
            dilation_after,
            _whole("sequence", record["sequence"]),
        )
        if _fraction("jump_ns", record["jump_ns"]) != event.jump_ns:
            raise ConfigError(f"event {event.sequence}: jump_ns contradicts guest_ns_before and guest_ns_after")
        return event


FIELDS: Final = frozenset(Event._fields)
STAMPS: Final = Event._fields[2:5]
FRACTIONS: Final = Event._fields[5:9]


class EventBatch(NamedTuple):
    """What a read found: `events` in order, how many before them the bound has `lost`, and `last` for the next read."""

    events: tuple[Event, ...]
    lost: int
    last: int


class SubscriberFailure(NamedTuple):
    """A subscriber that raised: the event's `sequence` number, the subscriber's `callback`, and its `error`."""

    sequence: int
    callback: Callable[[Event], object]
    error: Exception


class _Subscription:
    """A callback, and the number of the last event that it was given."""

    def __init__(self, callback: Callable[[Event], object], seen: int) -> None:
        self.callback = callback
        self.seen = seen


class EventLog:
    """The newest `capacity` events of a VM, numbered from 1 on without a gap.  RangeError if capacity is below 1.

    Thread-safety: all methods may be called from any thread.  A lock is held for the few steps of each, never while a
    subscriber runs; it is not reentrant, so a signal handler may not append.
    """

    def __init__(self, capacity: int = DEFAULT_CAPACITY) -> None:
        if capacity < 1:
            raise RangeError(f"capacity is {capacity}; a log holds 1 event or more")
        self.capacity = capacity
        self._lock = threading.Lock()
        self._events: deque[Event] = deque(maxlen=capacity)
        self._last = 0
        self._subscriptions: list[_Subscription] = []
        self._delivering = False
        self._failures: deque[SubscriberFailure] = deque(maxlen=FAILURES_KEPT)

    def __len__(self) -> int:
        return len(self._events)

    @property
    def last(self) -> int:
        """The newest event's number; 0 before the first."""
        return self._last

    @property
    def failures(self) -> tuple[SubscriberFailure, ...]:
        """The last 16 errors that subscribers raised, oldest first."""
        with self._lock:
            return tuple(self._failures)

    def append(self, event: Event) -> Event:
        """Record an event and tell the subscribers, as record() and deliver() do."""
        recorded = self.record(event)
        self.deliver()
        return recorded

    def record(self, event: Event) -> Event:
        """Give `event` the next number, whatever it had, and keep it.  Nobody is told before deliver().

        For a caller that holds a lock, or vCPUs out of the guest, which no subscriber may prolong.
        """
        with self._lock:
            self._last += 1
            recorded = event._replace(sequence=self._last)
            self._events.append(recorded)
            return recorded

    def deliver(self) -> None:
        """Tell the subscribers what they have not been told, each in the order of the numbers.

        One thread delivers at a time.  While it does, another's events are left to it, and this returns at once; so
        does a call from within a subscriber.  An Exception that a subscriber raises is kept in `failures` and goes no
        further: that subscriber stays, and misses nothing that follows.  KeyboardInterrupt and its like come out, and
        the rest is told at the next call.
        """
        if not self._subscriptions:  # who subscribes now hears of what comes after
            return
        with self._lock:
            if self._delivering:
                return
            self._delivering = True
        try:
            while due := self._next_due():
                self._tell(*due)
        except BaseException:
            with self._lock:
                self._delivering = False
            raise

    def read(self, since: int = 0) -> EventBatch:
        """The events numbered above `since`, and how many such are gone.  RangeError if `since` is negative.

        Go on with read(batch.last).  A number that is still to come finds nothing and is kept.
        """
        if since < 0:
            raise RangeError(f"read(since={since}); numbers begin with 1, and 0 reads all")
        with self._lock:
            events = self._above(since)
            lost = max(self._last - since - len(events), 0)
        return EventBatch(events, lost, events[-1].sequence if events else since)

    def json_lines(self, since: int = 0) -> str:
        """The events numbered above `since` as JSON, each line ended; Event.from_json() reads one back.

        RangeError if `since` is negative.
        """
        return "".join(event.to_json() + "\n" for event in self.read(since).events)

    def subscribe(self, callback: Callable[[Event], object]) -> Callable[[], None]:
        """Call `callback` with each event from now on; returns what ends that.

        After the end no call begins; one that runs in another thread may still be running.

        It is called in the thread that delivers, while others' events wait: it should be quick, and not wait for a
        thread that holds the clock.  One so slow that the bound overtakes it sees a gap in the numbers.
        """
        with self._lock:
            subscription = _Subscription(callback, self._last)
            self._subscriptions.append(subscription)

        def unsubscribe() -> None:
            with self._lock:
                if subscription in self._subscriptions:
                    self._subscriptions.remove(subscription)

        return unsubscribe

    # Inside

    def _above(self, since: int) -> tuple[Event, ...]:
        """Events numbered above `since`; the lock is held."""
        wanted = min(max(self._last - since, 0), len(self._events))
        newest_first = islice(reversed(self._events), wanted)
        return tuple(newest_first)[::-1]

    def _next_due(self) -> tuple[_Subscription, Event] | None:
        """The oldest event that a subscriber has not seen, marked as seen; None ends the delivery.

        Both are decided under one lock: an event that comes later finds nobody delivering, and is delivered by its own
        thread.
        """
        with self._lock:
            subscription = min(self._subscriptions, key=lambda each: each.seen, default=None)
            if subscription is None or subscription.seen == self._last:
                self._delivering = False
                return None
            event = self._events[max(len(self._events) - (self._last - subscription.seen), 0)]
            subscription.seen = event.sequence
            return subscription, event

    def _tell(self, subscription: _Subscription, event: Event) -> None:
        try:
            subscription.callback(event)
        except Exception as error:  # noqa: BLE001  # a subscriber's error is its own, not the clock's: see deliver()
            with self._lock:
                self._failures.append(SubscriberFailure(event.sequence, subscription.callback, error))


def _kind(value: object) -> EventKind:
    if value not in list(EventKind):
        raise ConfigError(f"event: kind is {value!r}; it can be {', '.join(EventKind)}")
    return EventKind(str(value))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"event: why is {value!r}; a string was expected")
    return value


def _whole(name: str, value: object) -> int:
    # JSON's true is an int to Python.
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"event: {name} is {value!r}; a whole number was expected")
    return value


def _stamp(name: str, value: object) -> int | None:
    if value is None:
        return None
    stamp = _whole(name, value)
    if name == "host_tsc" and not 0 <= stamp <= U64_MASK:
        raise ConfigError(f"event: host_tsc is {stamp}; the TSC has 64 bits")
    return stamp


def _fraction(name: str, value: object) -> Fraction:
    if not isinstance(value, list) or len(value) != 2:
        raise ConfigError(f"event: {name} is {value!r}; [numerator, denominator] was expected")
    numerator, denominator = (_whole(name, each) for each in value)
    if denominator < 1:
        raise ConfigError(f"event: {name} is {numerator}/{denominator}; a denominator is 1 or more")
    return Fraction(numerator, denominator)
