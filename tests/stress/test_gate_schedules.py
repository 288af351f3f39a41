"""The gate under fixed schedules: vCPUs that enter, holders, pause, resume and end, in every order that matters.

A vCPU here is whoever calls enter() and leave().  The gate asks a vCPU that is in to exit, by a call, and there the
schedule goes on: while a holder waits.  What the words of the gate do between two calls is tests/model/gate.pml's.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from itertools import permutations

import pytest

from pvclock.errors import RangeError, StateError
from pvclock.kvm._gate import Gate, Hold
from tests.waiting import HANG_S, alarm_after

pytestmark = pytest.mark.row("E9")

KICK = signal.SIGRTMIN + 2


class Vcpu:
    """Does what the test says when it is asked to exit, each time the next thing; nothing more afterwards."""

    def __init__(self, *steps: Callable[[], object]) -> None:
        self.steps = list(steps)
        self.requests = 0

    def request_exit(self) -> None:
        """Go on with the schedule."""
        self.requests += 1
        if self.steps:
            self.steps.pop(0)()


def interrupt() -> None:
    """Be Ctrl-C."""
    raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    """Turn a wait for ever into a failure."""
    with alarm_after(HANG_S):
        yield


class Visitor:
    """A vCPU's thread that comes to a gate; `log` says when it went in."""

    def __init__(self, gate: Gate, vcpu: int, log: list[str]) -> None:
        self.thread = threading.Thread(target=self._come, args=(gate, vcpu, log), daemon=True)
        self.thread.start()

    def _come(self, gate: Gate, vcpu: int, log: list[str]) -> None:
        log.append("in" if gate.enter(vcpu) else "sent away")

    def has_gone_on(self) -> None:
        """Return once it is through."""
        self.thread.join(HANG_S)
        assert not self.thread.is_alive()


# A holder and a vCPU


def keep_a_hold(gate: Gate) -> Hold:
    """Keep vCPUs out until the hold is dropped."""
    hold = gate.hold()
    hold.__enter__()
    return hold


def test_a_holder_waits_for_the_vcpu_that_is_in() -> None:
    """hold() and pause() return once it has left, asked as often as it takes, and it is asked before they wait."""
    for keep_out in (Gate.pause, keep_a_hold):
        vcpu = Vcpu(lambda: None, lambda: None)
        gate = Gate([vcpu], KICK)
        vcpu.steps.append(lambda gate=gate: gate.leave(0))  # type: ignore[misc]
        assert gate.enter(0)
        keep_out(gate)
        assert vcpu.requests == 3


def test_a_vcpu_that_comes_while_one_holds() -> None:
    """It goes in after the hold is given back, not before; of two holders, after the second."""
    for order in permutations(("first", "second")):
        gate, log = Gate([Vcpu()], KICK), list[str]()
        holds = {name: gate.hold() for name in order}
        for hold in holds.values():
            hold.__enter__()
        visitor = Visitor(gate, 0, log)
        for name in order:
            log.append(f"{name} gives back")
            holds[name].__exit__()
        visitor.has_gone_on()
        assert log == [*(f"{name} gives back" for name in order), "in"]


@pytest.mark.parametrize("order", [("resume", "give back"), ("give back", "resume")])
def test_resume_while_one_holds(order: tuple[str, str]) -> None:
    """Pause and hold both keep a vCPU out: it goes in after both have ended, in either order."""
    gate, log = Gate([Vcpu()], KICK), list[str]()
    gate.pause()
    hold = gate.hold()
    hold.__enter__()
    steps = {"resume": gate.resume, "give back": hold.__exit__}
    visitor = Visitor(gate, 0, log)
    for name in order:
        log.append(name)
        steps[name]()
    visitor.has_gone_on()
    assert log == [*order, "in"]


def test_resume_while_pause_waits() -> None:
    """It is before the pause, which then holds."""
    vcpu = Vcpu()
    gate = Gate([vcpu], KICK)
    vcpu.steps += [gate.resume, lambda: gate.leave(0)]
    assert gate.enter(0)
    gate.pause()
    assert is_paused(gate)


def test_two_holders_wait_for_one_vcpu() -> None:
    """A second one that comes while the first waits sees the vCPU out, too, and each gives back its own."""
    vcpu = Vcpu()
    gate, log = Gate([vcpu], KICK), list[str]()
    second = gate.hold()
    vcpu.steps += [second.__enter__, lambda: gate.leave(0)]  # the second asks again, and then it leaves
    assert gate.enter(0)
    with gate.hold():
        assert vcpu.requests == 2
        visitor = Visitor(gate, 0, log)
    log.append("first gave back")
    second.__exit__()
    visitor.has_gone_on()
    assert log == ["first gave back", "in"]


def test_a_vcpu_that_holds_is_out() -> None:
    """Both of two vCPUs may hold at once, in their handlers, and neither waits for the other."""
    vcpus, log = [Vcpu(), Vcpu()], list[str]()
    gate = Gate(vcpus, KICK)
    for vcpu in range(2):
        assert gate.enter(vcpu)
        gate.leave(vcpu)
    with gate.hold():
        with gate.hold():
            visitors = [Visitor(gate, vcpu, log) for vcpu in range(2)]
            log.append("both held")
        log.append("one holds")
    for visitor in visitors:
        visitor.has_gone_on()
    assert log == ["both held", "one holds", "in", "in"]
    assert [vcpu.requests for vcpu in vcpus] == [0, 0]


def is_paused(gate: Gate) -> bool:
    """Tell whether a vCPU that comes goes in after resume() only."""
    log: list[str] = []
    visitor = Visitor(gate, 0, log)
    log.append("resumed")
    gate.resume()
    visitor.has_gone_on()
    return log == ["resumed", "in"]


# Interrupts


@pytest.mark.parametrize("paused_before", [False, True])
@pytest.mark.parametrize("after", range(3))
def test_an_interrupted_holder_leaves_the_gate_as_it_was(after: int, paused_before: bool) -> None:
    """An exception while it waits: nothing is held by it, and a gate that was paused is paused."""
    vcpu = Vcpu(*[lambda: None] * after, interrupt)
    gate = Gate([Vcpu(), vcpu], KICK)
    assert gate.enter(1)
    with pytest.raises(KeyboardInterrupt), gate.hold():
        pass
    vcpu.steps.append(interrupt)
    with pytest.raises(KeyboardInterrupt):
        gate.pause()
    assert gate.enter(0)
    gate.leave(0)
    gate.leave(1)
    if paused_before:
        gate.pause()
        assert gate.keeps_all_out()
        gate.pause()
        assert is_paused(gate)


def test_a_signal_gets_a_holder_out() -> None:
    """A handler that raises while a holder waits ends the wait."""
    gate = Gate([Vcpu(lambda: signal.raise_signal(signal.SIGALRM))], KICK)
    assert gate.enter(0)
    with pytest.raises(TimeoutError):
        gate.pause()
    gate.leave(0)
    with pytest.raises(TimeoutError), gate.hold():
        signal.raise_signal(signal.SIGALRM)
    assert gate.enter(0)


def test_a_hold_that_is_dropped() -> None:
    """It is given back, and so is one in a garbage cycle."""
    gate = Gate([Vcpu()], KICK)
    gate.hold().__enter__()
    assert gate.enter(0)
    gate.leave(0)
    cycle: list[object] = [gate, gate.hold()]
    cycle[1].__enter__()  # type: ignore[attr-defined]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert gate.enter(0)


def test_a_hold_is_taken_once() -> None:
    """Entered twice it is refused, and what it holds stays held; left twice it gives back once."""
    gate, log = Gate([Vcpu()], KICK), list[str]()
    hold, other = gate.hold(), gate.hold()
    other.__enter__()
    with hold, pytest.raises(StateError, match="by this hold already"):
        hold.__enter__()
    hold.__exit__()
    visitor = Visitor(gate, 0, log)
    log.append("other gives back")
    other.__exit__()
    visitor.has_gone_on()
    assert log == ["other gives back", "in"]


# Are they held?


def test_when_it_keeps_all_out() -> None:
    """Before a run, paused, and after its end; not while vCPUs may go in, and not by a hold alone."""
    gate = Gate([Vcpu()], KICK)
    assert gate.keeps_all_out()
    gate.begin(gate.threads_started)
    gate.wait_until_started()
    assert not gate.keeps_all_out()
    with gate.hold():
        assert not gate.keeps_all_out()
    gate.pause()
    assert gate.keeps_all_out()
    gate.resume()
    assert not gate.keeps_all_out()
    gate.end()
    assert gate.keeps_all_out()
    gate.depart(0)
    assert gate.keeps_all_out()
    gate.wait_until_departed()


def test_when_it_keeps_all_out_at_the_end_of_a_run_means_that_all_are_out() -> None:
    """A run that has ended has its vCPUs in the guest until they are kicked out."""
    gate = Gate([Vcpu()], KICK)
    gate.begin(gate.threads_started)
    assert gate.enter(0)
    gate.end()
    assert not gate.keeps_all_out()
    gate.leave(0)
    assert gate.keeps_all_out()


def test_a_clock_that_keeps_its_hold_is_safe_from_resume() -> None:
    """Held, checked, and then resumed by another: no vCPU goes in before the hold is given back, whenever that is."""
    gate, log = Gate([Vcpu()], KICK), list[str]()
    gate.begin(gate.threads_started)
    gate.pause()
    hold = gate.hold()
    with hold:
        assert gate.keeps_all_out()
        resumer = threading.Thread(target=gate.resume)
        resumer.start()
        resumer.join(HANG_S)
        assert not gate.keeps_all_out()
        visitor = Visitor(gate, 0, log)
        log.append("acted")
    visitor.has_gone_on()
    assert log == ["acted", "in"]


# The run


def test_the_end_sends_all_away() -> None:
    """Those that wait and those that come later, paused or held; one that is in is asked to exit."""
    vcpu = Vcpu()
    gate, log = Gate([Vcpu(), vcpu], KICK), list[str]()
    assert gate.enter(1)
    vcpu.steps.append(lambda: gate.leave(1))
    with gate.hold():
        visitor = Visitor(gate, 0, log)
        gate.end()
        visitor.has_gone_on()
    gate.pause()
    assert not gate.enter(1)
    assert log == ["sent away"]
    assert gate.wait_until_ended(0)


def test_a_run_that_could_not_begin_can_be_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a thread to be had nothing has begun; begun once it is not begun again before its end."""
    gate = Gate([], KICK)

    def none_left(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    def cannot_begin() -> None:
        monkeypatch.setattr("pvclock.kvm._gate.start_new_thread", none_left)
        with pytest.raises(RuntimeError):
            gate.begin(gate.threads_started)
        monkeypatch.undo()

    cannot_begin()
    assert not gate.has_begun()
    gate.begin(gate.threads_started)
    gate.wait_until_started()
    assert gate.has_begun()
    for _ in range(2):
        with pytest.raises(StateError, match=r"the vCPUs run already; stop\(\) them before"):
            gate.begin(gate.threads_started)
    gate.end()
    gate.wait_until_departed()
    cannot_begin()
    assert gate.has_ended()


def test_a_run_after_a_run() -> None:
    """It begins once all threads of the last one have departed, keeps a pause, and after close() none begins."""
    gate = Gate([Vcpu()], KICK)
    gate.begin(gate.threads_started)
    gate.wait_until_started()
    gate.pause()
    gate.end()
    with pytest.raises(StateError, match="threads of the last run have not ended"):
        gate.begin(gate.threads_started)
    with pytest.raises(StateError, match="the vCPUs have threads"):
        gate.renew()
    assert gate.depart(0)
    gate.begin(gate.threads_started)
    gate.wait_until_started()
    assert (gate.has_begun(), gate.has_ended(), gate.threads(), gate.is_paused()) == (True, False, 1, True)
    gate.resume()
    assert gate.enter(0)
    gate.leave(0)
    gate.close()
    assert not gate.enter(0)
    gate.depart(0)
    gate.renew()
    with pytest.raises(StateError, match="the vCPUs are closed; make another Runner, or Machine"):
        gate.begin(gate.threads_started)
    assert gate.has_ended()


def test_a_wait_for_the_end_of_a_run_is_not_for_the_next_ones() -> None:
    """It returns although the next run has begun before it looked again."""
    gate = Gate([], KICK)
    gate.begin(gate.threads_started)
    gate.wait_until_started()
    waiter = threading.Thread(target=gate.wait_until_ended)
    waiter.start()
    for _ in range(100):
        gate.end()
        gate.begin(gate.threads_started)
        gate.wait_until_started()
    waiter.join(HANG_S)
    assert not waiter.is_alive()
    gate.end()


def test_a_run_that_is_forgotten() -> None:
    """After renew() a gate is as before its first run."""
    gate = Gate([], KICK)
    gate.begin(gate.threads_started)
    gate.wait_until_started()
    gate.end()
    gate.renew()
    assert (gate.has_begun(), gate.has_ended()) == (False, False)


def test_a_vcpu_that_is_not_there() -> None:
    """A number beyond the gate's is refused."""
    gate = Gate([Vcpu()], KICK)
    for vcpu in (-1, 1, 2**40):
        for call in (gate.enter, gate.leave, gate.arrive, gate.depart, gate.thread_id):
            with pytest.raises(RangeError, match=r"the Runner has vCPUs 0 to 0"):
                call(vcpu)


def test_a_forked_child_waits_for_nobody() -> None:
    """The threads stayed with the parent: in a child every vCPU is out, and the run is over."""
    gate = Gate([Vcpu()], KICK)
    gate.begin(gate.threads_started)
    assert gate.enter(0)
    child = os.fork()
    if child == 0:
        gate.pause()
        gate.wait_until_departed()
        os._exit(7 if gate.wait_until_ended() and gate.keeps_all_out() else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert not gate.keeps_all_out()
