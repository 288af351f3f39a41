"""The thread that expires a provider's timers: on time, told of every change, and gone when its clock is."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import pytest

from pvclock import (
    ConfigError,
    ExecutionTimeBackend,
    GuestClock,
    GuestMemory,
    HostBackend,
    SimulatedBackend,
    StateError,
    TimerThread,
)
from pvclock.clock.timer_thread import FAILURES_KEPT
from pvclock.threads import WakeUp
from tests.unit.alarm_provider import ALARM_MSR, Alarm, register
from tests.waiting import HANG_S

pytestmark = pytest.mark.row("H-42", "P-15")

MS: Final = 10**6
HOUR_NS: Final = 3600 * 10**9


@pytest.fixture(autouse=True)
def alarm_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let there be a provider with a timer."""
    register(monkeypatch)


def an_alarm(**options: Any) -> tuple[GuestClock, Alarm]:  # noqa: ANN401  # the provider's
    """A clock on this host with the provider."""
    clock = GuestClock(GuestMemory(bytearray(1 << 12)), 1, "Alarm", backend=HostBackend(), **options)
    provider = clock.interface.provider
    assert isinstance(provider, Alarm)
    return clock, provider


def wait_for(condition: Callable[[], object]) -> None:
    """Return once it holds."""
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def set_alarm(clock: GuestClock, after_ns: int) -> int:
    """Have it go off after so much guest time; returns when."""
    due_ns = clock.now() + after_ns
    clock.write_msr(0, ALARM_MSR, due_ns)
    return due_ns


def test_a_timer_is_delivered_by_itself() -> None:
    """One set before start(), one set later, one earlier than what the thread sleeps for, and none before it is due."""
    clock, provider = an_alarm()
    delivered: list[int] = []
    provider.deliver = lambda: delivered.append(clock.now())
    dues = [set_alarm(clock, 2 * MS)]
    with TimerThread(clock) as timers:
        wait_for(lambda: len(delivered) == 1)
        dues.append(set_alarm(clock, 3 * MS))
        wait_for(lambda: len(delivered) == 2)
        set_alarm(clock, HOUR_NS)
        dues.append(set_alarm(clock, 2 * MS))
        wait_for(lambda: len(delivered) == 3)
        assert timers.failures == ()
    assert [due for due, _ in provider.expired] == dues
    assert all(due <= at for due, at in provider.expired)
    assert all(due <= at for due, at in zip(dues, delivered, strict=True))


def test_a_periodic_timer() -> None:
    """Each period expires once, in order, whatever the thread's delays."""
    clock, provider = an_alarm(period_ns=MS)
    first = set_alarm(clock, MS)
    with TimerThread(clock):
        wait_for(lambda: len(provider.expired) >= 20)
    dues = [due for due, _ in provider.expired]
    assert dues == [first + number * MS for number in range(len(dues))]


@pytest.mark.parametrize(
    "change",
    [
        lambda clock: clock.skip(HOUR_NS),
        lambda clock: clock.dilate(10**7),
        lambda clock: (clock.pause(), clock.skip(HOUR_NS), clock.resume()),
        lambda clock: (clock.pause(), clock.dilate(10**7), clock.resume("freeze")),
    ],
    ids=["skip", "dilate", "skip while paused", "dilate while paused"],
)
def test_a_change_of_time_wakes_it(change: Callable[[GuestClock], object]) -> None:
    """A timer that was an hour away is delivered at once if guest time gets there."""
    clock, provider = an_alarm()
    set_alarm(clock, HOUR_NS)
    with TimerThread(clock):
        time.sleep(0.01)
        assert provider.expired == []
        change(clock)
        wait_for(lambda: provider.expired)
    assert len(provider.expired) == 1


def test_it_rests_as_long_as_an_expiry_took() -> None:
    """Timers that are always due, and take 10 ms to serve, leave it at rest half of the time at least."""
    clock, provider = an_alarm(period_ns=1)
    began, ended = list[int](), list[int]()

    def deliver() -> None:
        began.append(time.monotonic_ns())
        time.sleep(0.01)
        ended.append(time.monotonic_ns())

    provider.deliver = deliver
    set_alarm(clock, 0)
    with TimerThread(clock):
        wait_for(lambda: len(ended) >= 5)
    took = [end - begin for begin, end in zip(began, ended, strict=True)]
    rests = [begin - end for begin, end in zip(began[1:5], ended[:4], strict=True)]
    assert all(rest >= 0.9 * ns for rest, ns in zip(rests, took[:4], strict=True))


def test_a_slower_clock_is_waited_for() -> None:
    """The timer is not expired when it would have been due at the old rate."""
    clock, provider = an_alarm()
    due_ns = set_alarm(clock, 20 * MS)
    with TimerThread(clock):
        clock.dilate(1, 5)
        wait_for(lambda: provider.expired)
    assert provider.expired[0][0] == due_ns <= provider.expired[0][1]


def test_a_counter_that_stands_still() -> None:
    """In execution time a timer is delivered once the guest has executed up to it, and not by host time."""
    backend = ExecutionTimeBackend(HostBackend(), native=False)
    clock = GuestClock(GuestMemory(bytearray(1 << 12)), 1, "Alarm", backend=backend)
    provider = clock.interface.provider
    assert isinstance(provider, Alarm)
    set_alarm(clock, MS)
    with TimerThread(clock):
        time.sleep(0.01)
        assert provider.expired == []
        backend.ran(backend.tsc_hz // 1000 + 1)
        wait_for(lambda: provider.expired)


def test_nothing_is_delivered_while_paused() -> None:
    """What is due comes after resume()."""
    clock, provider = an_alarm()
    with TimerThread(clock):
        clock.pause()
        set_alarm(clock, 5 * MS)
        time.sleep(0.03)
        assert provider.expired == []
        clock.resume("advance")
        wait_for(lambda: provider.expired)


def test_a_delivery_that_fails() -> None:
    """Its error is kept, and the timers that follow are delivered all the same; a SystemExit ends nothing either."""
    clock, provider = an_alarm(period_ns=1)
    errors: list[BaseException] = [ValueError("no"), SystemExit(1)]

    def fail() -> None:
        raise errors[len(provider.expired) % 2]

    provider.deliver = fail
    with TimerThread(clock) as timers:
        set_alarm(clock, 0)
        wait_for(lambda: len(timers.failures) == 2)
        assert {type(each) for each in timers.failures} == {ValueError, SystemExit}
        provider.deliver = lambda: None
        expired = len(provider.expired)
        wait_for(lambda: len(provider.expired) > expired + 2)
    assert FAILURES_KEPT == 16


def test_started_and_stopped() -> None:
    """Twice is a StateError; after stop() nothing is delivered, until start(); a stopped one can be stopped."""
    clock, provider = an_alarm()
    timers = TimerThread(clock)
    timers.stop()
    timers.start()
    assert (timers.is_running, timers.has_threads) == (True, True)
    with pytest.raises(StateError, match="the timer thread is running"):
        timers.start()
    timers.stop()
    assert (timers.is_running, timers.has_threads) == (False, False)
    set_alarm(clock, 0)
    time.sleep(0.01)
    assert provider.expired == []
    with timers:
        wait_for(lambda: provider.expired)


def test_stop_waits_for_a_delivery() -> None:
    """Not beyond its timeout: a StateError then says what did not return, and the thread ends with that."""
    clock, provider = an_alarm()
    begun, go_on = WakeUp(), WakeUp()

    def deliver() -> None:
        begun.call()
        go_on.wait(HANG_S)

    provider.deliver = deliver
    timers = TimerThread(clock)
    timers.start()
    set_alarm(clock, 0)
    assert begun.wait(HANG_S)
    with pytest.raises(StateError, match=r"a delivery has not ended after 0\.01 s"):
        timers.stop(0.01)
    assert timers.has_threads
    go_on.call()
    timers.stop()
    assert not timers.has_threads


def test_a_pause_can_wait_for_a_delivery() -> None:
    """settle() returns once nothing more is raised: True then, and where nothing is under way; False if it gives up."""
    clock, provider = an_alarm()
    begun, go_on, settled = WakeUp(), WakeUp(), list[bool]()

    def deliver() -> None:
        settled.append(timers.settle())
        begun.call()
        go_on.wait(HANG_S)

    provider.deliver = deliver
    timers = TimerThread(clock)
    assert timers.settle()
    with timers:
        set_alarm(clock, 0)
        assert begun.wait(HANG_S)
        clock.pause()
        assert not timers.settle(0.01)
        go_on.call()
        assert timers.settle(HANG_S)
        assert settled == [True], "within a delivery it does not wait"


def test_stop_in_a_delivery() -> None:
    """It returns, and the thread ends after the delivery."""
    clock, provider = an_alarm()
    timers = TimerThread(clock)
    provider.deliver = timers.stop
    timers.start()
    set_alarm(clock, 0)
    wait_for(lambda: not timers.has_threads)
    assert not timers.is_running
    assert timers.failures == ()


def timer_threads() -> list[threading.Thread]:
    """The threads of all TimerThreads."""
    return [each for each in threading.enumerate() if each.name == "pvclock-timers"]


def test_a_dropped_clock_ends_its_thread() -> None:
    """Without stop(), and without a collection of garbage, however long it sleeps."""
    gc.collect()
    wait_for(lambda: not timer_threads())  # of clocks that other tests have dropped
    gc.disable()
    try:
        clock, provider = an_alarm()
        timers = TimerThread(clock)
        timers.start()
        set_alarm(clock, HOUR_NS)
        assert len(timer_threads()) == 1
        del timers
        time.sleep(0.01)
        assert len(timer_threads()) == 1, "it serves its clock as long as that is there"
        del clock, provider
        gc.collect()  # clock and provider know each other
        wait_for(lambda: not timer_threads())
    finally:
        gc.enable()


def test_a_forked_child_starts_it_anew() -> None:
    """There it is stopped, whatever the parent's was doing; the parent's goes on."""
    clock, provider = an_alarm()
    with TimerThread(clock) as timers:
        child = os.fork()
        if child == 0:
            is_right = not timers.is_running and not timers.has_threads
            timers.start()
            set_alarm(clock, 0)
            wait_for(lambda: provider.expired)
            timers.stop()
            os._exit(0 if is_right else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert timers.is_running
        set_alarm(clock, 0)
        wait_for(lambda: provider.expired)


def test_no_thread_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """start() says so, has done nothing, and can be called again."""
    clock, provider = an_alarm()
    timers = TimerThread(clock)

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(StateError, match="cannot start a thread"):
            timers.start()
    assert not timers.is_running
    set_alarm(clock, 0)
    with timers:
        wait_for(lambda: provider.expired)


def test_a_clock_whose_time_is_set_by_hand() -> None:
    """It is a ConfigError that says what to do instead."""
    clock = GuestClock(GuestMemory(bytearray(1 << 12)), backend=SimulatedBackend(10**9))
    with pytest.raises(ConfigError, match=r"expire_timers\(\)"):
        TimerThread(clock)
