"""What a machine does for a provider: timers, interrupts, hypercalls by a port, and the reset that a guest asks for."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest

from pvclock import ConfigError, HypercallResult, Machine, StateError, Status
from pvclock.machine import EXIT_PORT
from pvclock.machine.run_state import RunState
from tests.kvm.guests import HLT, out, write_msr
from tests.kvm.interrupt_guests import COUNT, READY, SET_READY, counting, set_vector, unless_count
from tests.kvm.leaks import held
from tests.unit.alarm_provider import ALARM_MSR, PORT, RESET_MSR, VECTOR, Alarm, register
from tests.waiting import HANG_S, alarm_after

pytestmark = pytest.mark.kvm

MS: Final = 10**6
SPIN: Final = bytes.fromhex("ebfe")
RESULT: Final = 0x2000
UD: Final = 6
BOOTS_PORT: Final = 0x70


@pytest.fixture(autouse=True)
def alarm_is_registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let there be a provider that needs services; what hangs is a failure."""
    register(monkeypatch)
    with alarm_after(HANG_S):
        yield


def a_machine(image: bytes, **options: Any) -> Machine:  # noqa: ANN401  # Machine's
    """One whose guest has that provider."""
    return Machine(image, provider="Alarm", **options)


def alarm(machine: Machine) -> Alarm:
    """Its provider."""
    assert machine.clock is not None
    provider = machine.clock.interface.provider
    assert isinstance(provider, Alarm)
    return provider


def wait_for(condition: Callable[[], object]) -> None:
    """Return once it holds; a wait for ever is a failure by the alarm."""
    while not condition():
        time.sleep(0.001)


# Timers and interrupts


@pytest.mark.row("H-42")
def test_a_guest_takes_its_timers_interrupts() -> None:
    """It sleeps in HLT and is woken for each period; none is expired before it is due."""
    image = counting(VECTOR, write_msr(ALARM_MSR, MS), unless_count(5, out(EXIT_PORT, 9)))
    with a_machine(image, period_ns=MS) as machine:
        machine.start()
        assert machine.wait() == 9
        assert machine.memory.read(COUNT, 4) == bytes((5, 0, 0, 0))
        expired = alarm(machine).expired
        assert [due for due, _ in expired] == [number * MS for number in range(1, len(expired) + 1)]
        assert all(due <= at for due, at in expired)


@pytest.mark.row("H-42")
def test_no_timer_while_a_machine_is_paused() -> None:
    """A timer that came due in a pause expires after it, at its guest time."""
    with a_machine(counting(VECTOR, write_msr(ALARM_MSR, 200 * MS), out(EXIT_PORT, 1))) as machine:
        assert machine.clock is not None
        machine.clock.dilate(1, 1000)  # however long the host takes, the timer is not due before the pause
        machine.start()
        wait_for(lambda: alarm(machine).due_ns)
        machine.pause()
        assert machine.clock.now() < 200 * MS
        machine.clock.dilate(1)
        time.sleep(0.3)
        assert (alarm(machine).expired, machine.memory.read(COUNT, 4)) == ([], bytes(4))
        machine.resume("freeze")
        assert machine.wait() == 1
        assert [due for due, at in alarm(machine).expired if due <= at] == [200 * MS]


@pytest.mark.row("H-42")
def test_a_pause_waits_for_a_delivery() -> None:
    """What a paused machine's RAM and APICs have is complete: nothing is delivered after pause() has returned."""
    with a_machine(SPIN) as machine:
        provider = alarm(machine)
        begun, ended = threading.Event(), threading.Event()

        def deliver() -> None:
            begun.set()
            time.sleep(0.1)
            ended.set()

        provider.deliver = deliver
        machine.start()
        provider.write_msr(0, ALARM_MSR, 1)
        assert begun.wait(HANG_S)
        machine.pause()
        assert ended.is_set()


@pytest.mark.row("H-42")
def test_a_machine_rolled_back_has_its_timers() -> None:
    """The saved clock's timers interrupt the guest, and the replaced clock's do not."""
    with a_machine(counting(VECTOR, SET_READY, out(EXIT_PORT, 1))) as machine:
        machine.start()
        wait_for(lambda: machine.memory.read(READY, 1) == b"\x01")
        machine.pause()
        before = alarm(machine)
        machine.roll_back(machine.save())
        assert alarm(machine) is not before
        before.due_ns = alarm(machine).due_ns = 1
        machine.resume()
        assert machine.wait() == 1
        assert (before.expired, len(alarm(machine).expired)) == ([], 1)


@pytest.mark.row("E9")
@pytest.mark.parametrize("end", [Machine.stop, Machine.close, Machine.reset])
def test_the_timers_thread_runs_as_long_as_the_machine(end: Callable[[Machine], object]) -> None:
    """From start() to stop() or close(); a reset leaves it running; nothing is left, nor without timers."""
    before = held()
    with a_machine(SPIN) as machine:
        timers = machine.clock_service.timer_thread
        assert timers is not None
        assert not timers.has_threads
        machine.start()
        assert timers.is_running
        end(machine)
        assert timers.has_threads is (end is Machine.reset)
    assert held() == before
    with Machine(SPIN) as machine:
        assert machine.clock_service.timer_thread is None


@pytest.mark.row("E9")
def test_a_dropped_machine_ends_its_timers() -> None:
    """Its services do not keep it, and nothing is left, without a collection of garbage."""
    gc.collect()
    before = held()
    gc.disable()
    try:
        machine = a_machine(SPIN)
        machine.start()
        del machine
        wait_for(lambda: held().is_no_more_than(before))
    finally:
        gc.enable()


# The VMM's services


@pytest.mark.row("K-36")
def test_interrupts_between_vcpus() -> None:
    """send_ipi() counts whose APIC accepted it; ids that no vCPU has, and APICs that are off, accept none."""
    with a_machine(counting(VECTOR, out(0x80, 0)), vcpus=2) as machine:
        vmm = alarm(machine).clock.vmm
        assert vmm is not None
        assert vmm.send_ipi([0, 1, 2, 0xFF, 2**32 - 1], VECTOR) == 0
        machine.start()
        wait_for(lambda: vmm.send_ipi([0, 1, 2, 0xFF, 2**32 - 1], VECTOR) == 1)
        wait_for(lambda: machine.memory.read(COUNT, 1) != b"\x00")  # an emulated KVM may take one twice


@pytest.mark.row("K-36")
def test_a_kick_ends_a_halt() -> None:
    """A vCPU in HLT goes on without an interrupt; one that no vCPU has, or that runs, is ignored."""
    with a_machine(out(0x80, 1) + HLT + out(EXIT_PORT, 3)) as machine:
        vmm = alarm(machine).clock.vmm
        assert vmm is not None
        machine.start()
        vmm.yield_to(0)
        vmm.kick(1)
        vmm.kick(2**32 - 1)
        while not machine.runner.join(0):
            vmm.kick(0)
        assert machine.wait() == 3


@pytest.mark.row("K-34")
def test_services_change_nothing_that_kvm_offers() -> None:
    """Provider KVM offers what this host's kernel and engine serve, with the machine's services or without."""
    offered = []
    options: list[dict[str, Any]] = [{}, {"vmm": None}]
    for each in options:
        with Machine(HLT, **each) as machine:
            assert machine.clock is not None
            offered.append((machine.clock.cpuid_leaves, machine.clock.interface.config))
    assert offered[0] == offered[1]


# Hypercalls


def hypercall(registers: bytes) -> bytes:
    """Set registers, and call; EAX and EDX go to RESULT, and the run ends."""
    store = bytes.fromhex("66a30020 6689160420")  # mov %eax, RESULT; mov %edx, RESULT + 4
    return registers + bytes((0xE6, PORT)) + store + out(EXIT_PORT, 0)


REGISTERS: Final = bytes.fromhex("66b904030201 66ba14131211 66bb24232221 66be34333231 66bf44434241")
"""ECX, EDX, EBX, ESI, EDI."""


@pytest.mark.row("H-60")
def test_a_hypercall_by_its_port() -> None:
    """The provider gets the vCPU's registers and mode, and the guest its RAX and RDX."""
    with a_machine(hypercall(REGISTERS)) as machine:
        machine.start()
        assert machine.wait() == 0
        [call] = alarm(machine).calls
        assert call[1:6] == (0x21222324, 0x01020304, 0x11121314, 0x31323334, 0x41424344)
        assert (call.cpl, call.long_mode, call.protected_mode, call.r8) == (0, False, False, 0)
        assert machine.memory.read(RESULT, 8) == bytes.fromhex("04030201 15131211")


@pytest.mark.row("H-60")
def test_a_result_without_registers() -> None:
    """They stay as they were."""
    with a_machine(hypercall(bytes.fromhex("66b878563412") + REGISTERS)) as machine:
        alarm(machine).answer = HypercallResult(Status.DEFERRED)
        machine.start()
        assert machine.wait() == 0
        assert machine.memory.read(RESULT, 8) == bytes.fromhex("78563412 14131211")


@pytest.mark.row("H-64")
@pytest.mark.parametrize(
    "answer",
    [
        HypercallResult(Status.NOT_ENABLED),
        HypercallResult(Status.NOT_AVAILABLE),
        HypercallResult(Status.INVALID_INSTRUCTION),
        HypercallResult(Status.ACCESS_DENIED),
    ],
    ids=lambda answer: answer.status.name,
)
def test_a_hypercall_that_is_none(answer: HypercallResult) -> None:
    """The guest gets #UD, whose return address is the instruction."""
    image = on_ud(hypercall(REGISTERS))
    with a_machine(image) as machine:
        alarm(machine).answer = answer
        machine.start()
        assert machine.wait() == UD
        at = machine.memory.read(RESULT, 1)[0] | machine.memory.read(RESULT + 1, 1)[0] << 8
        assert image[at - 0x7C00 :][:2] == bytes((0xE6, PORT))


def on_ud(body: bytes) -> bytes:
    """`body`, and a handler of #UD that leaves the return address at RESULT and exits by UD."""
    handler = bytes.fromhex("58 a30020") + out(EXIT_PORT, UD)  # pop %ax; mov %ax, RESULT
    stack = bytes.fromhex("bc0070")  # mov $0x7000, %sp
    return set_vector(UD, 0x7C00 + 12 + len(stack) + len(body)) + stack + body + handler


@pytest.mark.row("H-62")
def test_a_hypercall_that_continues() -> None:
    """The guest executes the instruction again, until it is done."""
    with a_machine(hypercall(REGISTERS)) as machine:
        provider = alarm(machine)
        provider.answer = HypercallResult(Status.CONTINUING)
        machine.start()
        wait_for(lambda: len(provider.calls) > 5)
        provider.answer = HypercallResult(Status.SUCCESS)
        assert machine.wait() == 0
        assert len(set(provider.calls)) == 1
        assert machine.memory.read(RESULT, 8) == bytes.fromhex("04030201 15131211")


@pytest.mark.row("H-60")
def test_other_accesses_of_that_port() -> None:
    """A wider OUT is no hypercall, an IN reads ones, and no device may have the port."""
    image = bytes((0xE7, PORT)) + bytes((0x66, 0xE7, PORT)) + hypercall(bytes((0x66, 0xE5, PORT)))
    with a_machine(image) as machine:
        with pytest.raises(ConfigError, match="hypercalls"):
            machine.bus.add_ports(PORT, 1, Boots())
        machine.start()
        assert machine.wait() == 0
        assert [call.rax & 2**32 - 1 for call in alarm(machine).calls] == [2**32 - 1]


# The reset that a guest asks for


class Boots:
    """A device that counts resets: the one thing that outlives them."""

    name = "boots"

    def __init__(self, error: Exception | None = None) -> None:
        self.count = 0
        self.error = error

    def read(self, _offset: int, length: int) -> bytes:
        """How often it was reset."""
        return bytes([self.count]) * length

    def write(self, _offset: int, _data: bytes) -> None:
        """Ignore it."""

    def reset(self) -> None:
        """Count it, or fail."""
        self.count += 1
        if self.error is not None:
            raise self.error


def asks_once(reset_twice: bool = False) -> bytes:
    """Asks for a reset, unless there was one: then it exits with the number of resets."""
    ask = write_msr(RESET_MSR, 1) * (1 + reset_twice) + SPIN
    read = bytes((0xE4, BOOTS_PORT)) + bytes.fromhex("84c0 74") + bytes([4])  # in; test %al, %al; jz ask
    return read + bytes((0xE6, EXIT_PORT)) + SPIN + ask


@pytest.mark.row("H-33")
@pytest.mark.parametrize("twice", [False, True])
def test_a_guest_that_asks_for_a_reset(twice: bool) -> None:
    """It boots anew, once, and wait() returns what it exits with after that; no thread is left."""
    before = held()
    with a_machine(asks_once(twice)) as machine:
        machine.bus.add_ports(BOOTS_PORT, 1, Boots())
        states: list[RunState] = []
        machine.run_state.add_handler(lambda _, now: states.append(now))
        machine.start()
        assert machine.wait() == 1
        assert states == [RunState.RUNNING, RunState.SHUTDOWN]
        assert [each for each in alarm(machine).told if each == ("reset",)] == [("reset",)]
    wait_for(lambda: held() == before)


@pytest.mark.row("H-33")
def test_a_reset_that_fails() -> None:
    """wait() raises the error, and the machine can be reset."""
    with a_machine(asks_once()) as machine:
        machine.bus.add_ports(BOOTS_PORT, 1, boots := Boots(ZeroDivisionError("broken")))
        machine.start()
        with pytest.raises(ZeroDivisionError, match="broken"):
            machine.wait()
        assert machine.run_state.current is RunState.INTERNAL_ERROR
        boots.error = None
        machine.reset()
        machine.start()
        assert machine.wait() == boots.count == 2


@pytest.mark.row("H-33")
def test_a_reset_for_which_there_is_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the run, and wait() says so."""
    with a_machine(asks_once()) as machine:
        machine.bus.add_ports(BOOTS_PORT, 1, Boots())
        start = threading.Thread.start

        def refuse(thread: threading.Thread) -> None:
            if thread.name == "pvclock-reset":
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", refuse)
        machine.start()
        with pytest.raises(StateError, match="cannot start a thread"):
            machine.wait()


@pytest.mark.row("H-33")
def test_a_reset_of_a_paused_machine_waits() -> None:
    """Asked for just before a pause, it comes when the machine goes on."""
    with a_machine(SPIN) as machine:
        machine.bus.add_ports(BOOTS_PORT, 1, boots := Boots())
        machine.start()
        machine.pause()
        alarm(machine).write_msr(0, RESET_MSR, 1)
        wait_for(lambda: not [each for each in threading.enumerate() if each.name == "pvclock-reset"])
        assert (boots.count, machine.run_state.current) == (0, RunState.PAUSED)
        machine.resume()
        wait_for(lambda: boots.count == 1)
        wait_for(machine.runner.gate.has_begun)
        machine.stop()


@pytest.mark.row("H-33")
def test_a_guest_that_ends_as_it_asks() -> None:
    """It is not reset after its end, and not by what it asked before a reset of the VMM's."""
    with a_machine(SPIN) as machine:
        machine.bus.add_ports(BOOTS_PORT, 1, boots := Boots())
        machine.start()
        machine.stop()
        alarm(machine).write_msr(0, RESET_MSR, 1)
        wait_for(lambda: not [each for each in threading.enumerate() if each.name == "pvclock-reset"])
        assert (boots.count, machine.run_state.current) == (0, RunState.SHUTDOWN)
        machine.reset()
        machine.start()
        wait_for(lambda: not [each for each in threading.enumerate() if each.name == "pvclock-reset"])
        assert boots.count == 1
