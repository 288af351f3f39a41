"""Two threads at an event log's lines, in every order of a fixed schedule; and an interrupt at each line."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import count

import pytest

from pvclock.clock.event_log import EventLog
from pvclock.timekeeping.events import Event, EventKind
from tests.unit.fault_points import EVENTS
from tests.unit.schedules import Beside, Lines, end_of, threads_named
from tests.waiting import HANG_S

NAME = "pvclock-events"


class Heard:
    """A log, one subscriber that stays, and one that comes and goes; what each heard."""

    def __init__(self) -> None:
        self.log = EventLog()
        self.staying: list[int] = []
        self.guest: list[int] = []
        self.stays = False  # does the one that goes hear events to the end?
        self._threads = threads_named(NAME)
        self._end = self.log.subscribe(lambda event: self.staying.append(event.sequence))
        self.leave: Callable[[], None] = lambda: None

    def come(self) -> None:
        """Subscribe the one that goes."""
        self.stays = True
        self.leave = self.log.subscribe(lambda event: self.guest.append(event.sequence))

    def come_and_leave(self) -> None:
        """Subscribe another one, and end that."""
        self.log.subscribe(list[Event]().append)()

    def operation(self, name: str) -> Callable[[], object]:
        """What can be done."""
        operations: dict[str, Callable[[], object]] = {
            "come": self.come,
            "leave": self.go,
            "come and leave": self.come_and_leave,
            "append": self.append,
            "flush": self.log.flush,
            "a look at flush": lambda: self.log.flush(timeout_s=0),
        }
        return operations[name]

    def go(self) -> None:
        """End the subscription of the one that goes."""
        self.leave()
        self.stays = False

    def append(self) -> None:
        """Append an event."""
        self.log.append(Event(EventKind.TSC, ""))

    def end(self) -> None:
        """All must be whole: events told in order and once, nothing left taken, and no thread but the log's own."""
        last = self.log.append(Event(EventKind.TSC, "")).sequence
        assert self.log.flush(HANG_S)
        assert self.staying[:last] == list(range(1, last + 1))
        assert self.log.read().lost == 0
        assert self.guest == list(range(self.guest[0], self.guest[-1] + 1) if self.guest else ())
        assert (last in self.guest) == self.stays
        assert len(threads_named(NAME) - self._threads) == 1
        self.leave()
        self._end()
        end_of(threads_named(NAME) - self._threads)
        assert self.log.failures == ()

    def locks(self) -> tuple[Callable[[], threading.Lock], ...]:
        """The locks that a thread beside may have to wait for."""
        return (lambda: self.log._delivery._lock), (lambda: self.log._store._lock)


def prepared(operation: str) -> tuple[Heard, Callable[[], object]]:
    """A log on which `operation` can be done."""
    heard = Heard()
    if operation == "leave":
        heard.come()
    return heard, heard.operation(operation)


OPERATIONS = ("come", "leave", "append", "flush")


@pytest.mark.row("E15", "E9")
@pytest.mark.parametrize("first", OPERATIONS)
@pytest.mark.parametrize("second", ["append", "flush", "come and leave"])
def test_two_operations_meet_at_each_line(first: str, second: str) -> None:
    """While one stands at any of its lines another thread does the other: what is heard is whole and in order."""
    for line in count():
        heard, operation = prepared(first)
        beside = Beside(heard.operation(second), *heard.locks())
        lines = Lines(*EVENTS, at=line, action=beside.run)
        with lines.traced():
            operation()
        if lines.count <= line:
            heard.end()
            break
        beside.end()
        heard.end()
    assert line >= 4


@pytest.mark.row("E15", "E9")
@pytest.mark.parametrize("second", ["append", "a look at flush", "come and leave"])
def test_an_operation_meets_the_thread_at_each_line(second: str) -> None:
    """While the thread that tells stands at any line, from its first to its last, an operation goes on beside it."""
    for line in count():
        there, besides = threading.Event(), list[Beside]()

        def meet(there: threading.Event = there, besides: list[Beside] = besides) -> None:
            assert there.wait(HANG_S)
            besides[0].run()

        lines = Lines(*EVENTS, at=line, action=meet)
        with lines.traced_in_new_threads():
            heard = Heard()
        besides.append(Beside(heard.operation(second), *heard.locks()))
        there.set()
        heard.append()
        heard.end()
        besides[0].end()
        if lines.count <= line:
            break
    assert line >= 20


@pytest.mark.row("E15", "E9")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_interrupt_at_each_line(operation: str) -> None:
    """KeyboardInterrupt at any line of an operation leaves no lock taken and nothing untold; it can be done again."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    for line in count():
        heard, operate = prepared(operation)
        lines = Lines(*EVENTS, at=line, action=interrupt)
        try:
            with lines.traced():
                operate()
        except KeyboardInterrupt:
            operate()
            heard.end()
        else:
            assert lines.count <= line
            heard.end()
            break
    assert line >= 4


@pytest.mark.row("E15", "E9")
def test_an_interrupt_at_each_line_of_the_first_subscription() -> None:
    """KeyboardInterrupt while the thread is begun, in the standard library, too: there is one at the next try."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    for line in count():
        log, heard = EventLog(), list[Event]()
        lines = Lines(*EVENTS, threading, at=line, action=interrupt)
        interrupted = True
        try:
            with lines.traced():
                log.subscribe(list[Event]().append)
            interrupted = False
        except (KeyboardInterrupt, RuntimeError):  # the latter by threading's own lines, with the former behind it
            pass
        end = log.subscribe(heard.append)
        log.append(Event(EventKind.TSC, ""))
        assert log.flush(HANG_S)
        assert heard == list(log.read().events)
        assert len(heard) == 1
        end()
        if not interrupted:
            break
    assert line >= 20
