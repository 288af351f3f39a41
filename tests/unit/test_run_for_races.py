"""Two threads in run_for(), or one beside pause() and resume(): one runs, the other is told so, and nothing is left."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import count
from types import ModuleType
from typing import NamedTuple

import pytest

from pvclock import GuestClock, StateError, backend
from pvclock.clock import operations, timekeeper
from tests.unit.clocks import a_clock
from tests.unit.schedules import Beside, Lines

MODULES: tuple[ModuleType, ...] = (operations, timekeeper, backend)
HZ = 10**9
RUN_NS = 1000

BESIDE: dict[str, Callable[[GuestClock], object]] = {
    "run_for": lambda clock: clock.run_for(RUN_NS),
    "pause": lambda clock: clock.pause(),
    "resume": lambda clock: clock.resume(),
}


class OwnLock(NamedTuple):
    """The clock's lock, as a schedule asks: does the thread that stands still hold it?"""

    lock: threading.RLock

    def locked(self) -> bool:
        """By this thread, the one that stands still."""
        return self.lock._is_owned()


class Race:
    """A paused clock, a thread that runs it, and another one beside it."""

    def __init__(self, second: str) -> None:
        self.clock, _, memory = a_clock(HZ)
        self.clock.pause()
        self.outcomes: list[str] = []
        lock = OwnLock(memory.clock_lock)
        self.beside = Beside(lambda: self.attempt(second), lambda: lock)

    def attempt(self, name: str) -> None:
        """One operation; that it comes at a bad time is an answer."""
        try:
            BESIDE[name](self.clock)
        except StateError as error:
            self.outcomes.append(f"{error.operation} is refused")
        else:
            self.outcomes.append(name)

    def check(self, second: str) -> None:
        """What ran has run to its end, and the clock can be run again."""
        runs = self.outcomes.count("run_for")
        assert len(self.outcomes) == 2
        assert runs >= 1 or second in self.outcomes
        if not self.clock.is_paused:
            assert second == "resume"
            self.clock.pause()
        assert self.clock.now() >= RUN_NS * runs
        assert self.clock.run_for(RUN_NS).overshoot_ns < 1
        assert self.clock.is_paused


@pytest.mark.row("P-22", "E9")
@pytest.mark.parametrize("second", BESIDE)
def test_another_operation_at_each_line_of_a_run(second: str) -> None:
    """While run_for() stands at any of its lines another thread operates: both end as if one had come after another."""
    for line in count():
        race = Race(second)
        lines = Lines(*MODULES, at=line, action=race.beside.run)
        with lines.traced():
            race.attempt("run_for")
        if lines.count <= line:
            break
        race.beside.end()
        race.check(second)
    assert line >= 20
