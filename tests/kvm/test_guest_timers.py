"""A machine's timers in guest time: when they are called, on both clocks, and what their callbacks may do."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import pytest

from pvclock.errors import RangeError, StateError, WrongType
from pvclock.kvm.tsc_offset import TscOffsets
from pvclock.machine import EXIT_PORT, Machine, RunState
from pvclock.quantities import NS_PER_S, U64_MASK
from tests.kvm.guests import out, write_msr
from tests.kvm.interrupt_guests import counting
from tests.kvm.pc_guests import ECHO, driver, kernel
from tests.waiting import HANG_S, alarm_after, wait_until

pytestmark = [pytest.mark.kvm, pytest.mark.row("E17")]

MS: Final = 10**6
HOUR_NS: Final = 3600 * NS_PER_S
on_both_clocks = pytest.mark.parametrize("clock", ["engine", "kernel"])

LIMIT_S: Final = 60
"""Less than mutants have, so that one that waits for ever fails here."""


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    """Turn a wait for ever into a failure."""
    with alarm_after(LIMIT_S):
        yield


@contextmanager
def echoing(**options: Any) -> Iterator[tuple[Machine, bytearray]]:  # noqa: ANN401  # Machine's
    """A machine, not started, whose guest sleeps, sends what is typed, and ends its run by a q; and what it sent."""
    sent = bytearray()
    with Machine(driver(1, ECHO), platform="pc", serial_output=sent.extend, **options) as machine:
        yield machine, sent


@on_both_clocks
def test_input_comes_at_its_guest_times(clock: str) -> None:
    """In the order of the times, whatever that of the calls; never early, and with a sleeping guest."""
    called: dict[bytes, int] = {}
    with echoing(clock=clock) as (machine, sent):
        begun_ns = machine.clock_service.now_ns()

        def type_at(ms: int, text: bytes) -> None:
            def callback() -> None:
                called[text] = machine.clock_service.now_ns() - begun_ns
                machine.serial.receive(text)

            machine.timers.at(begun_ns + ms * MS, callback)

        for ms, text in ((60, b"q"), (20, b"a"), (40, b"b")):
            type_at(ms, text)
        assert machine.timers.next_due_ns() == begun_ns + 20 * MS
        machine.run()
        wait_until(lambda: machine.timers.next_due_ns() is None)  # the last callback may just be about to return
    assert (bytes(sent), list(called)) == (b"abq", [b"a", b"b", b"q"])
    assert called[b"a"] >= 20 * MS
    assert called[b"b"] >= 40 * MS
    assert called[b"q"] >= 60 * MS


def test_guest_time_is_what_counts() -> None:
    """A skip makes a timer due that was a day away, and a new rate moves one nearer."""
    with echoing() as (machine, _):
        assert machine.clock is not None
        machine.start()
        days = [threading.Event(), threading.Event()]
        machine.timers.after(10**6 * HOUR_NS, days[1].set)  # at the rate below longer than this test may take
        for _round in range(20):  # in some of them, at least, the timers' thread sleeps at the skip
            days[0].clear()
            machine.timers.after(24 * HOUR_NS, days[0].set)
            looked = threading.Event()
            machine.timers.after(0, looked.set)
            looked.wait()
            machine.clock.skip(24 * HOUR_NS)
            days[0].wait()
        assert not days[1].is_set()
        soon = threading.Event()
        machine.timers.after(HOUR_NS, soon.set)
        machine.clock.dilate(100_000)
        soon.wait()
        assert not days[1].is_set()


def test_nothing_is_called_in_a_pause() -> None:
    """What becomes due in one is called after it; what is due before start() is called then."""
    with echoing() as (machine, _):
        assert machine.clock is not None
        events = [threading.Event() for _ in range(2)]
        machine.timers.at(0, events[0].set)
        assert machine.timers.next_due_ns() == 0
        assert machine.timers.settle(LIMIT_S)  # at once, for it may not be called
        assert not events[0].is_set()
        machine.start()
        events[0].wait()
        machine.pause()
        machine.timers.after(HOUR_NS, events[1].set)
        machine.clock.skip(2 * HOUR_NS)
        assert (machine.timers.next_due_ns() or 0) < machine.clock.now()
        assert machine.timers.settle(LIMIT_S)
        assert not events[1].is_set()
        machine.resume()
        events[1].wait()


def test_a_timer_is_cancelled_or_called() -> None:
    """Not both, and neither twice; a kept timer keeps its callback no longer."""
    with echoing() as (machine, _):
        called = threading.Event()
        machine.start()
        never = machine.timers.after(HOUR_NS, called.set)
        assert machine.timers.cancel(never)
        assert not machine.timers.cancel(never)
        assert (never.active, never.callback, machine.timers.next_due_ns()) == (False, None, None)
        soon = machine.timers.after(0, called.set)
        called.wait()
        assert not machine.timers.cancel(soon)
        assert (soon.active, soon.callback) == (False, None)


def test_it_is_due_until_its_callback_has_returned() -> None:
    """For a machine that travels in time; one that was due with it is called next, unless that callback cancels it."""
    with echoing() as (machine, _):
        begun, may_end, third = threading.Event(), threading.Event(), threading.Event()

        def first() -> None:
            assert machine.timers.cancel(second)
            begun.set()
            may_end.wait()

        machine.timers.at(0, first)
        second = machine.timers.at(0, lambda: 1 / 0)
        machine.timers.at(0, third.set)
        machine.start()
        begun.wait()
        assert machine.timers.next_due_ns() == 0
        assert not machine.timers.settle(0.001)
        may_end.set()
        assert machine.timers.settle(HANG_S)
        assert third.is_set()
        wait_until(lambda: machine.timers.next_due_ns() is None)
        assert machine.run_state.current is RunState.RUNNING


@on_both_clocks
def test_what_a_callback_raises_ends_the_run(clock: str) -> None:
    """wait() raises it; timers that were not called are called after the next start()."""
    later = threading.Event()
    with echoing(clock=clock) as (machine, _):
        machine.timers.at(0, lambda: 1 / 0)
        machine.timers.at(0, later.set)
        with pytest.raises(ZeroDivisionError):
            machine.run()
        assert machine.run_state.current is RunState.INTERNAL_ERROR
        assert not later.is_set()
        machine.reset()
        machine.start()
        later.wait()


@pytest.mark.parametrize("operation", ["pause", "stop", "close", "reset"])
def test_a_callback_may_use_the_machine(operation: str) -> None:
    """It pauses, stops, closes and resets it, from its own thread."""
    done = threading.Event()
    with echoing() as (machine, _):

        def callback() -> None:
            getattr(machine, operation)()
            done.set()

        machine.start()
        machine.timers.after(0, callback)
        done.wait()
        if operation != "close":
            wanted = {"pause": RunState.PAUSED, "stop": RunState.SHUTDOWN, "reset": RunState.RUNNING}
            assert machine.run_state.current is wanted[operation]


def test_after_a_roll_back_it_is_not_called_again() -> None:
    """One that had been called before stays so; another comes once guest time has come there again."""
    with echoing() as (machine, _):
        assert machine.clock is not None
        machine.start()
        machine.pause()
        state = machine.save()
        calls: list[str] = []
        second = threading.Event()
        begun_ns = machine.clock.now()
        machine.timers.at(begun_ns + HOUR_NS, lambda: calls.append("first"))
        machine.timers.at(begun_ns + 3 * HOUR_NS, second.set)
        machine.clock.skip(2 * HOUR_NS)
        machine.resume()
        wait_until(lambda: bool(calls))
        machine.pause()
        machine.roll_back(state)
        machine.resume()
        assert machine.clock.now() < begun_ns + HOUR_NS
        machine.timers.after(0, lambda: calls.append("third"))
        wait_until(lambda: len(calls) > 1)
        wait_until(lambda: machine.timers.next_due_ns() != 0)  # 0 until the callback has returned
        assert machine.timers.next_due_ns() == begun_ns + 3 * HOUR_NS
        machine.clock.skip(3 * HOUR_NS)
        second.wait()
        assert calls == ["first", "third"]


def test_synthetic_timers_are_among_them() -> None:
    """The next one to be due is Hyper-V's, where that comes first."""
    vector, due_ns = 0x51, 100 * HOUR_NS
    setup = (
        write_msr(0x40000000, 1)
        + write_msr(0x400000B0, 1 << 3 | 1 << 12 | vector << 4)  # stimer 0: enabled by its count, in direct mode
        + write_msr(0x400000B1, due_ns // 100)
    )
    with Machine(counting(vector, setup, out(EXIT_PORT, 3)), provider="HyperV") as machine:
        assert machine.clock is not None
        machine.start()
        wait_until(lambda: machine.timers.next_due_ns() not in (None, 0))
        assert machine.timers.next_due_ns() == due_ns
        machine.timers.at(due_ns - 1, lambda: None)
        assert machine.timers.next_due_ns() in (0, due_ns - 1)
        machine.clock.skip(due_ns)
        assert machine.wait() == 3


def test_a_machine_is_dropped_with_its_timers() -> None:
    """Also where a callback refers to it; its thread ends."""
    machine = Machine(driver(1, ECHO), platform="pc")
    timers = machine.timers
    timers.after(HOUR_NS, machine.stop)
    machine.start()
    gone: list[weakref.ref[Any]] = [weakref.ref(machine), weakref.ref(timers)]
    del machine, timers
    wait_until(lambda: gc.collect() >= 0 and [each() for each in gone] == [None, None])  # its thread may look just now
    wait_until(lambda: not any(each.name == "pvclock-machine-timers" for each in threading.enumerate()))


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda timers: timers.at(-1, print), RangeError),
        (lambda timers: timers.at(U64_MASK + 1, print), RangeError),
        (lambda timers: timers.at(1.5, print), WrongType),
        (lambda timers: timers.at(1, "print"), WrongType),
        (lambda timers: timers.after(-1, print), RangeError),
        (lambda timers: timers.after(U64_MASK, print), RangeError),
        (lambda timers: timers.cancel(print), WrongType),
    ],
    ids=["negative", "beyond", "fraction", "no function", "backwards", "after the end", "no timer"],
)
def test_refusals(call: Callable[[Any], object], error: type[Exception]) -> None:
    """Of times that no guest has, and of what is no function; nothing is set then."""
    with echoing() as (machine, _):
        with pytest.raises(error):
            call(machine.timers)
        assert machine.timers.next_due_ns() is None


def test_a_closed_machine_has_none() -> None:
    """What was set is not called any more, and nothing can be set."""
    with echoing() as (machine, _):
        machine.timers.at(0, lambda: 1 / 0)
    with pytest.raises(StateError, match="closed"):
        machine.timers.at(0, print)


# By the fixture of test authors


def test_thirty_days_of_a_service(kvm_machine: Callable[..., Machine]) -> None:
    """A request a day is answered a day after the last one, in a suite that has no days."""
    answers: list[tuple[str, int]] = []

    def take(data: bytes) -> None:
        answers.append((data.decode(), machine.clock_service.now_ns() // (24 * HOUR_NS)))

    machine = kvm_machine(driver(1, ECHO), platform="pc", serial_output=take, time_travel=True)
    requests = "abcdefghijklmnopABCDEFGHIJKLMq"  # q ends it
    for day, request in enumerate(requests, start=1):
        machine.timers.at(day * 24 * HOUR_NS, partial(machine.serial.receive, request.encode()))
    machine.start()
    machine.wait()
    assert answers == [(request, day) for day, request in enumerate(requests, start=1)]


def test_a_host_that_lets_it_not_travel(kvm_machine: Callable[..., Machine], tsc_offsets: TscOffsets) -> None:
    """The fixture skips the test of a kernel's then; what else the host lacks is the test's own failure."""
    if tsc_offsets is TscOffsets.IGNORED:
        with pytest.raises(pytest.skip.Exception, match="time travel"):
            kvm_machine(kernel(), time_travel=True)
    else:
        assert kvm_machine(kernel(), time_travel=True).time_travel.is_enabled
    with pytest.raises(TypeError):
        kvm_machine(kernel(), time_travel="yes")
