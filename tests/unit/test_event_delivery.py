"""How subscribers are told of events: in order, by a thread of the log's own, whatever they do."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from itertools import chain
from pathlib import Path

import pytest

from pvclock.errors import RangeError, StateError
from pvclock.event_delivery import FAILURES_KEPT
from pvclock.event_log import EventLog
from pvclock.events import Event, EventKind
from tests.unit.schedules import LIMIT_S, end_of, threads_named

NS_PER_MINUTE = 60 * 10**9
NAME = "pvclock-events"


def numbers(events: list[Event]) -> list[int]:
    """The events' sequence numbers, each of which must be its reason."""
    assert all(event.why == str(event.sequence) for event in events)
    return [event.sequence for event in events]


@pytest.mark.row("E15", "TM-16")
def test_a_subscriber_hears_of_jumps(tmp_path: Path) -> None:
    """A file is touched when guest time steps by more than half an hour, either way, and is not for less."""
    touched = tmp_path / "jumped"
    log = EventLog()
    log.subscribe(lambda event: touched.touch() if abs(event.jump_ns) > 30 * NS_PER_MINUTE else None)
    for minutes, jumped in ((0, False), (30, False), (31, True), (-31, True)):
        log.append(Event(EventKind.OFFSET, "asked for", guest_ns_after=Fraction(minutes * NS_PER_MINUTE)))
        assert log.flush()
        assert touched.exists() == jumped
        touched.unlink(missing_ok=True)


@pytest.mark.row("E15")
def test_a_subscription_begins_and_ends() -> None:
    """A subscriber is told what comes between subscribing and unsubscribing, which may be repeated."""
    log, heard, all_heard = EventLog(), list[Event](), list[Event]()
    log.append(Event(EventKind.TSC, "1"))
    log.append(Event(EventKind.TSC, "2"))
    unsubscribe = log.subscribe(heard.append)
    log.subscribe(all_heard.append)
    log.append(Event(EventKind.PAUSE, "3"))
    assert log.flush()
    unsubscribe()
    unsubscribe()
    log.append(Event(EventKind.RESUME, "4"))
    assert log.flush()
    assert (numbers(heard), numbers(all_heard)) == ([3], [3, 4])


@pytest.mark.row("E15", "E9")
def test_a_subscriber_that_raises_harms_nobody() -> None:
    """Its error is kept and goes no further, the others are told, and it is told what follows; old errors make room."""
    log = EventLog()
    heard: dict[str, list[int]] = {"before": [], "raising": [], "after": []}

    def listener(name: str) -> Callable[[Event], None]:
        def hear(event: Event) -> None:
            heard[name].append(event.sequence)
            if name == "raising":
                raise ValueError(f"no {event.sequence}")

        return hear

    raising = listener("raising")
    for callback in (listener("before"), raising, listener("after")):
        log.subscribe(callback)
    for number in range(1, FAILURES_KEPT + 5):
        assert log.append(Event(EventKind.TSC, str(number))).sequence == number
    assert log.flush()
    everything = list(range(1, FAILURES_KEPT + 5))
    assert heard == {"before": everything, "raising": everything, "after": everything}
    assert [failure.sequence for failure in log.failures] == everything[-FAILURES_KEPT:]
    assert str(log.failures[-1].error) == f"no {everything[-1]}"
    assert log.failures[-1].callback is raising


@pytest.mark.row("E15", "E9")
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_would_end_a_program_ends_nothing(error: type[BaseException]) -> None:
    """KeyboardInterrupt and its like in a subscriber are kept, too: no operation raises it, the thread goes on."""
    log, heard = EventLog(), list[Event]()

    def interrupt(event: Event) -> None:
        if event.sequence == 1:
            raise error

    log.subscribe(interrupt)
    log.subscribe(heard.append)
    log.append(Event(EventKind.TSC, "1"))
    log.append(Event(EventKind.TSC, "2"))
    assert log.flush()
    assert [(failure.sequence, type(failure.error)) for failure in log.failures] == [(1, error)]
    assert numbers(heard) == [1, 2]


@pytest.mark.row("E15", "E9")
def test_recorded_events_wait_for_delivery() -> None:
    """record() tells nobody, as a caller with vCPUs held needs it; deliver() tells all, in order, and once."""
    log, heard = EventLog(), list[Event]()
    log.subscribe(heard.append)
    for number in range(1, 4):
        log.record(Event(EventKind.TSC, str(number)))
    wake_up = log._delivery._wake_up
    assert wake_up is not None
    assert log._delivery.tell_all(wake_up)  # what the thread would do if it woke now
    assert heard == []
    log.deliver()
    log.deliver()
    assert log.flush()
    assert numbers(heard) == [1, 2, 3]


@pytest.mark.row("E15", "E9")
def test_a_subscriber_may_append_read_and_unsubscribe() -> None:
    """Calls from within a subscriber neither deadlock nor disorder: all hear both events, in the order of numbers."""
    log, heard = EventLog(), list[tuple[str, int]]()

    def answer(event: Event) -> None:
        heard.append(("answering", event.sequence))
        assert log.read().last == event.sequence
        if event.sequence == 1:
            log.append(Event(EventKind.REFUSED, "2"))
            assert log.flush()  # which would wait for itself
        else:
            unsubscribe()

    unsubscribe = log.subscribe(answer)
    log.subscribe(lambda event: heard.append(("other", event.sequence)))
    log.append(Event(EventKind.TSC, "1"))
    assert log.flush()
    assert log.flush()  # the event which the subscriber appended
    log.append(Event(EventKind.TSC, "3"))
    assert log.flush()
    assert heard == [("answering", 1), ("other", 1), ("answering", 2), ("other", 2), ("other", 3)]


@pytest.mark.row("E15")
def test_a_subscriber_that_the_bound_overtakes_sees_the_gap() -> None:
    """What was lost before it could be told shows as missing numbers, and the rest comes in order."""
    log, heard = EventLog(3), list[Event]()
    log.subscribe(heard.append)
    for number in range(1, 9):
        log.record(Event(EventKind.TSC, str(number)))
    log.deliver()
    assert log.flush()
    assert numbers(heard) == [6, 7, 8]


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Let threads take turns as often as the interpreter can."""
    usual_seconds = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual_seconds)


@pytest.mark.stress
@pytest.mark.row("E15", "E9")
@pytest.mark.usefixtures("hasty_threads")
def test_threads_append_and_each_event_is_told_once() -> None:
    """With four threads appending at once, numbers stay gapless and a subscriber hears every one, in order."""
    log, heard = EventLog(10_000), list[int]()

    def hear(event: Event) -> None:
        time.sleep(event.sequence % 3 * 1e-4)  # so that a second deliverer, if there were one, would overtake the first
        heard.append(event.sequence)

    log.subscribe(hear)
    begin = threading.Barrier(4)
    given_numbers: list[list[int]] = [[] for _ in range(4)]

    def append(mine: list[int]) -> None:
        begin.wait()
        for _ in range(300):
            mine.append(log.append(Event(EventKind.TSC, "")).sequence)
            time.sleep(1e-3)  # else one thread delivers all the time, and the change of hands goes untested

    threads = [threading.Thread(target=append, args=(mine,)) for mine in given_numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log.flush()
    everything = list(range(1, 1201))
    assert sorted(chain.from_iterable(given_numbers)) == everything
    assert [event.sequence for event in log.read().events] == everything
    assert heard == everything


# The thread


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
        assert hold.wait(LIMIT_S)
        heard.append(event.sequence)

    unsubscribe = log.subscribe(block)
    log.append(Event(EventKind.TSC, "1"))
    assert entered.wait(LIMIT_S)
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
        with pytest.raises(StateError, match="subscribe: no thread begins: can't start new thread; end some"):
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
    with log._delivery._lock, log._store._lock:
        child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if told_in_child(log, heard, limited=limited) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    log.append(Event(EventKind.TSC, "2"))
    assert log.flush()
    assert heard == [1, 2]


def told_in_child(log: EventLog, heard: list[int], *, limited: bool) -> bool:
    """Is it as the test above says?"""
    if limited:
        pytest.MonkeyPatch().setattr(threading.Thread, "start", no_thread)
        log.append(Event(EventKind.TSC, "2"))
        with pytest.raises(StateError, match="flush: no thread begins"):
            log.flush(LIMIT_S)
        return heard == [1] and log.last == 2
    log.append(Event(EventKind.TSC, "2"))
    return log.flush(LIMIT_S) and heard == [1, 2]
