"""Two threads in run_for(), or one beside pause() and resume(): one runs, the other is told so, and nothing is left."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from pvclock import GuestClock, SimulatedBackend, StateError
from tests.unit.clocks import a_clock
from tests.unit.fault_points import CHANGES_OF_TIME, EXECUTION_TIME
from tests.unit.schedules import At, places_in
from tests.waiting import HANG_S

HZ = 10**9
RUN_NS = 1000

BESIDE: dict[str, Callable[[GuestClock], object]] = {
    "run_for": lambda clock: clock.run_for(RUN_NS),
    "pause": lambda clock: clock.pause(),
    "resume": lambda clock: clock.resume(),
}


class Race:
    """A paused clock, a thread that runs it, and another one beside it."""

    def __init__(self, second: str) -> None:
        self.clock, _, memory = a_clock(HZ)
        self.clock.pause()
        self.outcomes: list[str] = []
        self._lock = memory.clock_lock
        self._thread = threading.Thread(target=self.attempt, args=(second,))

    def meet(self) -> None:
        """Let the other one operate: to its end, unless the thread that stands still holds the clock's lock."""
        self._thread.start()
        if not self._lock._is_owned():  # type: ignore[attr-defined]  # as threading.Condition asks
            self._thread.join(HANG_S)

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
        self._thread.join(HANG_S)
        assert not self._thread.is_alive()
        runs = self.outcomes.count("run_for")
        assert len(self.outcomes) == 2
        if second == "pause":  # time stands still, or the run owns it
            assert sorted(self.outcomes) == ["pause is refused", "run_for"]
        assert runs >= 1 or (second == "resume" and self.outcomes == ["resume", "run_for is refused"])
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
    alone = Race(second)
    places = places_in(lambda: alone.attempt("run_for"), (*CHANGES_OF_TIME, *EXECUTION_TIME))
    assert len(places) >= 20
    for place in places:
        race = Race(second)
        with At(place, race.meet).traced():
            race.attempt("run_for")
        race.check(second)


@pytest.mark.row("P-22", "E9")
def test_a_reader_beside_a_pause_sees_no_step_back() -> None:
    """While pause() stands at any of its lines time goes on, and what read() gives then and afterwards never falls."""
    alone, _, _ = a_clock(HZ)
    places = places_in(alone.pause, CHANGES_OF_TIME)
    assert len(places) >= 10
    for place in places:
        clock, host, _ = a_clock(HZ)
        seen: list[int] = []

        def look(clock: GuestClock = clock, host: SimulatedBackend = host, seen: list[int] = seen) -> None:
            host.advance(ns=1000)
            seen.append(clock.read(0))

        with At(place, look).traced():
            clock.pause()
        seen.append(clock.read(0))
        assert len(seen) == 2
        assert seen == sorted(seen)
        assert clock.read(0) == clock.now()
