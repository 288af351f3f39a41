"""The thread of an event log's own: when it is there, and what does not wait for it."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import weakref
from functools import partial

import pytest

from pvclock.clock.event_log import EventLog
from pvclock.errors import RangeError, StateError
from pvclock.timekeeping.events import Event, EventKind
from tests.unit.schedules import end_of, threads_named
from tests.waiting import HANG_S

NS_PER_MINUTE = 60 * 10**9
NAME = "pvclock-events"


def numbers(events: list[Event]) -> list[int]:
    """The events' sequence numbers, each of which must be its reason."""
    assert all(event.why == str(event.sequence) for event in events)
    return [event.sequence for event in events]


@pytest.fixture
def others() -> set[threading.Thread]:
    """The threads of other logs, which may not have been collected yet."""
    return threads_named(NAME)


@pytest.mark.row("E15", "E9")
def test_operations_do_not_wait_for_a_subscriber() -> None:
    """While one does not return, events are appended, read and subscribed to; a flush gives up; all is told later."""
    log, heard = EventLog(), list[int]()
    entered, hold = threading.Event(), threading.Event()

    def block(event: Event) -> None:
        entered.set()
        assert hold.wait(HANG_S)
        heard.append(event.sequence)

    unsubscribe = log.subscribe(block)
    log.append(Event(EventKind.TSC, "1"))
    assert entered.wait(HANG_S)
    for number in range(2, 1001):
        log.append(Event(EventKind.TSC, str(number)))
    assert log.read().last == 1000
    assert not log.flush(timeout_s=0)
    log.subscribe(lambda event: heard.append(-event.sequence))
    log.append(Event(EventKind.TSC, "1001"))
    hold.set()
    assert log.flush()
    assert heard == [*range(1, 1002), -1001]
    unsubscribe()


@pytest.mark.row("E15")
def test_the_thread_is_there_as_long_as_subscribers(others: set[threading.Thread]) -> None:
    """The first subscriber begins it, further ones share it, the last one ends it, and a new one begins another."""
    log = EventLog()
    assert log.flush()
    assert threads_named(NAME) <= others
    ends = [log.subscribe(list[Event]().append) for _ in range(3)]
    (thread,) = threads_named(NAME) - others
    assert thread.daemon
    for end in ends:
        assert thread.is_alive()
        end()
    end_of({thread})
    heard = list[Event]()
    end = log.subscribe(heard.append)
    log.append(Event(EventKind.TSC, "1"))
    assert log.flush()
    assert numbers(heard) == [1]
    end()
    end_of(threads_named(NAME) - others)


@pytest.mark.row("E15", "E9")
def test_a_flush_ends_with_the_last_subscriber(others: set[threading.Thread]) -> None:
    """Who waits for a subscriber that leaves in the middle of an event waits no more; its thread ends after it."""
    log, flushed = EventLog(), list[bool]()
    entered, hold = threading.Event(), threading.Event()

    def block(_event: Event) -> None:
        entered.set()
        assert hold.wait(HANG_S)

    leave = log.subscribe(block)
    (thread,) = threads_named(NAME) - others
    log.append(Event(EventKind.TSC, "1"))
    assert entered.wait(HANG_S)
    waiting = threading.Thread(target=lambda: flushed.append(log.flush(HANG_S)))
    waiting.start()
    while not log._delivery._flushes:
        time.sleep(0)
    leave()
    end_of({waiting})
    assert flushed == [True]
    assert thread.is_alive()
    hold.set()
    end_of({thread})


@pytest.mark.row("E15", "E9")
def test_a_thread_that_is_to_end_tells_nothing_more(others: set[threading.Thread]) -> None:
    """One that comes back from a subscriber that has left meanwhile leaves the new subscriber to the new thread."""
    log, heard = EventLog(), list[int]()
    entered, hold = [threading.Event() for _ in range(2)], [threading.Event() for _ in range(2)]

    def block(_event: Event) -> None:
        entered[0].set()
        assert hold[0].wait(HANG_S)

    def hear(event: Event) -> None:
        if event.sequence == 2:
            entered[1].set()
            assert hold[1].wait(HANG_S)
        heard.append(event.sequence)

    leave = log.subscribe(block)
    (thread,) = threads_named(NAME) - others
    log.append(Event(EventKind.TSC, "1"))
    assert entered[0].wait(HANG_S)
    leave()
    log.subscribe(hear)
    log.append(Event(EventKind.TSC, "2"))
    assert entered[1].wait(HANG_S)
    log.append(Event(EventKind.TSC, "3"))
    hold[0].set()
    end_of({thread})
    assert heard == []
    hold[1].set()
    assert log.flush()
    assert heard == [2, 3]


@pytest.mark.row("E15", "E9")
def test_a_thread_keeps_no_log(others: set[threading.Thread]) -> None:
    """A log that is dropped with its subscribers, one of which refers to it, goes; and its thread ends."""
    log = EventLog()
    log.subscribe(partial(_read, log))
    log.append(Event(EventKind.TSC, "1"))
    assert log.flush()
    gone = weakref.ref(log)
    (thread,) = threads_named(NAME) - others
    del log
    gc.collect()
    end_of({thread})
    gc.collect()
    assert gone() is None


def _read(log: EventLog, event: Event) -> None:
    assert log.read().last == event.sequence


def no_thread(_thread: threading.Thread) -> None:
    """What a thread's start() does at the system's limit."""
    raise RuntimeError("can't start new thread")


@pytest.mark.row("E15", "E9", "E13")
def test_without_a_thread_there_is_no_subscription(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the system's limit subscribe() is a StateError and nothing is done; it can be tried again."""
    log, heard = EventLog(), list[Event]()
    with monkeypatch.context() as limited:
        limited.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(StateError, match="subscribe: cannot start a thread: can't start new thread; end some"):
            log.subscribe(heard.append)
    log.append(Event(EventKind.TSC, "1"))
    assert log.flush()
    end = log.subscribe(heard.append)
    log.append(Event(EventKind.TSC, "2"))
    assert log.flush()
    assert numbers(heard) == [2]
    end()


@pytest.mark.row("E15", "E13")
@pytest.mark.parametrize("timeout_s", [-1, float("nan"), float("inf"), threading.TIMEOUT_MAX * 2])
def test_a_timeout_that_is_none(timeout_s: float) -> None:
    """What no lock can wait for is a RangeError that says the value."""
    with pytest.raises(RangeError, match=f"timeout_s is {timeout_s}"):
        EventLog().flush(timeout_s)


@pytest.mark.row("E15", "E9")
@pytest.mark.parametrize("limited", [False, True])
def test_a_forked_child_tells_its_own_events(limited: bool) -> None:
    """In a child subscribers hear what happens there, whatever locks were taken; with no thread, operations go on."""
    log, heard = EventLog(), list[int]()
    log.subscribe(lambda event: heard.append(event.sequence))
    log.append(Event(EventKind.TSC, "1"))
    assert log.flush()
    locks = log._delivery._lock, log._store._lock
    for lock in locks:
        lock.acquire()
    child = os.fork()
    if child == 0:
        signal.alarm(HANG_S)  # a lock that is never let go ends the child, not the test
        status = 1
        try:
            status = 0 if told_in_child(log, heard, limited=limited) else 2
        finally:
            os._exit(status)
    for lock in locks:
        lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    log.append(Event(EventKind.TSC, "2"))
    assert log.flush()
    assert heard == [1, 2]


def told_in_child(log: EventLog, heard: list[int], *, limited: bool) -> bool:
    """Is it as the test above says?"""
    if limited:
        pytest.MonkeyPatch().setattr(threading.Thread, "start", no_thread)
        log.append(Event(EventKind.TSC, "2"))
        with pytest.raises(StateError, match="flush: cannot start a thread"):
            log.flush(HANG_S)
        return heard == [1] and log.last == 2
    log.append(Event(EventKind.TSC, "2"))
    return log.flush(HANG_S) and heard == [1, 2]
