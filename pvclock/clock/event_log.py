"""Which events of a VM are kept, in bounded memory: the newest of the VMM's, and the newest of the guest's, apart.

A guest decides how often it causes events, so it has a budget, and no event of it pushes out one of the VMM's.  The log
can be read, subscribed to and written out as JSON lines.  No clock is read here: stamps are handed in.
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

from pvclock.arguments import function, instance, whole
from pvclock.clock.event_delivery import Delivery, SubscriberFailure
from pvclock.errors import RangeError
from pvclock.quantities import NS_PER_S, shown
from pvclock.threads import renew_in_children
from pvclock.timekeeping.events import Event, EventCause, EventKind

__all__ = ["DEFAULT_CAPACITY", "EventBatch", "EventLog", "SubscriberFailure"]

DEFAULT_CAPACITY: Final = 4096
"""Events kept of each cause unless told otherwise; some 3 MB each when full."""

GUEST_BURST: Final = 64
"""Guest-caused events that may come at once: 64 vCPUs set up their clocks."""

GUEST_EVENTS_PER_S: Final = 8

_number: Final = attrgetter("sequence")


class EventBatch(NamedTuple):
    """What a read found: `events` in order, how many more the bounds have `lost`, and `last` for the next read."""

    events: tuple[Event, ...]
    lost: int
    last: int


class GuestBudget:
    """How many events a guest may still cause: GUEST_BURST at once, and GUEST_EVENTS_PER_S more each second.

    Seconds pass by the raw clock of the events' stamps; one that has gone back counts from there.
    """

    def __init__(self) -> None:
        self.left = GUEST_BURST
        self.suppressed = 0
        """How many events were beyond it."""
        self._filled_ns: int | None = None

    def fill(self, raw_ns: int | None) -> None:
        """Add what whole seconds give by raw_ns, if that is known."""
        if raw_ns is None:
            return
        if self._filled_ns is None or raw_ns < self._filled_ns:
            self._filled_ns = raw_ns
        seconds = (raw_ns - self._filled_ns) // NS_PER_S
        self._filled_ns += seconds * NS_PER_S
        self.left = min(self.left + seconds * GUEST_EVENTS_PER_S, GUEST_BURST)

    def take(self) -> bool:
        """Is there room for one more?"""
        if self.left:
            self.left -= 1
            return True
        self.suppressed += 1
        return False


class EventStore:
    """The newest `capacity` events of each cause, numbered together from 1 on without a gap.

    Thread-safety: all methods may be called from any thread; the lock is held for a few steps.
    """

    def __init__(self, capacity: int) -> None:
        self._lock = threading.Lock()
        self._kept: dict[EventCause, deque[Event]] = {cause: deque(maxlen=capacity) for cause in EventCause}
        self._budget = GuestBudget()
        self._suppressed_told = 0
        renew_in_children(self)

    def begin_anew(self) -> None:
        """See HasLock."""
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sum(map(len, self._kept.values()))

    @property
    def last(self) -> int:
        """The newest event's number; 0 before the first."""
        return max([events[-1].sequence for events in self._kept.values() if events], default=0)

    @property
    def suppressed(self) -> int:
        """How many guest-caused events were beyond the budget."""
        return self._budget.suppressed

    def add(self, event: Event) -> Event:
        """The event with its number, or with 0 if the guest's budget has no room for it."""
        with self._lock:
            self._budget.fill(event.raw_ns)
            if self._budget.left:
                self._tell_suppressed(event)
            if event.cause is EventCause.GUEST and not self._budget.take():
                return event._replace(sequence=0)
            return self._append(event)

    def above(self, number: int) -> tuple[tuple[Event, ...], int]:
        """The events numbered above `number`, in order, and how many such are gone."""
        with self._lock:
            newer = [islice(events, _place(events, number), None) for events in self._kept.values()]
            found = tuple(merge(*newer, key=_number))
            return found, max(self.last - number, 0) - len(found)

    def next_above(self, number: int) -> Event | None:
        """The oldest event that is still there of those numbered above `number`."""
        with self._lock:
            places = [(events, _place(events, number)) for events in self._kept.values()]
            newer = [events[place] for events, place in places if place < len(events)]
            return min(newer, key=_number, default=None)

    def _append(self, event: Event) -> Event:
        numbered = event._replace(sequence=self.last + 1)
        self._kept[event.cause].append(numbered)
        return numbered

    def _tell_suppressed(self, event: Event) -> None:
        """Record how many were left out since that was told last, stamped as the event that comes next."""
        untold = self._budget.suppressed - self._suppressed_told
        if not untold:
            return
        told = event._replace(
            kind=EventKind.SUPPRESSED,
            why=f"{untold} more guest-caused events were not recorded",
            guest_ns_after=event.guest_ns_before,
            rate_after=event.rate_before,
            cause=EventCause.GUEST,
            policy=None,
        )
        self._append(told)
        self._suppressed_told += untold


def _place(events: deque[Event], number: int) -> int:
    """Where the events numbered above `number` begin."""
    return bisect_right(events, number, key=_number)


class EventLog:
    """The newest `capacity` events that the VMM or its host caused, and as many that the guest caused.

    All are numbered together, from 1 on without a gap.  RangeError if capacity is below 1.  Of the guest's, 64 may come
    at once and 8 more each second; those beyond get no number and are counted in `suppressed`, and an event of kind
    "suppressed" tells how many they were, as soon as there is room again and another event comes.

    Thread-safety: all methods may be called from any thread.  Locks are held for the few steps of each, never while a
    subscriber runs; they are not reentrant, so a signal handler may not append.
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
        """The newest event's number; 0 before the first."""
        return self._store.last

    @property
    def suppressed(self) -> int:
        """How many guest-caused events were not recorded, for they came too fast."""
        return self._store.suppressed

    @property
    def failures(self) -> tuple[SubscriberFailure, ...]:
        """The last 16 errors that subscribers raised, oldest first."""
        return self._delivery.failures

    def append(self, event: Event) -> Event:
        """Record an event and have the subscribers told, as record() and deliver() do."""
        recorded = self.record(event)
        self.deliver()
        return recorded

    def record(self, event: Event) -> Event:
        """Give `event` the next number, whatever it had, and keep it; number 0 if it was suppressed.

        Nobody is told before deliver(): for a caller that holds a lock, or vCPUs out of the guest.
        """
        return self._store.add(instance("event", event, Event))

    def deliver(self) -> None:
        """Let the log's thread tell the subscribers what was recorded up to now; returns at once, and raises nothing.

        Each subscriber is told in the order of the numbers.  What it raises, SystemExit and its like included, is kept
        in `failures` and goes no further: that subscriber stays, and misses nothing that follows.
        """
        self._delivery.deliver()

    def flush(self, timeout_s: float | None = None) -> bool:
        """Return once all that was recorded before has been told to all subscribers; False if timeout_s is over first.

        In a subscriber, which would wait for itself: True at once.  Not for a thread that holds what a subscriber waits
        for.  RangeError for timeout_s; StateError where a child of fork() may begin no thread.
        """
        return self._delivery.flush(timeout_s)

    def read(self, since: int = 0) -> EventBatch:
        """The events numbered above `since`, and how many such are gone.  RangeError if `since` is negative.

        Go on with read(batch.last).  A number that is still to come finds nothing and is kept.
        """
        if whole("since", since) < 0:
            raise RangeError(f"read(since={shown(since)}); numbers begin with 1, and 0 reads all")
        events, lost = self._store.above(since)
        return EventBatch(events, lost, events[-1].sequence if events else since)

    def json_lines(self, since: int = 0) -> str:
        """The events numbered above `since` as JSON, each line ended; Event.from_json() reads one back.

        RangeError if `since` is negative.
        """
        return "".join(event.to_json() + "\n" for event in self.read(since).events)

    def subscribe(self, callback: Callable[[Event], object]) -> Callable[[], None]:
        """Call `callback` with each event from now on; returns what ends that.

        After the end no call begins; one that runs in another thread may still be running.  StateError, and nothing
        done, where the system allows no thread more.

        It is called on a thread of the log's own, which the first subscriber begins and the last one ends.  It may take
        its time, and call any of the clock's methods: only this log's other subscribers wait for it.  One so slow that
        the bounds overtake it sees a gap in the numbers.
        """
        return self._delivery.subscribe(function("callback", callback))
