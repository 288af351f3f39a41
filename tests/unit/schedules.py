"""Schedules that are the same each time: what happens at the n-th line that a thread runs in given files."""

from __future__ import annotations

import linecache
import math
import sys
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from types import CodeType, FrameType, ModuleType
from typing import Any, NamedTuple

from tests.waiting import HANG_S


class Place(NamedTuple):
    """Where a thread is, before it runs a line for the `visit`th time (from 1 on)."""

    code: CodeType
    line: int
    visit: int


class Lines:
    """Counts the lines that traced threads run in `modules`, and calls `action` before the line `at` (from 0 on).

    A line is counted the first `visits` times that it is run.  places: those that were counted, in order.
    """

    def __init__(
        self,
        *modules: ModuleType,
        at: int = -1,
        action: Callable[[], object] = lambda: None,
        visits: float = math.inf,
    ) -> None:
        self._files = {module.__file__ for module in modules}
        self._visits_counted = visits
        self._visits: Counter[tuple[str, int]] = Counter()
        self._at = at
        self._action = action
        self._within: list[tuple[FrameType, int]] = []
        self._events: Counter[tuple[int, int]] = Counter()
        self.places: list[Place] = []

    @property
    def count(self) -> int:
        """How many lines were counted."""
        return len(self.places)

    def trace(self, frame: FrameType, event: str, _argument: Any) -> Lines.Trace | None:  # noqa: ANN401  # typeshed's
        """See sys.settrace()."""
        if frame.f_code.co_filename not in self._files:
            return None
        if event == "line":
            event_at = id(frame.f_code), frame.f_lineno
            self._events[event_at] += 1
            if not self._is_no_call(frame) and self._is_counted(frame):
                self.places.append(Place(frame.f_code, frame.f_lineno, self._events[event_at]))
                if self.count == self._at + 1:
                    self._action()
        return self.trace

    def _is_counted(self, frame: FrameType) -> bool:
        line = frame.f_code.co_filename, frame.f_lineno
        self._visits[line] += 1
        return self._visits[line] <= self._visits_counted

    def _is_no_call(self, frame: FrameType) -> bool:
        """Is this a `try`, or the end of a `with` block, whose first line Python traces again?

        Python handles signals where it calls or loops.  An exception at these lines would leave a lock taken that no
        interrupt can leave taken.
        """
        statement = _statement(frame.f_code.co_filename, frame.f_lineno)
        if statement != "with":
            return statement == "try:"
        place = frame, frame.f_lineno
        if place in self._within:
            self._within.remove(place)
            return True
        self._within.append(place)
        return False

    Trace = Callable[[FrameType, str, Any], Any]

    def traced(self) -> AbstractContextManager[None]:
        """Trace this thread."""
        return _tracing(self.trace)

    @contextmanager
    def traced_in_new_threads(self) -> Iterator[Lines]:
        """Trace the threads that begin meanwhile."""
        before = threading.gettrace()
        threading.settrace(self.trace)
        try:
            yield self
        finally:
            threading.settrace(before)


def places_in(operate: Callable[[], object], modules: Collection[ModuleType], visits: float = math.inf) -> list[Place]:
    """Where `operate`, which is done here, can be disturbed: at each line of `modules`, the first `visits` times."""
    lines = Lines(*modules, visits=visits)
    with lines.traced():
        operate()
    return lines.places


class At:
    """Calls `action` when the thread is at a place of Lines.places, once.

    Where all else is done as it was when Lines saw it, this is Lines(at=...), and quicker: one function is traced.
    """

    def __init__(self, place: Place, action: Callable[[], object]) -> None:
        self._place, self._action = place, action
        self._visits = 0

    @property
    def has_come(self) -> bool:
        """Was the thread there?"""
        return self._visits >= self._place.visit

    def trace(self, frame: FrameType, event: str, _argument: Any) -> Lines.Trace | None:  # noqa: ANN401  # typeshed's
        """See sys.settrace()."""
        if frame.f_code is not self._place.code:
            return None
        if event == "line" and frame.f_lineno == self._place.line:
            self._visits += 1
            if self._visits == self._place.visit:
                self._action()
        return self.trace

    def traced(self) -> AbstractContextManager[None]:
        """Trace this thread."""
        return _tracing(self.trace)


@contextmanager
def _tracing(trace: Lines.Trace) -> Iterator[None]:
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@cache
def _statement(file: str, line: int) -> str:
    """The word that a line begins with."""
    return (linecache.getline(file, line).split(maxsplit=1) or [""])[0]


class Beside:
    """A thread that runs `operation` while another stands still: to its end, or until it wants a lock of `locks`."""

    def __init__(self, operation: Callable[[], object], *locks: Callable[[], threading.Lock]) -> None:
        self._thread = threading.Thread(target=operation)
        self._locks = locks

    def run(self) -> None:
        """Begin; return at the end, or at once if a lock is taken that it may want."""
        self._thread.start()
        if not any(lock().locked() for lock in self._locks):
            self.end()

    def end(self) -> None:
        """Wait for the end, if it was begun."""
        if self._thread.ident is not None:
            self._thread.join(HANG_S)
        assert not self._thread.is_alive()


def threads_named(name: str) -> set[threading.Thread]:
    """The threads of that name that run."""
    return {thread for thread in threading.enumerate() if thread.name == name}


def end_of(threads: set[threading.Thread]) -> None:
    """Wait until they have ended."""
    for thread in threads:
        thread.join(HANG_S)
        assert not thread.is_alive()
