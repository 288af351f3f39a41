"""How subscribers are told of events: in order, by a thread of the log's own, whatever they do."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import pytest

from pvclock import GuestClock, GuestMemory, SimulatedBackend
from pvclock.clock.event_delivery import FAILURES_KEPT
from pvclock.clock.event_log import EventLog
from pvclock.timekeeping.events import Event, EventKind
from tests.waiting import HANG_S

NS_PER_MINUTE = 60 * 10**9
NAME = "pvclock-events"


def numbers(events: list[Event]) -> list[int]:
    """The events' sequence numbers, each of which must be its reason."""
    assert all(event.why == str(event.sequence) for event in events)
    return [event.sequence for event in events]


@pytest.mark.row("E15")
def test_a_subscriber_hears_of_jumps(tmp_path: Path) -> None:
    """A file is touched when a clock steps by more than half an hour, either way, and is not for less."""
    touched = tmp_path / "jumped"
    for minutes, jumped in ((0, False), (30, False), (31, True), (-31, True)):
        backend = SimulatedBackend(10**9)
        clock = GuestClock(GuestMemory(bytearray(1 << 14)), backend=backend)
        clock.events.subscribe(lambda event: touched.touch() if abs(event.jump_ns) > 30 * NS_PER_MINUTE else None)
        backend.advance(ns=60 * NS_PER_MINUTE)
        clock.offset(minutes * NS_PER_MINUTE)
        assert clock.now() == (60 + minutes) * NS_PER_MINUTE
        assert clock.events.flush()
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


@pytest.mark.row("E15", "E9")
def test_what_the_bound_took_is_not_replaced_by_what_is_not_to_be_told_yet() -> None:
    """Where all events up to the last deliver() are gone, those recorded since wait for the next one all the same."""
    log, heard = EventLog(1), list[int]()
    entered, hold = threading.Event(), threading.Event()

    def block(event: Event) -> None:
        entered.set()
        assert hold.wait(HANG_S)
        heard.append(event.sequence)

    log.subscribe(block)
    log.append(Event(EventKind.TSC, "1"))
    assert entered.wait(HANG_S)
    log.append(Event(EventKind.TSC, "2"))
    log.record(Event(EventKind.TSC, "3"))
    wake_up = log._delivery._wake_up
    assert wake_up is not None
    assert log._delivery._next_due(wake_up) is None
    hold.set()
    assert log.flush()
    assert heard == [1, 3]
