"""vCPUs on threads: begun, paused, kept out and ended, with guests that would never exit by themselves."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from pvclock.errors import StateError, WrongType
from pvclock.kvm import Runner
from pvclock.kvm.exits import Exit, Halt, IoOut
from tests.kvm.guests import COUNT, COUNT_AND_EXIT, HLT, Bare, bare_vm, out
from tests.kvm.leaks import held
from tests.waiting import HANG_S

pytestmark = [pytest.mark.kvm, pytest.mark.row("E9")]


CREWS = [1, 2, 4]
"""vCPUs: also more than most test hosts have CPUs."""


def eventually(condition: Callable[[], object]) -> None:
    """Return once `condition` holds; a failure if that takes for ever."""
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline, "it never came true"


def moves_on(bare: Bare) -> None:
    """Return once every vCPU's guest has gone round its loop again."""
    before = [bare.count(vcpu.vcpu_id) for vcpu in bare.vcpus]
    eventually(lambda: all(bare.count(vcpu) != count for vcpu, count in enumerate(before)))


def go_on(_vcpu: int, _reason: Exit) -> bool:
    """Handle an exit by doing nothing."""
    return True


@contextmanager
def running(
    code: bytes = COUNT, vcpus: int = 1, handler: Callable[[int, Exit], bool] = go_on
) -> Iterator[tuple[Bare, Runner]]:
    """Bare vCPUs that run `code`; stopped in the end, whatever happens."""
    with bare_vm(code, vcpus=vcpus) as bare:
        runner = Runner(bare.vcpus, handler)
        try:
            runner.start()
            yield bare, runner
        finally:
            runner.stop()


# Start and stop


@pytest.mark.parametrize("vcpus", CREWS)
def test_a_runner_is_a_context(vcpus: int) -> None:
    """Inside it the guests run; after it none does, and no thread stays."""
    before = held()
    with bare_vm(COUNT, vcpus=vcpus) as bare:
        with Runner(bare.vcpus, go_on) as runner:
            moves_on(bare)
        assert runner.join(0)
        assert held().threads == before.threads


def fail(_vcpu: int, _reason: Exit) -> bool:
    """Handle an exit by an error."""
    raise ZeroDivisionError


def test_the_end_of_a_context_raises_what_ended_the_run() -> None:
    """An error of a vCPU's thread comes out, and the vCPUs have stopped."""
    with bare_vm(COUNT_AND_EXIT) as bare:
        runner = Runner(bare.vcpus, fail)
        with pytest.raises(ZeroDivisionError), runner:
            runner.join(HANG_S)
        assert runner.thread_id(0) is None


@pytest.mark.parametrize(("result", "given"), [(None, "None"), (1, "1, an int"), ("x", "'x', a str"), (0, "0, an int")])
def test_a_handler_that_returns_no_bool(result: object, given: str) -> None:
    """It ends the run with an error that says what it returned: a forgotten `return True` is not silent."""
    with bare_vm(COUNT_AND_EXIT) as bare:
        runner = Runner(bare.vcpus, lambda *_: result)  # type: ignore[arg-type]
        with pytest.raises(WrongType) as caught, runner:
            runner.join(HANG_S)
        assert (
            str(caught.value) == f"the exit handler's result is {given}; it can be True to go on, False to end the run"
        )
        assert runner.failure is caught.value


def test_an_error_inside_a_context_comes_first() -> None:
    """What is raised inside comes out, whatever had ended the run."""
    with bare_vm(COUNT_AND_EXIT) as bare:
        runner = Runner(bare.vcpus, fail)
        with pytest.raises(StateError, match="on purpose"), runner:
            raise StateError("join" if runner.join(HANG_S) else "hang", "on purpose", "")
        assert isinstance(runner.failure, ZeroDivisionError)


@pytest.mark.parametrize("vcpus", CREWS)
def test_all_vcpus_run_until_stopped(vcpus: int) -> None:
    """All guests count after start(), none after stop(), and no thread stays."""
    before = held()
    with running(vcpus=vcpus) as (bare, runner):
        moves_on(bare)
        runner.stop()
        counts = [bare.count(vcpu) for vcpu in range(vcpus)]
        assert held().threads == before.threads
        assert counts == [bare.count(vcpu) for vcpu in range(vcpus)]
        assert runner.join(0)
    assert held() == before


def test_a_run_begins_once() -> None:
    """A second start() before the end is refused, and any after close(); waiting for what never began is, too."""
    with bare_vm(COUNT) as bare:
        runner = Runner(bare.vcpus, go_on)
        with pytest.raises(StateError, match="never started"):
            runner.join()
        runner.start()
        with pytest.raises(StateError, match=r"the vCPUs run already; stop\(\) them before"):
            runner.start()
        runner.stop()
        runner.stop()
        runner.close()
        with pytest.raises(StateError, match="the vCPUs are closed; make another Runner, or Machine"):
            runner.start()


@pytest.mark.parametrize("vcpus", CREWS)
def test_a_run_after_a_run(vcpus: int) -> None:
    """After stop(), start() lets the guests go on where they stood, many times, and no thread is left."""
    before = held()
    with bare_vm(COUNT, vcpus=vcpus) as bare:
        runner = Runner(bare.vcpus, go_on)
        for _ in range(10):
            counts = [bare.count(vcpu) for vcpu in range(vcpus)]
            runner.start()
            moves_on(bare)
            runner.stop()
            assert all(bare.count(vcpu) > count for vcpu, count in enumerate(counts))
            assert held().threads == before.threads


def test_a_run_after_one_that_failed() -> None:
    """The next run has no failure of the last one, and begins also where nobody has waited for its threads."""
    fails = [True]

    def handler(_vcpu: int, _reason: Exit) -> bool:
        if fails[0]:
            raise ZeroDivisionError
        return True

    with bare_vm(COUNT_AND_EXIT, vcpus=2) as bare:
        runner = Runner(bare.vcpus, handler)
        runner.start()
        assert runner.join(HANG_S)
        first = runner.failure
        assert isinstance(first, ZeroDivisionError)
        fails[0] = False
        runner.start()
        moves_on(bare)
        assert runner.failure is None
        runner.stop()


def test_the_end_of_each_run_is_told_once() -> None:
    """on_end comes with what ended the run, after the last vCPU has left, on its thread."""
    ends: list[tuple[BaseException | None, bool, int]] = []

    def on_end(failure: BaseException | None) -> None:
        ends.append((failure, threading.current_thread() in runner.threads, runner.gate.threads()))

    with bare_vm(COUNT, vcpus=2) as bare:
        runner = Runner(bare.vcpus, go_on, on_end=on_end)
        for _ in range(3):
            runner.start()
            runner.stop()
    assert ends == [(None, True, 0)] * 3


def test_a_vcpu_that_runs_is_left_alone() -> None:
    """What KVM would let wait for the next exit is refused, and the error names what was called."""
    with running() as (bare, _):
        moves_on(bare)
        for name in ("get_regs", "get_sregs", "get_tsc_offset", "get_mp_state", "close"):
            with pytest.raises(StateError, match=rf"^{name}: vCPU 0 is running; pause it first$"):
                getattr(bare.vcpus[0], name)()


def test_stop_before_start() -> None:
    """A run that was ended before it began has ended."""
    with bare_vm(COUNT) as bare:
        runner = Runner(bare.vcpus, go_on)
        runner.stop()
        assert runner.join(0)
        assert bare.count(0) == 0


@pytest.mark.parametrize("vcpus", CREWS)
def test_stop_while_paused(vcpus: int) -> None:
    """stop() gets vCPUs past the gate that pause() shut, and resume() afterwards does no harm."""
    with running(vcpus=vcpus) as (bare, runner):
        moves_on(bare)
        runner.pause()
        runner.stop()
        runner.resume()
        assert runner.join(0)


def test_stop_from_several_threads_at_any_moment() -> None:
    """Whenever and however often stop() is called, it returns and the threads are gone."""
    before = held()
    for delay_rounds in range(30):
        with running(COUNT_AND_EXIT, vcpus=2) as (_, runner):
            stoppers = [threading.Thread(target=runner.stop) for _ in range(3)]
            for _ in range(100 * delay_rounds):
                pass  # not sleep(): the moment is to differ by less than a scheduler's tick
            for stopper in stoppers:
                stopper.start()
            for stopper in stoppers:
                stopper.join(HANG_S)
            assert not any(stopper.is_alive() for stopper in stoppers)
    assert held() == before


def test_the_handlers_no_ends_the_run_of_all() -> None:
    """A handler that returns False ends the run, also of vCPUs that never exit, without anybody calling stop()."""
    seen: list[tuple[int, Exit]] = []

    def handler(vcpu: int, reason: Exit) -> bool:
        seen.append((vcpu, reason))
        return False

    with bare_vm(COUNT, vcpus=2) as bare:
        code = out(0x10, 7) + HLT
        bare.ram[0x7000 : 0x7000 + len(code)] = code
        bare.vcpus[1].set_regs({**bare.vcpus[1].get_regs(), "rip": 0x7000})
        runner = Runner(bare.vcpus, handler)
        runner.start()
        assert runner.join(HANG_S)
        eventually(lambda: not any(thread.name.startswith("vCPU") for thread in threading.enumerate()))
        runner.stop()
        assert seen == [(1, IoOut(0x10, 1, b"\x07"))]


def test_an_error_in_the_handler_ends_the_run() -> None:
    """What the handler raises is kept for whoever waits, and the other vCPUs stop."""

    class MadeUpError(Exception):
        pass

    def handler(vcpu: int, reason: Exit) -> bool:
        raise MadeUpError(vcpu, reason)

    with running(COUNT_AND_EXIT, vcpus=2, handler=handler) as (_, runner):
        assert runner.join(HANG_S)
        runner.stop()
        assert isinstance(runner.failure, MadeUpError)


def test_join_gives_up_in_time() -> None:
    """A run that goes on is told from one that has ended."""
    with running() as (bare, runner):
        moves_on(bare)
        assert not runner.join(0.001)


# Out of the guest


@pytest.mark.parametrize("code", [COUNT, COUNT_AND_EXIT], ids=["spinning", "exiting"])
@pytest.mark.parametrize("vcpus", CREWS)
def test_a_paused_guest_stands_still(vcpus: int, code: bytes) -> None:
    """Once pause() has returned no guest counts any more; after resume() all do; many times over."""
    with running(code, vcpus=vcpus) as (bare, runner):
        for _ in range(20):
            moves_on(bare)
            runner.pause()
            counts = [bare.count(vcpu) for vcpu in range(vcpus)]
            for _ in range(1000):
                assert [bare.count(vcpu) for vcpu in range(vcpus)] == counts
            runner.pause()
            runner.resume()
            runner.resume()
        moves_on(bare)


def test_started_while_paused() -> None:
    """A pause before start() holds: no guest begins before resume()."""
    with bare_vm(COUNT, vcpus=2) as bare:
        runner = Runner(bare.vcpus, go_on)
        runner.pause()
        runner.start()
        assert not runner.join(0.01)
        assert (bare.count(0), bare.count(1)) == (0, 0)
        runner.resume()
        moves_on(bare)
        runner.stop()


def test_every_pause_means_paused() -> None:
    """Of several threads that pause at once, each finds all guests standing still when its own call returns."""
    moved: list[tuple[int, int]] = []

    def pause() -> None:
        runner.pause()
        first = bare.count(0), bare.count(1)
        moved.extend(second for _ in range(200) if (second := (bare.count(0), bare.count(1))) != first)

    with running(vcpus=2) as (bare, runner):
        for _ in range(20):
            moves_on(bare)
            threads = [threading.Thread(target=pause) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(HANG_S)
            runner.resume()
    assert not moved


def test_pause_and_resume_race() -> None:
    """Pauses and resumes from several threads leave, after a last resume, a guest that runs."""

    def flicker() -> None:
        for _ in range(100):
            runner.pause()
            runner.resume()

    with running(vcpus=2) as (bare, runner):
        threads = [threading.Thread(target=flicker) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG_S)
            assert not thread.is_alive()
        runner.resume()
        moves_on(bare)


@pytest.mark.parametrize("quiescing", [1, 2, 3])
def test_vcpus_that_keep_the_others_out(quiescing: int) -> None:
    """Handlers may quiesce() all at once while others spin, and each finds the guests standing still."""
    rounds = [0] * (quiescing + 1)
    enough = threading.Event()
    moved: list[int] = []

    def handler(vcpu: int, _reason: Exit) -> bool:
        with runner.quiesce(vcpu):
            before = bare.count(spinner)
            rounds[vcpu] += 1
            if bare.count(spinner) != before:
                moved.append(vcpu)
        if min(rounds[:quiescing]) >= 100:
            enough.set()
        return True

    spinner = quiescing
    with bare_vm(COUNT_AND_EXIT, vcpus=quiescing + 1) as bare:
        bare.ram[0x6000 : 0x6000 + len(COUNT)] = COUNT
        bare.vcpus[spinner].set_regs({**bare.vcpus[spinner].get_regs(), "rip": 0x6000})
        runner = Runner(bare.vcpus, handler)
        runner.start()
        assert enough.wait(HANG_S), rounds
        runner.pause()
        runner.resume()
        count = bare.count(spinner)
        eventually(lambda: bare.count(spinner) != count)
        runner.stop()
    assert not moved
    assert runner.failure is None


def test_a_lock_around_quiesce_does_not_deadlock() -> None:
    """A handler that waits for a lock is out of the guest: whoever quiesces under that lock need not wait for it."""
    lock, rounds = threading.Lock(), [0, 0, 0]
    enough = threading.Event()

    def handler(vcpu: int, _reason: Exit) -> bool:
        with lock, runner.quiesce(vcpu):
            rounds[vcpu] += 1
        if min(rounds) >= 50:
            enough.set()
        return True

    with bare_vm(COUNT_AND_EXIT, vcpus=3) as bare:
        runner = Runner(bare.vcpus, handler)
        runner.start()
        for _ in range(50):
            with lock, runner.quiesce():
                assert len({tuple(bare.count(vcpu) for vcpu in range(3)) for _ in range(100)}) == 1
        assert enough.wait(HANG_S), rounds
        runner.stop()


def test_quiesce_without_a_run() -> None:
    """Before start() and after stop() no vCPU is in the guest, and nobody waits."""
    with bare_vm(COUNT) as bare:
        runner = Runner(bare.vcpus, go_on)
        with runner.quiesce():
            assert bare.count(0) == 0
        runner.start()
        moves_on(bare)
        runner.stop()
        with runner.quiesce(), runner.quiesce(0):
            assert len({bare.count(0) for _ in range(1000)}) == 1


def test_an_error_while_quiescing_opens_the_gate_again() -> None:
    """What is raised inside quiesce() gets out, and the guests go on."""
    with running() as (bare, runner):
        with pytest.raises(ZeroDivisionError), runner.quiesce():
            _ = 1 // 0
        moves_on(bare)


def test_a_thread_with_an_ended_vcpus_ident_waits_like_any_other() -> None:
    """stop() returns without waiting to a vCPU's own thread, not to one that has come by the ident of such a thread."""
    busy, go_on_now, stopped = threading.Event(), threading.Event(), list[int]()

    def handler(vcpu: int, _reason: Exit) -> bool:
        if vcpu == 1:
            busy.set()
            return go_on_now.wait(HANG_S)
        busy.wait(HANG_S)
        return False

    with running(COUNT_AND_EXIT, 2, handler) as (_, runner):
        assert runner.join(HANG_S)
        ended = runner._threads[0]
        ended.join(HANG_S)

        def stop() -> None:
            if threading.get_ident() == ended.ident:
                is_its.set()
                runner.stop()
                stopped.append(runner.gate.threads())

        is_its = threading.Event()
        deadline = time.monotonic() + HANG_S
        while not is_its.is_set():
            assert time.monotonic() < deadline, "no thread came by that ident"
            thread = threading.Thread(target=stop)
            thread.start()
            while thread.is_alive() and not is_its.is_set():
                thread.join(0.001)
        assert not stopped  # for vCPU 1 is in its handler
        go_on_now.set()
        thread.join(HANG_S)
    assert stopped == [0]


# Signals


def test_a_kick_signal_that_is_taken() -> None:
    """A signal with a handler of the process is refused before any thread exists; another one can be chosen."""
    taken = signal.SIGRTMIN + 7
    before = signal.signal(taken, lambda *_: None)
    try:
        with bare_vm(COUNT) as bare:
            with pytest.raises(StateError, match="choose another kick signal"):
                Runner(bare.vcpus, go_on, kick_signal=taken)
            runner = Runner(bare.vcpus, go_on, kick_signal=signal.SIGRTMIN + 8)
            runner.start()
            moves_on(bare)
            runner.stop()
    finally:
        signal.signal(taken, before)


def test_whoever_starts_may_block_signals() -> None:
    """A kick reaches vCPUs whose threads were started with all signals blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        with running(vcpus=2) as (bare, runner):
            moves_on(bare)
            runner.pause()
            runner.resume()
            moves_on(bare)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_a_late_kick_does_nothing() -> None:
    """The signal's default action, which ends the process, does not come back with the end of a run."""
    with running() as (bare, _):
        moves_on(bare)
    signal.raise_signal(signal.SIGRTMIN + 2)


def test_halt_reaches_the_handler() -> None:
    """Without interrupt controllers in the kernel HLT is an exit like others."""
    seen: list[Exit] = []

    def handler(_vcpu: int, reason: Exit) -> bool:
        seen.append(reason)
        return False

    with running(HLT, handler=handler) as (_, runner):
        assert runner.join(HANG_S)
    assert seen == [Halt()]
