"""A machine's clock, by its guest's own eyes: ticked while it is left alone, saved, and restored in another machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest

from pvclock import GuestClock, HostTsc, Machine, Sample, StateError
from pvclock.clock.ticker import Ticker
from pvclock.errors import StateFileError
from pvclock.machine import EXIT_PORT
from pvclock.meter.findings import failures
from pvclock.meter.machine_guest import finish, wait_until_reading
from pvclock.payloads import clockprobe
from pvclock.state import clock_state
from pvclock.state.clock_state import ClockState, SavedPolicy
from tests.kvm.guests import out
from tests.kvm.leaks import held
from tests.kvm.page_log import MEMORY_BYTES, PAGE_LOG, entries, readings, wait_until_it_reads_on
from tests.kvm.reading import wait_until_all_read_on
from tests.waiting import HANG_S

pytestmark = pytest.mark.kvm

NS_PER_S = 10**9
LEFT_ALONE_NS = 2_200_000_000
BOUND_NS = 4
"""Design 2.3, as in test_time_operations."""
SPIN = bytes.fromhex("ebfe")
DONE = out(EXIT_PORT, 0)


def engine_of(machine: Machine) -> GuestClock:
    """The machine's clock, which is the engine's."""
    assert machine.clock is not None
    return machine.clock


def version(clock: GuestClock) -> int:
    """The version of vCPU 0's page: one publish is 2."""
    page = clock.page(0)
    assert page is not None
    return page.version


def stands_at(clock: GuestClock) -> Fraction:
    """Guest time now, of a paused clock."""
    return clock.at(HostTsc(clock.backend.counter.read()))


def eventually(condition: Callable[[], object]) -> None:
    """Return once it holds; a failure if something hangs."""
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.002)


@pytest.mark.row("E9", "E12")
@pytest.mark.parametrize("call", ["pause", "resume", "save"])
def test_an_on_dirty_that_pauses_meets_a_pause(call: str) -> None:
    """One holds the clock's lock and wants the machine's, the other is about to pause the clock: both end."""
    with Machine(SPIN, tick_interval_s=None) as machine:
        clock, told = engine_of(machine), list[int]()
        clock.write_msr(0, 0x4B564D01, 0x6001)
        machine.start()
        pausing = threading.Thread(target=machine.pause, daemon=True)

        def on_dirty(gpa: int, _length: int) -> None:
            if threading.current_thread() is not skipping or told:
                return
            told.append(gpa)
            pausing.start()
            pausing.join(0.1)  # it gets as far as the first lock that is taken
            machine.pause()
            getattr(machine, call)()

        machine.memory.on_dirty = on_dirty
        skipping = threading.Thread(target=clock.skip, args=(1,), daemon=True)
        skipping.start()
        for thread in (skipping, pausing):
            thread.join(HANG_S)
            assert not thread.is_alive()
        machine.memory.on_dirty = None
        assert told
        assert clock.is_paused


# A ticker of its own


@pytest.mark.row("E11", "E13", "K-12")
@pytest.mark.parametrize("tick_interval_s", [1.0, None])
def test_a_machine_left_alone(tick_interval_s: float | None) -> None:
    """After 2 s of guest time its pages were published anew, or not without a ticker; the guest reads on, and right."""
    with Machine(clockprobe(), vcpus=2, cmdline="cpus=2", tick_interval_s=tick_interval_s) as machine:
        clock = engine_of(machine)
        machine.start()
        wait_until_reading(machine)
        before, begin_ns = version(clock), clock.now()
        eventually(lambda: clock.now() > begin_ns + LEFT_ALONE_NS)
        if tick_interval_s is None:
            assert machine.ticker is None
            assert version(clock) == before
        else:
            assert machine.ticker is not None
            eventually(lambda: version(clock) >= before + 4)
            assert machine.ticker.failures == ()
        wait_until_all_read_on(machine)
        records = finish(machine)
        assert machine.ticker is None or not machine.ticker.has_threads  # wait() has stopped it
    assert not any(failures(records).values())


@pytest.mark.row("E11")
def test_no_ticker_of_the_engines_on_the_kernels_clock() -> None:
    """There is nothing to tick."""
    with Machine(SPIN, clock="kernel") as machine:
        assert machine.ticker is None


@pytest.mark.row("E11", "E12")
def test_a_ticker_leaves_a_paused_machine_alone() -> None:
    """While it is paused no page changes; in run_for() and after resume() it is ticked again."""
    with Machine(PAGE_LOG, memory_bytes=MEMORY_BYTES, tick_interval_s=0.002) as machine:
        clock, ticker = engine_of(machine), machine.ticker
        assert ticker is not None
        machine.start()
        wait_until_it_reads_on(machine)
        machine.pause()
        page, stood_ns, rounds = clock.page(0), stands_at(clock), ticker.rounds
        eventually(lambda: ticker.rounds > rounds + 5)
        assert (clock.page(0), stands_at(clock)) == (page, stood_ns)
        report = machine.run_for(50_000_000)
        assert stands_at(clock) == stood_ns + report.ran_ns
        before = version(clock)
        machine.resume()
        eventually(lambda: version(clock) >= before + 10)
        wait_until_it_reads_on(machine)
        machine.pause()
        seen = [ns for _, ns in readings(machine)]
        assert seen == sorted(seen)
        assert ticker.failures == ()


@pytest.mark.row("E11", "E13")
def test_a_tickers_failures_are_the_machines_to_show() -> None:
    """What a source raises in a tick is kept, with its clock; the machine runs on."""

    def broken() -> Sample:
        raise OSError("the source is gone")

    with Machine(SPIN, reference=broken, tick_interval_s=0.002) as machine:
        ticker = machine.ticker
        assert ticker is not None
        machine.start()
        eventually(lambda: ticker.failures)
        assert {(found.clock, str(found.error)) for found in ticker.failures} == {(machine.clock, "the source is gone")}
        assert not machine.runner.join(0)
    assert ticker.failures


@pytest.mark.row("E9", "E11")
def test_a_tick_that_does_not_return(monkeypatch: pytest.MonkeyPatch) -> None:
    """close() says so, having given everything else back; what wait() returns is not lost by it."""
    monkeypatch.setattr(Ticker.stop, "__defaults__", (0.2,))
    before = held()
    asked, go_on = threading.Event(), threading.Event()

    def blocks() -> Sample:
        asked.set()
        go_on.wait(HANG_S)
        raise OSError("too late")

    machine = Machine(bytes.fromhex("b007e6f4"), reference=blocks, tick_interval_s=0.002)
    machine.start()
    assert asked.wait(HANG_S)
    assert machine.wait(HANG_S) == 7
    with pytest.raises(StateError, match=r"stop: the tick of .* has not ended"):
        machine.close()
    assert held()._replace(threads=before.threads) == before
    go_on.set()
    eventually(lambda: held() == before)
    machine.close()


@pytest.mark.row("E9", "E11")
@pytest.mark.parametrize("call", ["stop", "close"])
def test_a_machine_that_its_own_tick_ends(call: str) -> None:
    """stop() and close() on the thread that ticks return, and nothing is left."""
    before = held()
    ended = threading.Event()

    def end() -> Sample:
        getattr(machines.pop(), call)()
        ended.set()
        raise OSError("ended")

    machines: list[Machine] = []
    machine = Machine(SPIN, vcpus=2, reference=end, tick_interval_s=0.002)
    machines.append(machine)
    machine.start()
    assert ended.wait(HANG_S)
    machine.close()
    assert held() == before


@pytest.mark.row("E9", "E11")
def test_when_there_is_a_tickers_thread() -> None:
    """From start() to stop()."""
    with Machine(SPIN) as machine:
        ticker = machine.ticker
        assert ticker is not None
        seen = [ticker.has_threads]
        for step in (machine.start, machine.pause, machine.stop):
            step()
            seen.append(ticker.has_threads)
        assert seen == [False, True, True, False]


# Saved and restored


def saved(text: list[str]) -> tuple[bytes, list[tuple[int, int]], int]:
    """A paused machine's RAM, what its guest read last and how often it had; its clock's state, as JSON, to `text`."""
    with Machine(PAGE_LOG, memory_bytes=MEMORY_BYTES) as machine:
        machine.start()
        wait_until_it_reads_on(machine)
        machine.pause()
        text.append(clock_state.to_json(machine.save()))
        return machine.memory.read(0, MEMORY_BYTES), readings(machine), entries(machine)


@pytest.mark.row("E1", "P-25")
@pytest.mark.parametrize("policy", ["freeze", "advance"])
def test_a_machines_clock_goes_on_in_another_machine(policy: str) -> None:
    """On the saved RAM a guest reads the page of its first life: on from there, by what the policy gives it."""
    text: list[str] = []
    ram, earlier, count = saved(text)
    state = clock_state.from_json(text[0])
    with Machine(PAGE_LOG, memory_bytes=MEMORY_BYTES, restore=state, policy=policy) as machine:
        clock = engine_of(machine)
        machine.memory.write(0, ram)
        assert clock.now() == int(state.timeline.guest_ns)
        begin = clock.backend.stamps()
        machine.start()
        end = clock.backend.stamps()
        while entries(machine) < count + 1000:
            wait_until_it_reads_on(machine)
        machine.pause()
        later = readings(machine)
        resumed = next(event for event in clock.events.read().events if event.kind == "resume")
    raw_ns = state.host.raw_ns
    assert raw_ns is not None
    least, most = (begin.raw_ns - raw_ns, end.raw_ns - raw_ns) if policy == "advance" else (0, 0)
    assert least <= resumed.jump_ns <= most
    seen = [ns for _, ns in (*earlier, *later)]
    assert seen == sorted(seen)
    tscs = [tsc for tsc, _ in (*earlier, *later)]
    assert tscs == sorted(tscs)
    first_tsc, first_ns = later[0]
    for tsc, ns in later:
        expected = clock.at(HostTsc((tsc - clock.tsc(0).offset) % 2**64))
        assert abs(ns - expected) <= Fraction(BOUND_NS)
        passed_ns = Fraction((tsc - first_tsc) * NS_PER_S, state.host.tsc_hz)
        assert abs(ns - first_ns - passed_ns) <= 2 * BOUND_NS


@pytest.mark.row("E1")
def test_a_restored_machine_that_is_paused_before_it_starts() -> None:
    """It stays so after start(), its clock, too; resume() lets both go on, by a policy of its own if need be."""
    text: list[str] = []
    ram, _, count = saved(text)
    state = clock_state.from_json(text[0])
    with Machine(PAGE_LOG, memory_bytes=MEMORY_BYTES, restore=state, policy="advance") as machine:
        clock = engine_of(machine)
        machine.memory.write(0, ram)
        assert machine.save() == state._replace(policy=SavedPolicy.named("advance"))
        machine.pause()
        machine.start()
        assert machine.runner.gate.keeps_all_out()
        assert clock.is_paused
        assert entries(machine) == count
        machine.resume("freeze")
        wait_until_it_reads_on(machine)
        assert next(event.jump_ns for event in clock.events.read().events if event.kind == "resume") == 0


@pytest.mark.row("E1", "E9")
def test_when_a_machine_can_be_saved() -> None:
    """While it is paused, and where the engine serves its clock."""
    with Machine(SPIN) as machine:
        machine.start()
        with pytest.raises(StateError, match=r"save: the machine is not paused; pause\(\) it, and copy its RAM"):
            machine.save()
        machine.pause()
        assert machine.save() == engine_of(machine).save()
        machine.stop()
        assert isinstance(machine.save(), ClockState)
    with Machine(SPIN, clock="kernel") as machine:
        machine.pause()
        for call in (machine.save, lambda: machine.run_for(1)):
            with pytest.raises(StateError, match="the kernel serves this guest's clock; make a machine with clock="):
                call()


@pytest.mark.row("P-22", "E9")
def test_a_run_without_vcpus_that_run() -> None:
    """run_for() reports none: on a machine that was never started, was stopped, or whose guest has ended."""
    with Machine(SPIN) as machine:
        machine.pause()
        before = engine_of(machine).now()
        with pytest.raises(StateError, match=r"run_for: the machine was never started; start\(\) it"):
            machine.run_for(NS_PER_S)
        assert engine_of(machine).now() == before
        machine.resume()
        machine.start()
        machine.pause()
        assert machine.run_for(1000).overshoot_ns >= 0
        machine.stop()
        before = engine_of(machine).now()
        with pytest.raises(StateError, match=r"run_for: the run has ended; start\(\) it again"):
            machine.run_for(NS_PER_S)
        assert engine_of(machine).now() == before
    with Machine(DONE) as machine:
        machine.start()
        machine.wait(HANG_S)
        machine.pause()
        with pytest.raises(StateError, match=r"run_for: the run has ended"):
            machine.run_for(NS_PER_S)
        assert isinstance(machine.save(), ClockState)


@pytest.mark.row("E9")
def test_a_closed_machine_is_closed() -> None:
    """What would let it live is a StateError that says so, and its clock's time does not move by it."""
    machine = Machine(SPIN)
    machine.start()
    machine.pause()
    before = engine_of(machine).now()
    machine.close()
    calls: dict[str, Callable[[], object]] = {
        "start": machine.start,
        "pause": machine.pause,
        "resume": machine.resume,
        "run_for": lambda: machine.run_for(NS_PER_S),
        "save": machine.save,
        "with": machine.__enter__,
    }
    for name, call in calls.items():
        with pytest.raises(StateError, match=f"^{name}: the machine is closed; make another machine$"):
            call()
    assert engine_of(machine).now() == before
    machine.stop()
    machine.close()
    assert machine.console == ""


@pytest.mark.row("E1", "E9")
def test_a_state_that_cannot_be_used_leaves_nothing() -> None:
    """The field is named, and no descriptor, thread or memory stays."""
    with Machine(SPIN) as machine:
        machine.pause()
        state = machine.save()
    before = held()
    wrong: Any = state._replace(provider=state.provider._replace(name="sundial"))
    with pytest.raises(StateFileError, match=r"provider\.name: found 'sundial'"):
        Machine(SPIN, restore=wrong)
    assert held() == before
