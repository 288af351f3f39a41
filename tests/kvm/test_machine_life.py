"""A machine's life past its first run: run states, runs after runs, and resets at any moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread
from typing import Literal

import pytest

from pvclock import ConfigError, GuestClock
from pvclock.boot import BootSource
from pvclock.errors import GuestCrashed, StateError
from pvclock.kvm import Exit, open_kvm
from pvclock.kvm.tsc_offset import TscOffsets
from pvclock.machine import CONSOLE_PORT, EXIT_PORT, Machine, RunState
from pvclock.meter.findings import failures
from pvclock.meter.machine_guest import finish, probe_machine, wait_until_reading
from pvclock.payloads.probe import State
from pvclock.quantities import NS_PER_S
from tests.kvm.guests import HLT, out, write_msr
from tests.kvm.leaks import held
from tests.waiting import HANG_S

pytestmark = [pytest.mark.kvm, pytest.mark.row("E9")]

CLOCKS: list[Literal["engine", "kernel"]] = ["engine", "kernel"]
DATA = 0x5000
PAGE = 0x6000
SYSTEM_TIME = 0x4B564D01
SPIN = bytes.fromhex("66ff060050 ebf9")  # 1: incl DATA; jmp 1b
CRASH = bytes.fromhex("ea00000020")  # ljmp $0x2000, $0, where no memory is
REGISTER_AND_SPIN = write_msr(SYSTEM_TIME, PAGE | 1) + SPIN

PRELAUNCH, RUNNING, PAUSED = RunState.PRELAUNCH, RunState.RUNNING, RunState.PAUSED
SHUTDOWN, INTERNAL_ERROR = RunState.SHUTDOWN, RunState.INTERNAL_ERROR


def count(machine: Machine) -> int:
    """How often the guest has gone round its loop."""
    return int.from_bytes(machine.memory.read(DATA, 4), "little")


def eventually(condition: Callable[[], object]) -> None:
    """Return once `condition` holds; a failure if that takes for ever."""
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline, "it never came true"


def engine_of(machine: Machine) -> GuestClock:
    """The engine's clock."""
    assert machine.clock is not None
    return machine.clock


# Run states


@pytest.mark.parametrize("clock", CLOCKS)
def test_the_states_of_a_run(clock: Literal["engine", "kernel"]) -> None:
    """Each operation's change is told when it is done: no vCPU goes in before running, and none is in after it."""
    seen: list[tuple[RunState, RunState]] = []
    moves: list[bool] = []
    with Machine(SPIN, vcpus=2, clock=clock) as machine:

        def handler(before: RunState, now: RunState) -> None:
            seen.append((before, now))
            first = count(machine)
            moves.append(any(count(machine) != first for _ in range(200)))

        machine.run_state.add_handler(handler)
        assert machine.run_state.current is PRELAUNCH
        machine.start()
        eventually(lambda: count(machine))
        machine.pause()
        machine.pause()
        machine.resume()
        machine.resume()
        machine.stop()
        machine.stop()
        assert machine.run_state.current is SHUTDOWN
    assert seen == [(PRELAUNCH, RUNNING), (RUNNING, PAUSED), (PAUSED, RUNNING), (RUNNING, SHUTDOWN)]
    assert moves == [False] * 4


def test_states_before_a_run() -> None:
    """A machine that is paused before its start is paused after it; resume() before it is prelaunch again."""
    with Machine(SPIN) as machine:
        machine.pause()
        assert machine.run_state.current is PAUSED
        machine.resume()
        assert machine.run_state.current is PRELAUNCH
        machine.pause()
        machine.start()
        assert (machine.run_state.current, count(machine)) == (PAUSED, 0)
        machine.resume()
        assert machine.run_state.current is RUNNING
        eventually(lambda: count(machine))


@pytest.mark.parametrize(("image", "state"), [(out(EXIT_PORT, 1), SHUTDOWN), (CRASH, INTERNAL_ERROR)])
def test_the_guests_end_is_told(image: bytes, state: RunState) -> None:
    """By the exit port or by a crash, on a vCPU's thread, and wait() returns after it."""
    told: list[RunState] = []
    with Machine(image, memory_bytes=1 << 16) as machine:
        machine.run_state.add_handler(lambda _, now: told.append(now))
        machine.start()
        eventually(lambda: machine.run_state.current is state)
        try:
            assert machine.wait(HANG_S) == 1
        except GuestCrashed:
            assert state is INTERNAL_ERROR
        assert told == [RUNNING, state]


def test_no_vcpu_goes_in_before_another_thread_has_told() -> None:
    """A resume() while the handlers still hear of pause() lets the vCPUs in once they have heard of itself, too."""
    moves: list[bool] = []
    is_told = Event()

    def handler(_before: RunState, now: RunState) -> None:
        if now is PAUSED:
            resuming = Thread(target=machine.resume)
            resuming.start()
            resuming.join()
        first = count(machine)
        time.sleep(0.02)
        moves.append(count(machine) != first)
        if now is RUNNING:
            is_told.set()

    with Machine(SPIN, vcpus=2) as machine:
        machine.start()
        eventually(lambda: count(machine))
        machine.run_state.add_handler(handler)
        machine.pause()
        assert is_told.wait(HANG_S)
        machine.run_state.remove_handler(handler)
        first = count(machine)
        eventually(lambda: count(machine) != first)
    assert moves == [False, False]


def test_a_handler_of_the_run_state_may_act() -> None:
    """It may stop or pause the machine that tells it."""
    with Machine(SPIN, vcpus=2) as machine:
        machine.run_state.add_handler(lambda _, now: machine.pause() if now is RUNNING else None)
        machine.start()
        assert (machine.run_state.current, count(machine)) == (PAUSED, 0)
    with Machine(SPIN, vcpus=2) as machine:
        machine.run_state.add_handler(lambda _, now: machine.stop() if now is RUNNING else None)
        machine.start()
        assert (machine.run_state.current, count(machine)) == (SHUTDOWN, 0)


def test_a_handler_of_the_run_state_that_fails() -> None:
    """On a vCPU's thread its error is the run's failure, which wait() raises."""

    def fail(_before: RunState, now: RunState) -> None:
        if now is SHUTDOWN:
            raise ZeroDivisionError

    with Machine(out(EXIT_PORT, 1) + HLT) as machine:
        machine.run_state.add_handler(fail)
        machine.start()
        with pytest.raises(ZeroDivisionError):
            machine.wait(HANG_S)


def test_a_handler_of_the_run_state_that_fails_at_close() -> None:
    """Its error comes when all is given back: nothing is left of the machine."""

    def fail(_before: RunState, now: RunState) -> None:
        if now is SHUTDOWN:
            raise ZeroDivisionError

    before = held()
    machine = Machine(SPIN)
    machine.run_state.add_handler(fail)
    with pytest.raises(ZeroDivisionError):
        machine.close()
    assert held() == before


def test_a_crashed_machine_starts_after_a_reset_only() -> None:
    """start() is a StateError in internal-error, and its guest is as before; reset() makes it prelaunch."""
    with Machine(out(CONSOLE_PORT, 0x41) + CRASH, memory_bytes=1 << 16) as machine:
        for _ in range(2):
            machine.start()
            with pytest.raises(GuestCrashed):
                machine.wait(HANG_S)
            with pytest.raises(StateError, match=r"^start: the machine is in state internal-error; reset\(\) it$"):
                machine.start()
            machine.reset()
            assert machine.run_state.current is PRELAUNCH
            with pytest.raises(StateError, match="the machine was never started"):
                machine.wait()
        assert machine.console == "AA"


# Runs after runs


@pytest.mark.parametrize("clock", CLOCKS)
def test_a_stopped_machine_goes_on(clock: Literal["engine", "kernel"]) -> None:
    """After stop(), start() lets the vCPUs go on where they stood, ticker and all, and nothing is left by any run."""
    before = held()
    with Machine(SPIN, vcpus=2, clock=clock, tick_interval_s=0.01) as machine:
        for _ in range(5):
            first = count(machine)
            machine.start()
            eventually(lambda: count(machine) > first)  # noqa: B023
            if machine.ticker is not None:
                rounds = machine.ticker.rounds
                eventually(lambda: machine.ticker is not None and machine.ticker.rounds > rounds)  # noqa: B023
            machine.stop()
            assert held().threads == before.threads
            with pytest.raises(StateError, match="the machine was stopped"):
                machine.wait()
    assert held() == before


def test_a_start_after_a_stop_that_was_interrupted() -> None:
    """The run had ended and the ticker had not: that is made up for."""
    with Machine(SPIN) as machine:
        machine.start()
        machine.runner.stop()
        machine.start()
        eventually(lambda: count(machine))
        assert machine.run_state.current is RUNNING


def test_each_run_has_its_own_exit_code() -> None:
    """A guest that is started again after its exit goes on behind it."""
    with Machine(b"".join(out(EXIT_PORT, code) for code in (1, 2, 3))) as machine:
        for code in (1, 2, 3):
            machine.start()
            assert machine.wait(HANG_S) == machine.exit_code == code


def test_start_of_a_machine_that_runs_is_refused() -> None:
    """It runs on."""
    with Machine(SPIN) as machine:
        machine.start()
        with pytest.raises(StateError, match="the vCPUs run already"):
            machine.start()
        first = count(machine)
        eventually(lambda: count(machine) != first)
        assert machine.run_state.current is RUNNING


# Resets


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("image", [SPIN, REGISTER_AND_SPIN, out(CONSOLE_PORT, 0x2E) * 100 + SPIN])
def test_a_reset_of_a_machine_that_runs(clock: Literal["engine", "kernel"], image: bytes) -> None:
    """RAM is as it was loaded, the guest boots anew at once, and no handler of the run state hears of it."""
    told: list[RunState] = []
    with Machine(image, vcpus=2, clock=clock) as machine:
        machine.start()
        machine.run_state.add_handler(lambda _, now: told.append(now))
        for _ in range(10):
            eventually(lambda: count(machine) > 1000)
            machine.memory.write(0x9000, b"x" * 5000)
            machine.reset()
            assert machine.run_state.current is RUNNING
            assert machine.memory.read(0x9000, 5000) == bytes(5000)
        eventually(lambda: count(machine) > 1000)
        assert told == []


@pytest.mark.row("K-10")
def test_a_reset_forgets_the_guests_page() -> None:
    """The clock's MSRs are as at the start, its time goes on, and nothing is published into the new guest's RAM."""
    with Machine(REGISTER_AND_SPIN, tick_interval_s=None) as machine:
        clock = engine_of(machine)
        machine.start()
        eventually(lambda: count(machine))
        assert clock.page(0) is not None
        machine.stop()
        before = clock.now()
        machine.reset()
        assert machine.run_state.current is PRELAUNCH
        assert clock.page(0) is None
        assert clock.now() >= before
        clock.tick()
        assert machine.memory.read(PAGE, 32) == bytes(32)
        assert [str(event.kind) for event in clock.events.read().events].count("reset") == 1
        machine.start()
        eventually(lambda: count(machine))
        assert clock.page(0) is not None


@pytest.mark.parametrize("clock", CLOCKS)
def test_a_reset_forgets_the_tsc_adjustment(clock: Literal["engine", "kernel"]) -> None:
    """IA32_TSC_ADJUST is 0 to the next guest, whoever serves it."""
    read_and_end = bytes.fromhex("66b93b000000 0f32 e6f4")  # mov $0x3b, %ecx; rdmsr; out %al, $0xf4
    with Machine(write_msr(0x3B, 0x21) + read_and_end, clock=clock) as machine:
        machine.start()
        assert machine.wait(HANG_S) == 0x21
        machine.boot_source = BootSource(read_and_end)
        machine.reset()
        machine.start()
        assert machine.wait(HANG_S) == 0


@pytest.mark.row("E3", "J-02")
def test_a_reset_begins_the_tsc_anew(tsc_offsets: TscOffsets) -> None:
    """All vCPUs' at 0 and with one offset, while guest time goes on; where no offset is honoured, they go on, too."""
    with probe_machine("engine", 2) as machine:
        machine.start()
        wait_until_reading(machine)
        clock = engine_of(machine)
        before = clock.now()
        machine.reset()
        wait_until_reading(machine)
        records = finish(machine)
        assert clock.tsc(0).offset == clock.tsc(1).offset
        assert not any(failures(records).values())
        for record in records:
            since_ns = record.first_ns - before
            assert since_ns > 0
            is_younger = record.first_tsc * NS_PER_S <= since_ns * clock.tsc_hz
            assert is_younger is (tsc_offsets is TscOffsets.HONOURED)


def test_a_reset_leaves_a_tsc_that_was_asked_for() -> None:
    """A machine whose guest's TSC is to be the host's keeps it so."""
    with Machine(SPIN, vcpus=2, tsc_offset=0) as machine:
        machine.start()
        machine.reset()
        assert [engine_of(machine).tsc(vcpu).offset for vcpu in (0, 1)] == [0, 0]


@pytest.mark.parametrize("index", [0x140, 0x174, 0x17A, 0x277])
def test_a_reset_forgets_what_the_guest_wrote_to_msrs(index: int) -> None:
    """Among them CPUID faulting, the end of the next guest's ring 3 if it stayed."""
    with Machine(write_msr(index, 1) + SPIN) as machine:
        at_power_on = machine.vcpus[0].get_msr(index)
        machine.start()
        eventually(lambda: count(machine))
        machine.stop()
        assert machine.vcpus[0].get_msr(index) == 1
        machine.reset()
        assert machine.vcpus[0].get_msr(index) == at_power_on


def test_a_reset_of_a_paused_machine() -> None:
    """It is prelaunch then, as handlers hear at once, and start() lets vCPUs and clock go on."""
    told: list[RunState] = []
    with Machine(REGISTER_AND_SPIN) as machine:
        machine.start()
        eventually(lambda: count(machine))
        machine.pause()
        machine.run_state.add_handler(lambda _, now: told.append(now))
        machine.reset()
        assert told == [PRELAUNCH]
        assert (machine.run_state.current, count(machine)) == (PRELAUNCH, 0)
        assert engine_of(machine).is_paused
        machine.start()
        assert machine.run_state.current is RUNNING
        assert not engine_of(machine).is_paused
        eventually(lambda: count(machine))


def test_a_reset_after_a_pause_that_was_interrupted() -> None:
    """The vCPUs were paused and the clock was not: both go on at start()."""
    with Machine(SPIN) as machine:
        machine.start()
        machine.runner.pause()
        machine.reset()
        assert machine.run_state.current is PRELAUNCH
        machine.start()
        assert machine.run_state.current is RUNNING
        eventually(lambda: count(machine))


@pytest.mark.parametrize("clock", CLOCKS)
def test_a_reset_of_a_guest_with_two_vcpus(clock: Literal["engine", "kernel"]) -> None:
    """clockprobe, in ring 3 on both with paging on, boots as the first time: the other vCPU waits for its SIPI."""
    with probe_machine(clock, 2) as machine:
        machine.start()
        for _ in range(3):
            wait_until_reading(machine)
            machine.reset()
        wait_until_reading(machine)
        records = finish(machine)
        assert [record.state for record in records] == [State.DONE, State.DONE]
        assert not any(failures(records).values())


def test_a_reset_after_the_exit() -> None:
    """The exit code is forgotten, the console stays, and the next run is as the first."""
    with Machine(BootSource(out(CONSOLE_PORT, 0x41) + out(EXIT_PORT, 3) + CRASH), memory_bytes=1 << 16) as machine:
        for runs in range(1, 4):
            machine.start()
            assert machine.wait(HANG_S) == 3
            machine.reset()
            assert (machine.exit_code, machine.console) == (None, "A" * runs)


def test_a_reset_tells_of_the_ram() -> None:
    """on_dirty hears of all of it, for KVM's dirty log does not see what user space writes."""
    dirty: list[tuple[int, int]] = []
    with Machine(SPIN, memory_bytes=1 << 20) as machine:
        machine.memory.on_dirty = lambda gpa, length: dirty.append((gpa, length))
        machine.reset()
        machine.memory.on_dirty = None
    assert (0, 1 << 20) in dirty


@pytest.mark.parametrize("clock", CLOCKS)
def test_a_reset_while_somebody_waits(clock: Literal["engine", "kernel"]) -> None:
    """wait() waits for the new guest's end, and does not stop it."""
    with Machine(SPIN, clock=clock) as machine, ThreadPoolExecutor(1) as pool:
        machine.start()
        waiting = pool.submit(machine.wait, HANG_S)
        for _ in range(5):
            eventually(lambda: count(machine) > 1000)
            machine.reset()
        eventually(lambda: count(machine) > 1000)
        assert not waiting.done()
        machine.boot_source = BootSource(out(EXIT_PORT, 3))
        machine.reset()
        assert waiting.result() == 3


def test_a_reset_of_a_paused_machine_while_somebody_waits() -> None:
    """There is nothing to wait for then; wait() says so."""
    with Machine(SPIN) as machine, ThreadPoolExecutor(1) as pool:
        machine.start()
        waiting = pool.submit(machine.wait, HANG_S)
        eventually(lambda: count(machine))
        machine.pause()
        machine.reset()
        with pytest.raises(StateError, match=r"wait: the machine was (reset|never started)"):
            waiting.result()


@pytest.mark.parametrize("clock", CLOCKS)
def test_resets_by_several_threads(clock: Literal["engine", "kernel"]) -> None:
    """One comes after the other, and the guest runs on after each."""
    with Machine(SPIN, vcpus=2, clock=clock) as machine, ThreadPoolExecutor(3) as pool:
        machine.start()
        for reset in [pool.submit(machine.reset) for _ in range(30)]:
            reset.result()
        assert machine.run_state.current is RUNNING
        eventually(lambda: count(machine))


def test_a_stop_while_another_thread_resets() -> None:
    """It comes after the reset, whose machine it stops."""
    is_within, may_go_on = Event(), Event()

    def on_dirty(gpa: int, length: int) -> None:
        if (gpa, length) == (0, 1 << 20):
            is_within.set()
            may_go_on.wait(HANG_S)

    with Machine(SPIN, memory_bytes=1 << 20) as machine, ThreadPoolExecutor(2) as pool:
        machine.start()
        machine.memory.on_dirty = on_dirty
        resetting = pool.submit(machine.reset)
        assert is_within.wait(HANG_S)
        stopping = pool.submit(machine.stop)
        with pytest.raises(TimeoutError):
            stopping.result(0.05)
        may_go_on.set()
        resetting.result()
        stopping.result()
        assert machine.run_state.current is SHUTDOWN
        machine.memory.on_dirty = None


def test_a_close_while_another_thread_resets() -> None:
    """All is given back when it returns, and the reset ends with a StateError or before."""
    before = held()
    for _ in range(20):
        with ThreadPoolExecutor(1) as pool:
            machine = Machine(SPIN, vcpus=2)
            machine.start()
            resetting = pool.submit(machine.reset)
            machine.close()
            failure = resetting.exception()
            assert failure is None or isinstance(failure, StateError)
    assert held() == before


def test_a_start_on_a_vcpus_own_thread() -> None:
    """As a handler of the end might want it; it is refused for what it is."""
    refused: list[str] = []

    def restart(_before: RunState, now: RunState) -> None:
        if now is SHUTDOWN:
            with pytest.raises(StateError) as info:
                machine.start()
            refused.append(str(info.value))

    with Machine(out(EXIT_PORT, 5)) as machine:
        machine.run_state.add_handler(restart)
        machine.start()
        assert machine.wait(HANG_S) == 5
        machine.run_state.remove_handler(restart)
    assert refused == ["start: this is the thread of a vCPU; start() the machine on another one"]


def test_a_reset_on_a_vcpus_own_thread() -> None:
    """It cannot wait for its own end: a StateError says so, and the guest runs on."""
    refused: list[str] = []

    class ResetPort:
        name = "reset port"

        def read(self, _offset: int, length: int) -> bytes:
            return bytes(length)

        def write(self, _offset: int, _data: bytes) -> None:
            try:
                machine.reset()
            except StateError as error:
                refused.append(str(error))

        def reset(self) -> None:
            """Have no state."""

    with Machine(out(0x64, 1) + out(EXIT_PORT, 5)) as machine:
        machine.bus.add_ports(0x64, 1, ResetPort())
        machine.start()
        assert machine.wait(HANG_S) == 5
    assert refused == ["reset: this is the thread of a vCPU; reset() the machine on another one"]


def test_a_closed_machine_is_not_reset() -> None:
    """As for all else."""
    with Machine(SPIN) as machine:
        pass
    with pytest.raises(StateError, match="reset: the machine is closed"):
        machine.reset()


# Rollbacks

REGISTER_AGAIN_AND_AGAIN = SPIN[:5] + write_msr(SYSTEM_TIME, PAGE | 1)
REGISTER_AGAIN_AND_AGAIN += b"\xeb" + (256 - len(REGISTER_AGAIN_AND_AGAIN) - 2).to_bytes(1, "little")


@pytest.mark.row("E1")
def test_a_rollback_reaches_the_exits() -> None:
    """The clock that was saved serves the guest's MSR writes and is ticked; the one before it is out of both."""
    with Machine(REGISTER_AGAIN_AND_AGAIN, tick_interval_s=0.01) as machine:
        machine.start()
        eventually(lambda: count(machine) > 10)
        machine.pause()
        state, ram = machine.save(), machine.memory.read(0, 0x10000)
        machine.resume()
        with pytest.raises(StateError, match="roll_back: the machine is not paused"):
            machine.roll_back(state)
        first = count(machine)
        eventually(lambda: count(machine) > first + 10)
        machine.pause()
        old = engine_of(machine)
        machine.memory.write(0, ram)
        machine.roll_back(state, policy="freeze")
        clock = engine_of(machine)
        assert clock is not old
        assert clock.now() == int(state.timeline.guest_ns)
        assert clock.now() < old.now()
        machine.resume()
        first = count(machine)
        eventually(lambda: count(machine) > first + 100)
        assert machine.run_state.current is RUNNING
        assert clock.page(0) is not None
        assert machine.ticker is not None
        assert not [failure for failure in machine.ticker.failures if failure.clock is clock]
        machine.stop()
        assert machine.runner.failure is None
    with Machine(SPIN, clock="kernel") as machine:
        machine.pause()
        with pytest.raises(StateError, match="roll_back: the kernel serves this guest's clock"):
            machine.roll_back(state)


@pytest.mark.row("E1")
def test_a_rollback_while_an_exit_is_served() -> None:
    """An MSR write that waits for the clock meanwhile is served by the clock that was saved, and the run goes on."""
    with Machine(REGISTER_AGAIN_AND_AGAIN, tick_interval_s=None) as machine:
        machine.pause()
        machine.start()
        state = machine.save()
        service, is_served = machine.clock_service, Event()
        write = service.write_msr

        def write_msr(vcpu: int, index: int, value: int) -> None:
            is_served.set()
            write(vcpu, index, value)

        service.write_msr = write_msr  # type: ignore[method-assign]  # until roll_back() puts the new clock's there
        with machine.memory.clock_lock:
            machine.resume()
            assert is_served.wait(HANG_S)
            machine.pause()
            machine.roll_back(state)
        machine.resume()
        eventually(lambda: count(machine) > 10)
        assert engine_of(machine).page(0) is not None


@pytest.mark.parametrize("option", ["backend", "vcpu_host", "dilation"])
def test_a_rollback_takes_the_options_of_a_restored_clock(option: str) -> None:
    """As Machine(restore=...) does: others are a ConfigError, and the clock is as before."""
    with Machine(SPIN) as machine:
        machine.pause()
        clock = engine_of(machine)
        with pytest.raises(ConfigError, match=f"it takes none but policy, reference, any_tsc_hz, vmm: {option}"):
            machine.roll_back(machine.save(), **{option: None})
        assert engine_of(machine) is clock


# What it is made of


def test_a_boot_source_has_the_command_line() -> None:
    """Given twice is a ConfigError."""
    with pytest.raises(ConfigError, match="a BootSource has its own command line; leave out: cmdline"):
        Machine(BootSource(SPIN, "quiet"), cmdline="quiet")


def test_as_many_vcpus_as_kvm_takes() -> None:
    """More than the host has CPUs, which KVM recommends, and no more than KVM_CAP_MAX_VCPUS."""
    with open_kvm() as kvm:
        most = kvm.check_extension("KVM_CAP_MAX_VCPUS")
        assert most >= kvm.check_extension("KVM_CAP_NR_VCPUS")
        with pytest.raises(ConfigError, match=rf"^{most + 1} vCPUs; choose 1 to {most}$"):
            Machine(SPIN, vcpus=most + 1, kvm=kvm)
        with Machine(SPIN, vcpus=min(most, 300), kvm=kvm) as machine:
            machine.start()
            eventually(lambda: count(machine))


@pytest.mark.parametrize("clock", CLOCKS)
def test_guest_time_is_seen_through_the_service(clock: Literal["engine", "kernel"]) -> None:
    """Whoever serves the clock: its time goes on while the guest runs."""
    with Machine(SPIN, clock=clock) as machine:
        machine.start()
        first = machine.clock_service.now_ns()
        eventually(lambda: machine.clock_service.now_ns() > first)


def test_an_exit_that_nobody_knows_is_a_crash() -> None:
    """The guest's HLT has no exit on a machine with interrupt controllers; what its handler does not know ends it."""
    with Machine(SPIN) as machine:

        class Odd:
            pass

        odd: Exit = Odd()  # type: ignore[assignment]
        assert machine._hardware._exits.handle(0, odd) is False
        assert isinstance(machine._outcome.crash, GuestCrashed)
