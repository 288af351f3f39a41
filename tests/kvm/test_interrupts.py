"""KeyboardInterrupt anywhere in a machine's life: at each line of ours in turn, by a fault point, and without a clock.

A fault point is a trace function that raises at the n-th line that the thread comes to (tests.unit.schedules.Lines).
"""

from __future__ import annotations

import gc
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Final

import pytest

import pvclock
from pvclock import Machine
from pvclock.errors import StateError
from tests.kvm.leaks import held
from tests.unit.alarm_provider import register
from tests.unit.schedules import Lines
from tests.waiting import HANG_S, alarm_after

pytestmark = [pytest.mark.kvm, pytest.mark.row("E9")]

SPIN: Final = bytes.fromhex("66ff060050 ebf9")  # 1: incl DATA; jmp 1b
DATA: Final = 0x5000
MS: Final = 10**6
TICKER_THREADS: Final = 2
"""One keeps the schedule, one ticks."""

PACKAGE: Final = str(Path(pvclock.__file__).parent)
VCPUS_AND_MACHINE: Final = (f"{PACKAGE}/kvm/", f"{PACKAGE}/machine/", __file__)
MACHINE_AND_RUNNER: Final = (f"{PACKAGE}/kvm/runner.py", f"{PACKAGE}/machine/", __file__)
MACHINE_AND_TIMERS: Final = (
    f"{PACKAGE}/machine/",
    f"{PACKAGE}/clock/timer_thread.py",
    f"{PACKAGE}/threads.py",
    __file__,
)
EVERYTHING: Final = (PACKAGE, __file__)


def nothing(_machine: Machine) -> None:
    """Leave a machine as it was made."""


def start_and_pause(machine: Machine) -> None:
    """Have a machine that was running and is paused."""
    machine.start()
    machine.pause()


def start_and_stop(machine: Machine) -> None:
    """Have a machine whose run has ended."""
    machine.start()
    machine.stop()


def quiesce(machine: Machine) -> None:
    """Keep the vCPUs out for a moment."""
    with machine.runner.quiesce():
        machine.runner.thread_id(0)


CALLS: Final[dict[str, tuple[Callable[[Machine], object], Callable[[Machine], object]]]] = {
    "start": (nothing, Machine.start),
    "pause": (Machine.start, Machine.pause),
    "resume": (start_and_pause, Machine.resume),
    "quiesce": (Machine.start, quiesce),
    "run_for": (start_and_pause, lambda machine: machine.run_for(MS)),
    "stop": (Machine.start, Machine.stop),
    "stop while paused": (start_and_pause, Machine.stop),
    "close": (Machine.start, Machine.close),
    "start again": (start_and_stop, Machine.start),
    "reset": (Machine.start, Machine.reset),
    "reset while paused": (start_and_pause, Machine.reset),
}

OF_MANY_LINES: Final = ("pause", "resume", "run_for")

RESETS: Final = ("reset", "reset while paused")
"""Of thousands of lines, most of which check registers: they are interrupted in the machine and the runner alone."""


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    """Turn a wait for ever into a failure: all waits here can be interrupted.  What earlier tests left is collected."""
    gc.collect()
    with alarm_after(HANG_S):
        yield


def interrupted(line: int, files: tuple[str, ...], call: Callable[[], object]) -> bool:
    """Make the call, with a KeyboardInterrupt at the `line`-th line of `files`; False if it ends before.

    What follows may take `HANG_S` again, however many lines there were before.
    """
    signal.alarm(HANG_S)
    has_come = False

    def interrupt() -> None:
        nonlocal has_come
        has_come = True
        raise KeyboardInterrupt

    loaded = [module for module in sys.modules.values() if (getattr(module, "__file__", None) or "").startswith(files)]
    sources = [module for module in loaded if (module.__file__ or "").endswith(".py")]
    was_raised = False
    gc.disable()  # an interrupt in a finalizer of what an earlier call left is swallowed, as Python says it is
    try:
        with Lines(*sources, at=line - 1, action=interrupt).traced():
            call()
    except KeyboardInterrupt:
        was_raised = True
    finally:
        gc.enable()
    assert was_raised is has_come, "the interrupt was swallowed"
    return was_raised


def counts_on(machine: Machine) -> None:
    """Return once the guest has gone on."""
    before = machine.memory.read(DATA, 4)
    while machine.memory.read(DATA, 4) == before:
        assert not machine.runner.join(0)


@pytest.mark.each_line
@pytest.mark.parametrize("name", CALLS)
def test_an_interrupted_call_leaves_a_machine_that_works(name: str) -> None:
    """After an interrupt at any line, pause(), resume() and close() do what they say, and nothing is left."""
    prepare, call = CALLS[name]
    files = MACHINE_AND_RUNNER if name in RESETS else VCPUS_AND_MACHINE
    before = held()
    for line in count(1):
        with Machine(SPIN, vcpus=2) as machine:
            prepare(machine)
            if not (was_interrupted := interrupted(line, files, lambda: call(machine))):
                break
            if name != "close":
                works(machine)
        assert held() == before
    assert not was_interrupted
    assert line > 2, "no line was interrupted"
    assert held() == before


def works(machine: Machine) -> None:
    """Pause and resume a machine, which runs afterwards if it was started and not stopped."""
    machine.pause()
    assert machine.runner.gate.keeps_all_out()
    assert len({machine.memory.read(DATA, 4) for _ in range(50)}) == 1
    machine.resume()
    if machine.runner.gate.has_begun() and not machine.runner.gate.has_ended():
        counts_on(machine)


@pytest.mark.each_line
def test_an_interrupted_start_of_a_restored_machine() -> None:
    """At any line: no vCPU runs on a clock that stands still, and resume() is all it takes."""
    with Machine(SPIN, vcpus=2) as machine:
        machine.pause()
        state = machine.save()
    before = held()
    for line in count(1):
        with Machine(SPIN, vcpus=2, restore=state) as machine:
            assert machine.clock is not None
            was_interrupted = interrupted(line, VCPUS_AND_MACHINE, machine.start)
            assert machine.runner.gate.is_paused() or not machine.clock.is_paused
            works(machine)
            assert not machine.clock.is_paused
        assert held() == before
        if not was_interrupted:
            break
    assert line > 10


@pytest.mark.each_line
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long) if name in OF_MANY_LINES else name
        for name in CALLS
        if name not in RESETS
    ],
)
def test_close_ends_whatever_was_interrupted(name: str) -> None:
    """After an interrupt at each line, the clock's among them, close() ends and no thread or descriptor is left."""
    prepare, call = CALLS[name]
    before = held()
    for line in count(1):
        with Machine(SPIN, vcpus=2) as machine:
            prepare(machine)
            was_interrupted = interrupted(line, EVERYTHING, lambda: call(machine))
        assert held() == before
        if not was_interrupted:
            break
    assert line > 3


@pytest.mark.each_line
@pytest.mark.parametrize(
    "name",
    ["start", "pause", *(pytest.param(name, marks=pytest.mark.long) for name in ("stop", "close", "start again"))],
)
def test_close_ends_timers_whatever_was_interrupted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an interrupt at each line of the machine and its timers' thread, too."""
    register(monkeypatch)
    prepare, call = CALLS[name]
    before = held()
    for line in count(1):
        with Machine(SPIN, provider="Alarm") as machine:
            prepare(machine)
            was_interrupted = interrupted(line, MACHINE_AND_TIMERS, lambda: call(machine))
        assert held() == before
        if not was_interrupted:
            break
    assert line > 50


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # Python says so of memory that was just made
def test_an_interrupt_while_a_machine_is_made() -> None:
    """At any line of the constructor: nothing is left."""
    files = tuple(f"{PACKAGE}/machine/{name}.py" for name in ("machine", "hardware", "ram"))
    before = held()
    for line in count(1):
        made: list[Machine] = []
        was_interrupted = interrupted(line, files, lambda: made.append(Machine(SPIN)))  # noqa: B023
        for machine in made:
            machine.close()
        if not was_interrupted:
            break
    gc.collect()
    assert held() == before
    assert line > 50


# Threads that cannot be had


def start_threads(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let only so many more threads begin."""
    start = threading.Thread.start
    started: list[threading.Thread] = []

    def start_some(thread: threading.Thread) -> None:
        if len(started) == limit:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_some)


@pytest.mark.parametrize("nth", [0, 1, 2])
def test_a_run_for_which_there_are_no_threads(nth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """start() says so where the nth vCPU gets no thread; no guest has run, nothing ticks, and close() ends."""
    before = held()
    with Machine(SPIN, vcpus=3) as machine:
        start_threads(TICKER_THREADS + nth, monkeypatch)
        with pytest.raises(StateError, match=r"a vCPU has no thread: can't start new thread; .*ulimit -u"):
            machine.start()
        monkeypatch.undo()
        assert machine.memory.read(DATA, 4) == bytes(4)
        assert machine.runner.join(0)
        assert machine.ticker is not None
        assert not machine.ticker.has_threads
        with pytest.raises(StateError, match="a vCPU has no thread"):
            machine.wait()
    assert held() == before


@pytest.mark.parametrize("limit", range(TICKER_THREADS))
def test_a_ticker_for_which_there_are_no_threads(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """start() says so, and has done nothing: it can be called again."""
    before = held()
    with Machine(SPIN, vcpus=2) as machine:
        start_threads(limit, monkeypatch)
        with pytest.raises(StateError, match="cannot start a thread: can't start new thread"):
            machine.start()
        monkeypatch.undo()
        assert machine.memory.read(DATA, 4) == bytes(4)
        assert not machine.runner.gate.has_begun()
        machine.start()
        counts_on(machine)
    assert held() == before
