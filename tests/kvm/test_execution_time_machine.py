"""Unslaved time on a machine: while its vCPUs are kept out nothing passes for its guest, its own TSC included.

It takes a host that honours TSC offsets: another one says so, and the machine is not made.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from itertools import count
from typing import Any

import pytest

from pvclock import GuestClock, HostTsc, Machine, SimulatedBackend, TscOffsetNotHonoured, read_tsc
from pvclock.errors import ConfigError
from pvclock.host.execution_time import ExecutionTimeBackend
from pvclock.kvm.tsc_offset import TscOffsets
from pvclock.meter.findings import failures
from pvclock.meter.machine_guest import finish, wait_until_reading
from pvclock.payloads import clockprobe
from pvclock.state.clock_state import from_json, to_json
from tests.kvm.leaks import held
from tests.kvm.page_log import MEMORY_BYTES, PAGE_LOG, entries, readings, wait_until_it_reads_on
from tests.kvm.reading import assert_last_are_on_the_timeline, wait_until_all_read_on
from tests.unit.fault_points import MACHINE
from tests.unit.schedules import Lines

pytestmark = pytest.mark.kvm

NS_PER_S = 10**9
OUT_S = 0.5
"""How long the vCPUs are kept out at least."""
BOUND_NS = 4
"""Design 2.3, as in test_time_operations."""
SPIN = bytes.fromhex("ebfe")

HONOURED = pytest.mark.usefixtures("offsets_are_honoured")


@pytest.mark.row("J-05", "P-18")
def test_a_host_without_offsets_says_so(tsc_offsets: TscOffsets) -> None:
    """The machine is not made then, and leaves nothing behind; elsewhere it is."""
    before = held()
    if tsc_offsets is TscOffsets.HONOURED:
        Machine(SPIN, vcpus=2, backend=ExecutionTimeBackend).close()
    else:
        with pytest.raises(TscOffsetNotHonoured, match="TSC offset not honoured by this host"):
            Machine(SPIN, vcpus=2, backend=ExecutionTimeBackend)
    assert held() == before


def engine_of(machine: Machine) -> GuestClock:
    """The machine's clock, which is the engine's."""
    assert machine.clock is not None
    return machine.clock


def executed(machine: Machine) -> int:
    """How many ticks the guest has executed."""
    return engine_of(machine).backend.counter.read()


@contextmanager
def reading_guest() -> Iterator[Machine]:
    """A machine with unslaved time, ticked often, whose two vCPUs read it: in the end right, and never back."""
    image = clockprobe()
    with Machine(image, vcpus=2, cmdline="cpus=2", backend=ExecutionTimeBackend, tick_interval_s=0.05) as machine:
        clock = engine_of(machine)
        machine.start()
        wait_until_reading(machine)
        wait_until_all_read_on(machine)
        yield machine
        wait_until_all_read_on(machine)
        records = finish(machine)
        assert machine.ticker is not None
        assert machine.ticker.failures == ()
    assert not any(failures(records).values())
    for vcpu, record in enumerate(records):  # its newest TSC is within what it executed, so nothing else is in it
        tsc = (record.last_tsc - clock.tsc(vcpu).offset) % 2**64
        assert tsc <= executed(machine)
    assert_last_are_on_the_timeline(machine, records, BOUND_NS)


@HONOURED
@pytest.mark.row("P-08", "P-11", "P-18")
def test_a_pause_is_hidden_from_the_guest() -> None:
    """Of a pause no policy gives it anything, and its reads and its TSC go on as if there had been none."""
    with reading_guest() as machine:
        clock, host_begin, begin = engine_of(machine), read_tsc(), executed(machine)
        for policy in ("freeze", "advance"):
            machine.pause()
            stood = clock.now(), executed(machine)
            time.sleep(OUT_S)
            assert (clock.now(), executed(machine)) == stood
            machine.resume(policy)
            wait_until_all_read_on(machine)
        ran, passed = executed(machine) - begin, read_tsc() - host_begin
        assert passed - ran >= 2 * OUT_S * clock.backend.tsc_hz
        jumps = [event.jump_ns for event in clock.events.read().events if event.kind == "resume"]
        assert jumps == [0, 0]


@HONOURED
@pytest.mark.row("P-08", "P-11", "E12")
def test_before_the_start_and_after_the_end_nothing_passes() -> None:
    """Guest time and counter begin with start(), and stand from stop() on."""
    with Machine(PAGE_LOG, memory_bytes=MEMORY_BYTES, backend=ExecutionTimeBackend) as machine:
        clock = engine_of(machine)
        time.sleep(0.1)
        assert (clock.now(), executed(machine)) == (0, 0)
        machine.pause()
        machine.start()
        time.sleep(0.1)
        assert (clock.now(), executed(machine)) == (0, 0)
        machine.resume()
        wait_until_it_reads_on(machine)
        machine.stop()
        stood = clock.now(), executed(machine)
        time.sleep(0.1)
        assert (clock.now(), executed(machine)) == stood
        seen = readings(machine)
        assert 0 < seen[-1][0] <= stood[1]
        assert 0 < seen[-1][1] <= stood[0] + BOUND_NS


@HONOURED
@pytest.mark.row("P-11", "P-22", "E12")
def test_run_for_lets_it_execute_so_much() -> None:
    """Guest time goes on by what was asked for and a reported overshoot, by executed ticks; between runs by nothing."""
    with reading_guest() as machine:
        clock = engine_of(machine)
        machine.pause()
        for _ in range(3):
            before, begin = clock.at(HostTsc(executed(machine))), executed(machine)
            time.sleep(0.1)
            report = machine.run_for(50_000_000)
            assert report.overshoot_ns >= 0
            assert clock.at(HostTsc(executed(machine))) == before + report.ran_ns
            assert report.ran_ns == Fraction((executed(machine) - begin) * NS_PER_S, clock.backend.tsc_hz)
        machine.resume()


@HONOURED
@pytest.mark.row("P-11", "P-18", "E9")
def test_what_keeps_the_vcpus_out_in_a_run_is_hidden() -> None:
    """quiesce() by the clock's backend: the counter stands in it, and afterwards the guest's TSC is what it says."""
    with reading_guest() as machine:
        clock, host_begin, begin = engine_of(machine), read_tsc(), executed(machine)
        with clock.backend.quiesce(None):
            stood = clock.now(), executed(machine)
            time.sleep(OUT_S)
            assert (clock.now(), executed(machine)) == stood
        wait_until_all_read_on(machine)
        ran, passed = executed(machine) - begin, read_tsc() - host_begin
        assert passed - ran >= OUT_S * clock.backend.tsc_hz


@HONOURED
@pytest.mark.row("P-08", "E11", "E12")
@pytest.mark.parametrize(
    "operate",
    [
        lambda clock: clock.dilate(1, 10),
        lambda clock: clock.dilate(10, 1),
        lambda clock: clock.slew(-1_000_000, 100_000),
        lambda clock: clock.skip(1000),
        lambda clock: clock.refresh(),
        lambda clock: clock.host_write_msr(0, 0x10, 1 << 50),
    ],
    ids=["slower", "faster", "slew", "skip", "refresh", "tsc"],
)
def test_operations_beside_a_guest_that_executes(operate: Callable[[GuestClock], object]) -> None:
    """Whatever is done to its clock while it runs: no reading goes back, and the last ones are on the timeline."""
    with reading_guest() as machine:
        for _ in range(20):
            operate(engine_of(machine))
            wait_until_all_read_on(machine, 1000)
        engine_of(machine).dilate(1, 1)


@HONOURED
@pytest.mark.row("E1", "P-25", "P-08")
def test_unslaved_time_goes_on_in_another_machine() -> None:
    """Saved, and restored on an unslaved backend: the guest's TSC and time go on, and before start() nothing does."""
    with Machine(PAGE_LOG, memory_bytes=MEMORY_BYTES, backend=ExecutionTimeBackend) as machine:
        machine.start()
        wait_until_it_reads_on(machine)
        machine.pause()
        state = from_json(to_json(machine.save()))
        ram, earlier, already = machine.memory.read(0, MEMORY_BYTES), readings(machine), entries(machine)
    with Machine(PAGE_LOG, memory_bytes=MEMORY_BYTES, restore=state, backend=ExecutionTimeBackend) as machine:
        machine.memory.write(0, ram)
        machine.start()
        while entries(machine) < already + 1000:
            wait_until_it_reads_on(machine)
        machine.pause()
        seen = [*earlier, *readings(machine)]
        assert seen == sorted(seen)
        assert [ns for _, ns in seen] == sorted(ns for _, ns in seen)
        assert seen[-1][0] <= engine_of(machine).guest_tsc(0, HostTsc(executed(machine)))


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Keep the collector out: an interrupt in a finalizer of what it finds is swallowed, as Python says it is."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("offsets_are_honoured", "no_collection")
@pytest.mark.row("E9", "P-11")
@pytest.mark.parametrize("call", [Machine.start, Machine.pause, Machine.resume], ids=["start", "pause", "resume"])
def test_an_interrupt_at_each_line(call: Callable[[Machine], object]) -> None:
    """Whatever line it comes at: a pause afterwards hides time, the guest goes on after it, and nothing is left."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    before = held()
    for line in count():
        with Machine(PAGE_LOG, memory_bytes=MEMORY_BYTES, backend=ExecutionTimeBackend) as machine:
            if call is not Machine.start:
                machine.start()
            if call is Machine.resume:
                machine.pause()
            lines = Lines(*MACHINE, at=line, action=interrupt)
            with suppress(KeyboardInterrupt), lines.traced():
                call(machine)
            machine.pause()
            stood = engine_of(machine).now(), executed(machine)
            time.sleep(0.001)
            assert (engine_of(machine).now(), executed(machine)) == stood
            machine.resume()
            if machine.runner.gate.has_begun():
                wait_until_it_reads_on(machine)
        assert held() == before
        if lines.count <= line:
            break
        del lines  # which has frames, and these the machine
    assert line > 3


@pytest.mark.row("E9", "P-18")
@pytest.mark.parametrize(
    ("backend", "said"),
    [
        (
            lambda inner: ExecutionTimeBackend(inner, native=False),
            "native=False; a guest on /dev/kvm reads the hardware's",
        ),
        (lambda _inner: None, "made None of the vCPUs' backend; it must return a Backend"),
        (lambda _inner: SimulatedBackend(10**9), "made a SimulatedBackend that is not around the vCPUs' backend"),
        (lambda inner: SimulatedBackend(inner.tsc_hz), "made a SimulatedBackend that is not around the vCPUs' backend"),
        (
            lambda inner: ExecutionTimeBackend(SimulatedBackend(inner.tsc_hz)),
            "made a ExecutionTimeBackend that is not around",
        ),
    ],
)
def test_a_backend_that_no_machine_can_have(backend: Callable[..., Any], said: str) -> None:
    """It is refused on every host, and nothing is left behind."""
    before = held()
    with pytest.raises(ConfigError, match=said):
        Machine(SPIN, backend=backend)
    assert held() == before


@pytest.mark.row("E9")
def test_a_backend_of_the_callers_around_the_vcpus() -> None:
    """What `backend` returns is what the clock has; it may be the vCPUs' own."""
    seen: list[object] = []

    def same(inner: object) -> object:
        seen.append(inner)
        return inner

    with Machine(PAGE_LOG, memory_bytes=MEMORY_BYTES, backend=same) as machine:  # type: ignore[arg-type]
        assert [engine_of(machine).backend] == seen
        machine.start()
        wait_until_it_reads_on(machine)
