"""Run states: what may follow what, and how handlers hear of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import pytest

from pvclock import StateError, WrongType
from pvclock.machine import RunState, RunStates
from tests.waiting import HANG_S

pytestmark = pytest.mark.row("E9")

PRELAUNCH, RUNNING, PAUSED = RunState.PRELAUNCH, RunState.RUNNING, RunState.PAUSED
SHUTDOWN, GUEST_PANICKED, INTERNAL_ERROR = RunState.SHUTDOWN, RunState.GUEST_PANICKED, RunState.INTERNAL_ERROR

WAYS: dict[RunState, tuple[RunState, ...]] = {
    PRELAUNCH: (),
    RUNNING: (RUNNING,),
    PAUSED: (PAUSED,),
    SHUTDOWN: (SHUTDOWN,),
    GUEST_PANICKED: (GUEST_PANICKED,),
    INTERNAL_ERROR: (INTERNAL_ERROR,),
}
"""From prelaunch to each."""

ILLEGAL = {
    *((INTERNAL_ERROR, state) for state in (RUNNING, PAUSED, SHUTDOWN, GUEST_PANICKED)),
    *((GUEST_PANICKED, state) for state in (RUNNING, PAUSED, SHUTDOWN)),
    (SHUTDOWN, GUEST_PANICKED),
}


def go(states: RunStates, *way: RunState) -> None:
    """Take the states in turn."""
    for state in way:
        states.update(lambda: state)  # noqa: B023  # called at once


def test_names_are_qemus() -> None:
    """They are what query-status says."""
    names = ["prelaunch", "running", "paused", "shutdown", "guest-panicked", "internal-error"]
    assert [str(state) for state in RunState] == names


@pytest.mark.parametrize(("before", "now"), list(product(RunState, RunState)))
def test_what_may_follow(before: RunState, now: RunState) -> None:
    """An illegal transition is a StateError, and the state stays; the same state again is no change."""
    states = RunStates()
    go(states, *WAYS[before])
    told: list[tuple[RunState, RunState]] = []
    states.add_handler(lambda *change: told.append(change))
    if (before, now) in ILLEGAL:
        with pytest.raises(StateError, match=f"the machine is in state {before}"):
            states.check("start", now)
        with pytest.raises(StateError, match=f"^run state: the machine is in state {before}; .* it$"):
            go(states, now)
        assert (states.current, told) == (before, [])
    else:
        states.check("start", now)
        go(states, now)
        assert (states.current, told) == (now, [] if now is before else [(before, now)])


def test_handlers_come_by_priority() -> None:
    """Lower first on the way to running, last on the way from it; removed ones no more."""
    states, log = RunStates(), list[str]()
    handlers = {name: lambda *_, name=name: log.append(name) for name in ("b1", "a", "b2", "c")}
    for name, priority in (("b1", 0), ("c", 5), ("a", -5), ("b2", 0)):
        states.add_handler(handlers[name], priority=priority)
    go(states, RUNNING)
    go(states, PAUSED)
    assert log == ["a", "b1", "b2", "c", "c", "b2", "b1", "a"]
    states.remove_handler(handlers["a"])
    with pytest.raises(StateError, match="this handler was not added"):
        states.remove_handler(handlers["a"])
    del log[:]
    go(states, RUNNING)
    assert log == ["b1", "b2", "c"]


def test_each_change_is_told_whole() -> None:
    """A handler that makes the next change does not let others hear of that one first."""
    states, log = RunStates(), list[tuple[str, RunState]]()

    def first(_before: RunState, now: RunState) -> None:
        log.append(("first", now))
        if now is RUNNING:
            go(states, PAUSED)

    states.add_handler(first, priority=-1)
    states.add_handler(lambda _, now: log.append(("second", now)))
    go(states, RUNNING)
    assert log == [("first", RUNNING), ("second", RUNNING), ("second", PAUSED), ("first", PAUSED)]
    assert states.current is PAUSED


def test_a_handler_that_raises() -> None:
    """The others are told all the same, the state has changed, and the error comes out."""
    states, told = RunStates(), list[RunState]()

    def fail(*_: RunState) -> None:
        raise ZeroDivisionError

    states.add_handler(fail)
    states.add_handler(lambda _, now: told.append(now), priority=1)
    with pytest.raises(ZeroDivisionError):
        go(states, RUNNING)
    assert (states.current, told) == (RUNNING, [RUNNING])


def test_a_handler_may_wait_for_a_thread_that_changes_the_state() -> None:
    """No lock is taken around handlers; the other thread's change is told after this one, in order."""
    states, log = RunStates(), list[RunState]()

    def handler(_before: RunState, now: RunState) -> None:
        log.append(now)
        if now is RUNNING:
            thread = threading.Thread(target=go, args=(states, SHUTDOWN))
            thread.start()
            thread.join(HANG_S)
            assert not thread.is_alive()

    states.add_handler(handler)
    go(states, RUNNING)
    assert log == [RUNNING, SHUTDOWN]


def test_a_handler_that_is_interrupted() -> None:
    """The others are told all the same, the interrupt comes out before other errors, and later changes are told."""
    states, told = RunStates(), list[RunState]()
    errors: list[type[BaseException]] = [ZeroDivisionError, KeyboardInterrupt]

    def fail(*_: RunState) -> None:
        if errors:
            raise errors.pop(0)

    states.add_handler(fail, priority=-2)
    states.add_handler(fail, priority=-1)
    states.add_handler(lambda _, now: told.append(now))
    with pytest.raises(KeyboardInterrupt):
        go(states, RUNNING)
    go(states, PAUSED)
    assert told == [RUNNING, PAUSED]


def test_vcpus_are_kept_out_until_running_is_told() -> None:
    """Also where another thread is telling of an earlier change: it lets them in."""
    states, log = RunStates(), list[str]()

    @contextmanager
    def keep_out() -> Iterator[None]:
        log.append("out")
        yield
        log.append("in")

    def handler(_before: RunState, now: RunState) -> None:
        log.append(str(now))
        if now is PAUSED:
            thread = threading.Thread(target=states.update, args=(lambda: RUNNING, keep_out))
            thread.start()
            thread.join(HANG_S)
            log.append("returned")

    states.add_handler(handler)
    go(states, PAUSED)
    assert log == ["paused", "out", "returned", "running", "in"]


def test_what_is_not_a_handler() -> None:
    """WrongType names the argument."""
    with pytest.raises(WrongType, match="handler is 1, an int; it can be a function"):
        RunStates().add_handler(1)  # type: ignore[arg-type]
    with pytest.raises(WrongType, match=r"priority is 1\.5"):
        RunStates().add_handler(print, priority=1.5)  # type: ignore[arg-type]
