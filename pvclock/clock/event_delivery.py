"""Delivers events to subscribers on a thread of its own, so that no subscriber delays a clock's operation."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

from pvclock.errors import StateError
from pvclock.threads import WakeUp, begin, check_timeout, renew_in_children
from pvclock.timekeeping.events import Event

__all__ = ["Delivery", "NumberedEvents", "SubscriberFailure"]

FAILURES_KEPT: Final = 16


class NumberedEvents(Protocol):
    """The source of events.  Its methods take their own lock, and call no callback."""

    @property
    def last(self) -> int:
        """The newest event's number; 0 if there is none."""

    def next_above(self, number: int) -> Event | None:
        """The oldest stored event with a number above `number`; None if there is none."""


class SubscriberFailure(NamedTuple):
    """An error that a subscriber raised: the event's `sequence` number, the `callback` and the `error`."""

    sequence: int
    callback: Callable[[Event], object]
    error: BaseException


class _Subscription:
    """A callback and the number of the last event delivered to it."""

    def __init__(self, callback: Callable[[Event], object]) -> None:
        self.callback = callback
        self.seen = 0


class _Flush(NamedTuple):
    """A flush() that waits until all events up to `number` are delivered."""

    number: int
    waiter: WakeUp


class Delivery:
    """The subscribers of `events` and, while there are any, the thread that calls them.

    The thread has a weak reference to this, so a waiting thread ends when the delivery is dropped.  A child of fork()
    inherits the subscribers, and starts a thread at its next deliver(); a call under way at the fork is the parent's.

    Thread-safety: all methods may be called from any thread, but not from a signal handler: the lock is not reentrant.
    It is taken for a few steps, never during a subscriber's call.
    """

    def __init__(self, events: NumberedEvents) -> None:
        self._events = events
        self._lock = threading.Lock()
        self._subscriptions: list[_Subscription] = []
        self._available = 0  # the number up to which events may be delivered
        self._flushes: list[_Flush] = []
        self._failures: deque[SubscriberFailure] = deque(maxlen=FAILURES_KEPT)
        self._wake_up: WakeUp | None = None  # of the delivering thread; a thread with another one ends
        self._here = threading.local()  # .in_subscriber: this thread runs a subscriber
        renew_in_children(self)

    @property
    def failures(self) -> tuple[SubscriberFailure, ...]:
        """The last 16 errors that subscribers raised, oldest first."""
        with self._lock:
            return tuple(self._failures)

    def subscribe(self, callback: Callable[[Event], object]) -> Callable[[], None]:
        """See EventLog."""
        subscription = _Subscription(callback)

        def unsubscribe() -> None:
            with self._lock:
                if subscription in self._subscriptions:
                    self._subscriptions.remove(subscription)
                if not self._subscriptions:
                    self._dismiss()

        try:
            with self._lock:
                self._thread_wake_up("subscribe")
                subscription.seen = self._events.last
                self._subscriptions.append(subscription)
            return unsubscribe  # noqa: TRY300  # an interrupt here, too, must not leave a subscription behind
        except BaseException:
            unsubscribe()
            raise

    def deliver(self) -> None:
        """See EventLog."""
        if not self._subscriptions:  # a concurrent subscriber gets later events only
            return
        try:
            with self._lock:
                self._make_available("deliver")
        except StateError:  # a fork()ed child that cannot start threads: no reason to fail an operation
            return

    def flush(self, timeout_s: float | None = None) -> bool:
        """See EventLog."""
        if timeout_s is not None:
            check_timeout(timeout_s)
        if getattr(self._here, "in_subscriber", False):
            return True
        flush = _Flush(self._events.last, WakeUp())
        try:
            with self._lock:
                if not self._subscriptions:
                    return True
                self._flushes.append(flush)
                self._make_available("flush")
            return flush.waiter.wait(timeout_s)
        finally:
            with self._lock:
                self._flushes = [each for each in self._flushes if each is not flush]

    # Inside, with the lock

    def _make_available(self, operation: str) -> None:
        if self._subscriptions:
            wake_up = self._thread_wake_up(operation)
            self._available = self._events.last
            wake_up.call()

    def _thread_wake_up(self, operation: str) -> WakeUp:
        """The thread's wake-up call; starts the thread if there is none."""
        if self._wake_up is None:
            wake_up = WakeUp()
            delivery = weakref.ref(self, lambda _: wake_up.call())
            thread = threading.Thread(target=_deliver_for, args=(delivery, wake_up), name="pvclock-events", daemon=True)
            try:
                begin(thread, operation)
                self._wake_up = wake_up
            except BaseException:
                wake_up.call()  # if it started nevertheless, it ends itself
                raise
        return self._wake_up

    def _dismiss(self) -> None:
        """End the thread: no subscriber is left."""
        if self._wake_up is not None:
            self._wake_up.call()
            self._wake_up = None
        for flush in self._flushes:
            flush.waiter.call()

    # On the thread

    def tell_all(self, wake_up: WakeUp) -> bool:
        """Deliver all available events on the thread with that wake-up call; returns True if it should continue."""
        while due := self._next_due(wake_up):
            self._call(*due)
        with self._lock:
            return self._wake_up is wake_up

    def _next_due(self, wake_up: WakeUp) -> tuple[_Subscription, Event] | None:
        """The oldest event that a subscriber has not seen, marked as seen; None if there is none.

        One thread marks and delivers, so at the next call all that was marked has been delivered.
        """
        with self._lock:
            if self._wake_up is not wake_up:
                return None
            while subscription := min(self._subscriptions, key=lambda each: each.seen, default=None):
                for flush in self._flushes:
                    if flush.number <= subscription.seen:
                        flush.waiter.call()
                if subscription.seen >= self._available:
                    return None
                event = self._events.next_above(subscription.seen)
                if event is not None and event.sequence <= self._available:
                    subscription.seen = event.sequence
                    return subscription, event
                subscription.seen = self._available  # the events in between have been dropped
            return None

    def _call(self, subscription: _Subscription, event: Event) -> None:
        self._here.in_subscriber = True
        try:
            subscription.callback(event)
        except BaseException as error:  # noqa: BLE001  # a subscriber's error must not end the thread
            with self._lock:
                self._failures.append(SubscriberFailure(event.sequence, subscription.callback, error))
        finally:
            self._here.in_subscriber = False

    # In a child of fork()

    def begin_anew(self) -> None:
        """See HasLock."""
        self._lock = threading.Lock()
        self._wake_up = None
        self._flushes = []


def _deliver_for(reference: weakref.ref[Delivery], wake_up: WakeUp) -> None:
    """The thread's main loop: deliver at each wake-up call until dismissed or the delivery is dropped."""
    running = True
    while running:
        wake_up.wait()
        delivery = reference()
        running = delivery is not None and delivery.tell_all(wake_up)
        del delivery
