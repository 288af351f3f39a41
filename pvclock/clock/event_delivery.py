"""How subscribers are told of events: by a thread of the log's own, so that none of them keeps a clock's operation."""

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
    """What is delivered; the methods lock for themselves, and call nobody."""

    @property
    def last(self) -> int:
        """The newest event's number; 0 before the first."""

    def next_above(self, number: int) -> Event | None:
        """The oldest event that is still there of those numbered above `number`."""


class SubscriberFailure(NamedTuple):
    """A subscriber that raised: the event's `sequence` number, the subscriber's `callback`, and its `error`."""

    sequence: int
    callback: Callable[[Event], object]
    error: BaseException


class _Subscription:
    """A callback, and the number of the last event that it was given."""

    def __init__(self, callback: Callable[[Event], object]) -> None:
        self.callback = callback
        self.seen = 0


class _Flush(NamedTuple):
    """Somebody who waits until all up to `number` have been told."""

    number: int
    waiter: WakeUp


class Delivery:
    """The subscribers of `events` and, as long as there are any, a thread that tells them.

    The thread has a weak reference: one that waits ends when the delivery is dropped.  A child of fork() has the
    subscribers and no thread; it gets one at the next deliver(), and what was being told at the fork is its parent's.

    Thread-safety: all methods may be called from any thread.  The lock is held for a few steps, never in a subscriber;
    it is not reentrant, so a signal handler may not call them.
    """

    def __init__(self, events: NumberedEvents) -> None:
        self._events = events
        self._lock = threading.Lock()
        self._subscriptions: list[_Subscription] = []
        self._available = 0  # the number up to which events may be told
        self._flushes: list[_Flush] = []
        self._failures: deque[SubscriberFailure] = deque(maxlen=FAILURES_KEPT)
        self._wake_up: WakeUp | None = None  # of the thread that delivers; one that has another is to end
        self._here = threading.local()  # .telling: does this thread run a subscriber?
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
            return unsubscribe  # noqa: TRY300  # an interrupt here, too, leaves nothing that nobody can end
        except BaseException:
            unsubscribe()
            raise

    def deliver(self) -> None:
        """See EventLog."""
        if not self._subscriptions:  # who subscribes now hears of what comes after
            return
        try:
            with self._lock:
                self._make_available("deliver")
        except StateError:  # a child that may have no thread yet: an operation does not fail for that
            return

    def flush(self, timeout_s: float | None = None) -> bool:
        """See EventLog."""
        if timeout_s is not None:
            check_timeout(timeout_s)
        if getattr(self._here, "telling", False):
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
        """The thread's wake-up call; the thread is begun if there is none."""
        if self._wake_up is None:
            wake_up = WakeUp()
            delivery = weakref.ref(self, lambda _: wake_up.call())
            thread = threading.Thread(target=_deliver_for, args=(delivery, wake_up), name="pvclock-events", daemon=True)
            try:
                begin(thread, operation)
                self._wake_up = wake_up
            except BaseException:
                wake_up.call()  # if it began nevertheless, it finds that it is to end
                raise
        return self._wake_up

    def _dismiss(self) -> None:
        """Let the thread end: nobody is left to be told."""
        if self._wake_up is not None:
            self._wake_up.call()
            self._wake_up = None
        for flush in self._flushes:
            flush.waiter.call()

    # On the thread

    def tell_all(self, wake_up: WakeUp) -> bool:
        """Tell what is available, for the thread with that wake-up call; returns if the thread is to go on."""
        while due := self._next_due(wake_up):
            self._tell(*due)
        with self._lock:
            return self._wake_up is wake_up

    def _next_due(self, wake_up: WakeUp) -> tuple[_Subscription, Event] | None:
        """The oldest event that a subscriber has not seen, marked as seen; None if there is none.

        What has been seen has been told now, for one thread at a time does both.
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
                subscription.seen = self._available  # the bound has overtaken it
            return None

    def _tell(self, subscription: _Subscription, event: Event) -> None:
        self._here.telling = True
        try:
            subscription.callback(event)
        except BaseException as error:  # noqa: BLE001  # a subscriber's error is its own; the thread goes on
            with self._lock:
                self._failures.append(SubscriberFailure(event.sequence, subscription.callback, error))
        finally:
            self._here.telling = False

    # In a child of fork()

    def begin_anew(self) -> None:
        """See HasLock."""
        self._lock = threading.Lock()
        self._wake_up = None
        self._flushes = []


def _deliver_for(reference: weakref.ref[Delivery], wake_up: WakeUp) -> None:
    """The thread: deliver at each wake-up call, while the delivery is there and wants it."""
    going_on = True
    while going_on:
        wake_up.wait()
        delivery = reference()
        going_on = delivery is not None and delivery.tell_all(wake_up)
        del delivery
