"""Clocks of one Ticker of which some do not return from their tick, threads that cannot be had, and interrupts."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import count
from typing import ClassVar

import pytest

from pvclock import GuestClock, GuestMemory, HostBackend, HostTsc, RangeError, Sample, SimulatedBackend, StateError
from pvclock.clock.ticker import Ticker
from pvclock.host.watch import HostWatch, Trouble, TroubleKind
from pvclock.timekeeping.events import EventKind
from tests.unit.fault_points import TICKER
from tests.unit.schedules import Lines, end_of, threads_named
from tests.waiting import HANG_S, wait_until

SYSTEM_TIME = 0x4B564D01
INTERVAL_S = 0.005
NAMES = ("pvclock-ticker", "pvclock-tick")


def wait_until_stuck_alone(ticker: Ticker, *clocks: GuestClock) -> None:
    """Return once these are stuck and no other is, with a thread for each of them, one for the rest and the schedule's.

    Where the machine has no CPU for 50 ms, a tick that would return is taken for stuck meanwhile.
    """
    wait_until(lambda: set(ticker.stuck) == set(clocks))
    wait_until(lambda: [len(threads_named(name)) for name in NAMES] == [1, len(clocks) + 1])


def ticker_threads() -> set[threading.Thread]:
    """The threads of all tickers."""
    return set().union(*map(threads_named, NAMES))


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No test leaves a thread of a ticker."""
    yield
    end_of(ticker_threads())


class Counted:
    """A clock that counts its ticks by its source, and can be made to wait in one of the calls that a tick makes."""

    def __init__(self, where: str = "source") -> None:
        self.ticks = 0
        self.at_once = 0
        self.entered, self.hold = threading.Event(), threading.Event()
        self._where = where
        self._blocks = False
        self._ticked = threading.Semaphore(0)
        backend = SimulatedBackend(10**9)
        memory = GuestMemory(bytearray(1 << 14))
        memory.on_dirty = lambda *_: self._pass("on_dirty")
        self.clock = GuestClock(memory, backend=backend)
        self.clock.write_msr(0, SYSTEM_TIME, 0x2001)
        self.clock.follow(self.source)
        backend.run_delay_ns = self._run_delay_ns  # type: ignore[method-assign]

    def _run_delay_ns(self, vcpu: int) -> int | None:
        self._pass("backend")
        return None

    def source(self) -> Sample:
        """A sample; counts."""
        self.ticks += 1
        self._ticked.release()
        self._pass("source")
        return Sample(HostTsc(self.ticks), self.ticks, 1.0)

    def _pass(self, where: str) -> None:
        if self._blocks and where == self._where:
            self.at_once += 1
            assert self.at_once == 1
            self.entered.set()
            assert self.hold.wait(HANG_S)
            self.at_once -= 1

    def block(self) -> None:
        """From now on do not return."""
        self._blocks = True

    def let_go(self) -> None:
        """Return, now and later."""
        self._blocks = False
        self.hold.set()

    def wait_for_ticks(self, ticks: int) -> None:
        """Return after so many more."""
        while self._ticked.acquire(blocking=False):
            pass
        for _ in range(ticks):
            assert self._ticked.acquire(timeout=HANG_S)


@pytest.mark.row("E11", "E13")
@pytest.mark.parametrize("where", ["source", "backend", "on_dirty"])
def test_a_clock_that_blocks_holds_up_no_other(where: str) -> None:
    """While its tick does not return it is stuck and not ticked again, the others are; later it is ticked as before."""
    blocked, other = Counted(where), Counted()
    with Ticker(blocked.clock, other.clock, interval_s=INTERVAL_S, watch_host=False) as ticker:
        blocked.wait_for_ticks(2)
        blocked.block()
        assert blocked.entered.wait(HANG_S)
        other.wait_for_ticks(20)
        wait_until_stuck_alone(ticker, blocked.clock)
        assert blocked.at_once == 1
        blocked.let_go()
        blocked.wait_for_ticks(5)
        other.wait_for_ticks(5)
    assert not ticker.stuck
    assert not ticker.failures


@pytest.mark.row("E11", "E13")
def test_threads_are_bounded_by_the_clocks_that_are_stuck() -> None:
    """With five clocks stuck at once, there are five threads for them, one for the rest, and one for the schedule."""
    blocked, other = [Counted() for _ in range(5)], Counted()
    for each in blocked:
        each.block()
    with Ticker(*(each.clock for each in blocked), other.clock, interval_s=INTERVAL_S, watch_host=False) as ticker:
        for each in blocked:
            assert each.entered.wait(HANG_S)
        other.wait_for_ticks(20)
        wait_until_stuck_alone(ticker, *(each.clock for each in blocked))
        for each in blocked:
            each.let_go()
        for each in blocked:
            each.wait_for_ticks(5)
    assert ticker.failures == ()


@pytest.mark.row("E11", "E13")
def test_stop_names_the_clock_that_is_stuck() -> None:
    """It does not wait for ever: a StateError names the clock, nothing else is ticked; a new start does as before."""
    blocked, other = Counted(), Counted()
    ticker = Ticker(blocked.clock, other.clock, interval_s=INTERVAL_S, watch_host=False)
    ticker.start()
    blocked.block()
    assert blocked.entered.wait(HANG_S)
    other.wait_for_ticks(20)
    complaint = f"stop: the tick of {blocked.clock} has not ended after 0.01 s; "
    wait_until(lambda: told_at_stop(ticker).startswith(complaint))  # the other's may need longer than that, once
    assert told_at_stop(ticker).startswith(complaint)
    wait_until(lambda: len(ticker_threads()) == 1)
    ticker.start()
    other.wait_for_ticks(20)
    assert blocked.at_once == 1
    blocked.let_go()
    blocked.wait_for_ticks(3)
    ticker.stop(HANG_S)
    ticks = blocked.ticks, other.ticks
    assert ticker_threads() == set()
    assert (blocked.ticks, other.ticks) == ticks


def told_at_stop(ticker: Ticker) -> str:
    """What stop() complains of."""
    with pytest.raises(StateError) as found:
        ticker.stop(timeout_s=0.01)
    return str(found.value)


@pytest.mark.row("E13")
@pytest.mark.parametrize("timeout_s", [-1, float("nan"), float("inf")])
def test_a_timeout_that_is_none(timeout_s: float) -> None:
    """What no thread can wait for is a RangeError, and the ticker goes on."""
    clock = Counted()
    with Ticker(clock.clock, interval_s=INTERVAL_S, watch_host=False) as ticker:
        with pytest.raises(RangeError, match=f"timeout_s is {timeout_s}"):
            ticker.stop(timeout_s)
        clock.wait_for_ticks(5)


@pytest.mark.row("E11", "E13")
def test_a_stuck_clock_may_be_removed_and_added() -> None:
    """Removed, it is not ticked again when it returns; added again while it is stuck, it is ticked once at a time."""
    blocked, other = Counted(), Counted()
    blocked.block()
    with Ticker(blocked.clock, other.clock, interval_s=INTERVAL_S, watch_host=False) as ticker:
        assert blocked.entered.wait(HANG_S)
        ticker.remove(blocked.clock)
        ticker.add(blocked.clock)
        ticker.add(blocked.clock)
        other.wait_for_ticks(20)
        assert blocked.at_once == 1
        ticker.remove(blocked.clock)
        blocked.let_go()
        other.wait_for_ticks(20)
        wait_until(lambda: not ticker.stuck)
        assert blocked.ticks == 1


@pytest.mark.row("E11", "E13")
def test_a_tick_may_stop_its_ticker() -> None:
    """stop() from a clock's source does not wait for itself."""
    stopped = threading.Event()

    def source() -> Sample:
        ticker.stop()
        stopped.set()
        return Sample(HostTsc(1), 1, 1.0)

    clock = Counted().clock
    clock.follow(source)
    ticker = Ticker(clock, interval_s=INTERVAL_S, watch_host=False)
    ticker.start()
    assert stopped.wait(HANG_S)
    ticker.stop()
    assert ticker.failures == ()


class TroubledWatch(HostWatch):
    """A watch that finds the TSC unstable once it is told to, and keeps the threads that look."""

    failing = threading.Event()
    lookers: ClassVar[set[threading.Thread]] = set()

    def check(self, *, on_schedule: bool = True) -> list[Trouble]:
        """See HostWatch."""
        super().check(on_schedule=on_schedule)
        self.lookers.add(threading.current_thread())
        if self._marked_unstable or not self.failing.is_set():
            return []
        self._marked_unstable = True
        return [Trouble(TroubleKind.TSC_UNSTABLE, "said the test", True, 0, self.last, self.last)]


@pytest.mark.row("E11", "K-16")
def test_trouble_reaches_stuck_clocks_later_and_others_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread looks at the host, whichever is stuck; who is stuck is told of its trouble after that, once."""
    monkeypatch.setattr("pvclock.clock.ticker.HostWatch", TroubledWatch)
    blocked, other = Counted("on_dirty"), Counted()
    for each in (blocked, other):
        each.clock.backend = HostBackend()
        each.clock.follow(each.source)
    with Ticker(blocked.clock, other.clock, interval_s=INTERVAL_S) as ticker:
        blocked.block()
        assert blocked.entered.wait(HANG_S)
        other.wait_for_ticks(20)
        TroubledWatch.failing.set()
        other.wait_for_ticks(20)
        assert told(other.clock) == ["said the test"]
        assert told(blocked.clock) == []
        blocked.let_go()
        blocked.wait_for_ticks(5)
        assert told(blocked.clock) == ["said the test"]
    assert len(TroubledWatch.lookers) == 1
    assert ticker.failures == ()


def told(clock: GuestClock) -> list[str]:
    """Why the clock was told that its TSC is unstable."""
    return [event.why for event in clock.events.read().events if event.kind is EventKind.TSC_UNSTABLE]


# Threads that cannot be had, and interrupts


class Limit:
    """The system's limit on threads: so many more may begin."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, more: int) -> None:
        self.more = more
        self.refused = threading.Semaphore(0)
        self._begin = threading.Thread.start
        limit = self

        def start(thread: threading.Thread) -> None:
            if limit.more <= 0:
                limit.refused.release()
                raise RuntimeError("can't start new thread")
            limit.more -= 1
            limit._begin(thread)

        monkeypatch.setattr(threading.Thread, "start", start)


@pytest.mark.row("E13")
@pytest.mark.parametrize("threads", [0, 1])
def test_a_start_without_threads_can_be_tried_again(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """At the limit start() is a StateError that says so, nothing runs, stop() is possible, and so is a new start."""
    clock = Counted()
    ticker = Ticker(clock.clock, interval_s=INTERVAL_S, watch_host=False)
    limit = Limit(monkeypatch, threads)
    with pytest.raises(StateError, match="start: cannot start a thread: can't start new thread; end some or raise"):
        ticker.start()
    end_of(ticker_threads())
    ticker.stop()
    limit.more = 2
    with ticker:
        clock.wait_for_ticks(5)
    assert ticker.failures == ()


@pytest.mark.row("E11", "E13")
def test_a_thread_that_is_needed_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no thread can be had beside a stuck one, that is a failure of each round, until one can be had."""
    blocked, other = Counted(), Counted()
    limit = Limit(monkeypatch, 2)
    blocked.block()
    with Ticker(blocked.clock, other.clock, interval_s=INTERVAL_S, watch_host=False) as ticker:
        for _ in range(3):
            assert limit.refused.acquire(timeout=HANG_S)
        assert other.ticks == 0
        limit.more = 1
        other.wait_for_ticks(5)
        blocked.let_go()
    assert {(failure.clock, type(failure.error)) for failure in ticker.failures} == {(None, StateError)}


@pytest.mark.row("E11", "E9")
@pytest.mark.parametrize("interrupted", ["start", "stop", "add", "remove"])
def test_an_interrupt_at_each_line(interrupted: str) -> None:
    """KeyboardInterrupt at any line leaves no lock taken and no thread that does not end; the call can be repeated."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    for line in count():
        clock = Counted()
        ticker = Ticker(clock.clock, interval_s=INTERVAL_S, watch_host=False)
        if interrupted == "stop":
            ticker.start()
            clock.wait_for_ticks(1)
        another = Counted().clock
        operations: dict[str, Callable[[], None]] = {
            "start": ticker.start,
            "stop": ticker.stop,
            "add": partial(ticker.add, another),
            "remove": partial(ticker.remove, clock.clock),
        }
        lines = Lines(*TICKER, at=line, action=interrupt)
        whole = False
        try:
            with lines.traced():
                operations[interrupted]()
            whole = True
        except KeyboardInterrupt:
            with suppress(StateError):  # it may run
                ticker.start()
        ticker.stop()
        ticker.add(clock.clock)
        with ticker:
            clock.wait_for_ticks(2)
        end_of(ticker_threads())
        if whole:
            break
    assert line >= 2


@pytest.mark.row("E11", "E9")
def test_a_forked_childs_ticker_is_stopped() -> None:
    """In a child, whatever locks were taken at the fork, it can be stopped and started; the parent's goes on."""
    clock = Counted()
    with Ticker(clock.clock, interval_s=INTERVAL_S, watch_host=False) as ticker:
        clock.wait_for_ticks(1)
        locks = ticker._lock, ticker._workers._lock
        for lock in locks:
            lock.acquire()
        child = os.fork()
        if child == 0:
            signal.alarm(HANG_S)  # a lock that is never let go ends the child, not the test
            status = 1
            try:
                ticker.stop()
                child_clock = Counted()
                ticker.add(child_clock.clock)
                ticker.remove(clock.clock)  # its lock may be the parent's thread's
                ticker.start()
                child_clock.wait_for_ticks(3)
                ticker.stop()
                status = 0
            finally:
                os._exit(status)
        for lock in locks:
            lock.release()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        clock.wait_for_ticks(5)
