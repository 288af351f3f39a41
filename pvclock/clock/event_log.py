"""A VM's event log in bounded memory: the newest events of the VMM and, apart from those, of the guest.

A guest controls how often it causes events, so it has a rate budget, and its events never displace the VMM's.  The log
can be read, subscribed to and written as JSON lines.  It reads no clock: events bring their time stamps.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from heapq import merge
from itertools import islice
from operator import attrgetter
from typing import Final, NamedTuple

from pvclock._guest_budget import GuestBudget
from pvclock.arguments import function, instance, whole
from pvclock.clock.event_delivery import Delivery, SubscriberFailure
from pvclock.errors import RangeError
from pvclock.quantities import shown
from pvclock.threads import renew_in_children
from pvclock.timekeeping.events import Event, EventCause, EventKind

__all__ = ["DEFAULT_CAPACITY", "EventBatch", "EventLog", "SubscriberFailure"]

DEFAULT_CAPACITY: Final = 4096
"""Default number of events kept per cause; some 3 MB per cause when full."""

_number: Final = attrgetter("sequence")


class EventBatch(NamedTuple):
    """A read's `events` in order, how many more were `lost` to the capacity, and `last`, for the next read."""

    events: tuple[Event, ...]
    lost: int
    last: int


class EventStore:
    """The newest `capacity` events of each cause, in one sequence from 1 without gaps.

    Thread-safety: all methods may be called from any thread; each takes the lock for a few steps.
    """

    def __init__(self, capacity: int) -> None:
        self._lock = threading.Lock()
        self._kept: dict[EventCause, deque[Event]] = {cause: deque(maxlen=capacity) for cause in EventCause}
        self.budget = GuestBudget()
        self._suppressed_recorded = 0
        renew_in_children(self)

    def begin_anew(self) -> None:
        """See HasLock."""
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sum(map(len, self._kept.values()))

    @property
    def last(self) -> int:
        """The newest event's number; 0 if there is none."""
        return max([events[-1].sequence for events in self._kept.values() if events], default=0)

    @property
    def suppressed(self) -> int:
        """Guest-caused events beyond the budget so far."""
        return self.budget.suppressed

    def add(self, event: Event) -> Event:
        """Store the event; returns it with its number, or with 0 if it is beyond the guest's budget."""
        with self._lock:
            self.budget.fill(event.raw_ns)
            if self.budget.left:
                self._record_suppressed(event)
            if event.cause is EventCause.GUEST and not self.budget.take():
                return event._replace(sequence=0)
            return self._append(event)

    def above(self, number: int) -> tuple[tuple[Event, ...], int]:
        """The events numbered above `number`, in order, and how many such have been dropped."""
        with self._lock:
            newer = [islice(events, _place(events, number), None) for events in self._kept.values()]
            found = tuple(merge(*newer, key=_number))
            return found, max(self.last - number, 0) - len(found)

    def next_above(self, number: int) -> Event | None:
        """The oldest stored event with a number above `number`; None if there is none."""
        with self._lock:
            places = [(events, _place(events, number)) for events in self._kept.values()]
            newer = [events[place] for events, place in places if place < len(events)]
            return min(newer, key=_number, default=None)

    def _append(self, event: Event) -> Event:
        numbered = event._replace(sequence=self.last + 1)
        self._kept[event.cause].append(numbered)
        return numbered

    def _record_suppressed(self, event: Event) -> None:
        """Record how many events were suppressed since the last such record, with the stamps of the next event."""
        unrecorded = self.budget.suppressed - self._suppressed_recorded
        if not unrecorded:
            return
        record = event._replace(
            kind=EventKind.SUPPRESSED,
            why=f"{unrecorded} more guest-caused events were not recorded",
            guest_ns_after=event.guest_ns_before,
            rate_after=event.rate_before,
            cause=EventCause.GUEST,
            policy=None,
        )
        self._append(record)
        self._suppressed_recorded += unrecorded


def _place(events: deque[Event], number: int) -> int:
    """The index of the first event numbered above `number`."""
    return bisect_right(events, number, key=_number)


class EventLog:
    """The newest `capacity` events that the VMM or its host caused, and as many that the guest caused.

    One sequence from 1 without gaps numbers both.  RangeError if capacity is below 1.  A guest may cause 64 events at
    once and 8 more each second; those beyond get no number and are counted in `suppressed`.  When the budget allows and
    another event comes, an event of kind "suppressed" says how many they were.

    Thread-safety: all methods may be called from any thread, but not from a signal handler: the locks are not
    reentrant.  Each call takes them for a few steps, never while a subscriber runs.
    """

    def __init__(self, capacity: int = DEFAULT_CAPACITY) -> None:
        if whole("capacity", capacity) < 1:
            raise RangeError(f"capacity is {shown(capacity)}; a log holds 1 event or more")
        self.capacity = capacity
        self._store = EventStore(capacity)
        self._delivery = Delivery(self._store)

    def __len__(self) -> int:
        return len(self._store)

    @property
    def last(self) -> int:
        """The newest event's number; 0 if there is none."""
        return self._store.last

    @property
    def suppressed(self) -> int:
        """Guest-caused events not recorded because they came too fast."""
        return self._store.suppressed

    @property
    def guest_budget(self) -> GuestBudget:
        """What the guest may cause; one that causes an event many times a second asks it first."""
        return self._store.budget

    @property
    def failures(self) -> tuple[SubscriberFailure, ...]:
        """The last 16 errors that subscribers raised, oldest first."""
        return self._delivery.failures

    def append(self, event: Event) -> Event:
        """Record an event and deliver it: record(), then deliver()."""
        recorded = self.record(event)
        self.deliver()
        return recorded

    def record(self, event: Event) -> Event:
        """Store `event` under the next number, whatever its own; returns it, with number 0 if suppressed.

        Subscribers get it at the next deliver(), which a caller may leave until it has released its locks.
        """
        return self._store.add(instance("event", event, Event))

    def deliver(self) -> None:
        """Let the log's thread deliver what has been recorded so far; returns at once, and never raises.

        Each subscriber gets the events in order.  An error that it raises, SystemExit included, goes to `failures`; the
        subscription stays, and later events are delivered.
        """
        self._delivery.deliver()

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until all events recorded before are delivered to all subscribers; False on timeout.

        Returns True at once in a subscriber, which would wait for itself.  Deadlocks if the caller holds a lock that a
        subscriber waits for.  RangeError for timeout_s; StateError in a child of fork() that cannot start a thread.
        """
        return self._delivery.flush(timeout_s)

    def read(self, since: int = 0) -> EventBatch:
        """The events numbered above `since`, and how many such were dropped.  RangeError if `since` is negative.

        Continue with read(batch.last).  A future number finds nothing, and is returned as `last`.
        """
        if whole("since", since) < 0:
            raise RangeError(f"read(since={shown(since)}); numbers begin with 1, and 0 reads all")
        events, lost = self._store.above(since)
        return EventBatch(events, lost, events[-1].sequence if events else since)

    def json_lines(self, since: int = 0) -> str:
        """The events numbered above `since`, as JSON lines; Event.from_json() reads one back.

        RangeError if `since` is negative.
        """
        return "".join(event.to_json() + "\n" for event in self.read(since).events)

    def subscribe(self, callback: Callable[[Event], object]) -> Callable[[], None]:
        """Call `callback` with each event from now on; returns a function that ends the subscription.

        After that no call begins, though one on another thread may still run.  StateError, with nothing done, if the
        system allows no further thread.

        Calls come on a thread of the log's own, which exists while there are subscribers.  A callback may block, and
        call any method of the clock: only this log's other subscribers wait for it.  If it falls behind by more than
        the capacity, it sees a gap in the numbers.
        """
        return self._delivery.subscribe(function("callback", callback))
