"""vCPUs that come while a machine runs, and run(): late vCPUs have the time that the others have."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import pytest

from pvclock import ConfigError, HostTsc, Machine, StateError
from pvclock._core import TSC_STABLE_BIT
from pvclock.guest_layout import ACPI_TABLES
from pvclock.host.execution_time import ExecutionTimeBackend
from pvclock.kvm.tsc_offset import TscOffsets
from pvclock.machine import RunState
from pvclock.machine.devices import EXIT_PORT
from pvclock.machine.devices.vcpu_register import VCPU_REGISTER_GSI, VCPU_REGISTER_PORT
from tests.kvm.tsc_guest import TO_X2APIC, TSC, TSC_ADJUST, Step, TscGuest, sipi_steps, tsc_guest
from tests.waiting import HANG_S, wait_until

pytestmark = [pytest.mark.kvm, pytest.mark.row("E5")]

Clock = Literal["engine", "kernel"]
both = pytest.mark.parametrize("clock", ["engine", "kernel"])

MOVED: Final = 1 << 44
"""Ticks, more than an hour: what a guest moves its TSC by, and no run takes as long."""
RDTSC, READ_ADJUST = Step("rdtsc"), Step("rdmsr", TSC_ADJUST)
SYSTEM_TIME: Final = 0x4B564D01
PAGE: Final = 0x6000
PAGE_BYTES: Final = 32
SPIN: Final = b"\xeb\xfe"
COUNTS: Final = b"\x66\xff\x06\x00\x20\xeb\xf9"  # 1: incl 0x2000; jmp 1b
EXIT_5: Final = bytes([0xB0, 5, 0xE6, EXIT_PORT])  # mov $5, %al; out %al, $EXIT_PORT
MP_STATE_UNINITIALIZED: Final = 1
IOAPIC_IRR: Final = slice(24, 28)
"""In struct kvm_irqchip: which inputs are high."""
MADT_ENTRY_ENABLED: Final = b"\x00\x08\x02\x02\x01\x00\x00\x00\x01\x0c"
"""The last local APIC, of vCPU 2, in a MADT, and the IOAPIC's beginning behind it."""


def wait(mark: int) -> Step:
    """Until the host lets the guest pass."""
    return Step("wait", value=mark)


def register_page(vcpu: int) -> Step:
    """vCPU's clock page, behind the one before."""
    return Step("wrmsr", SYSTEM_TIME, PAGE + vcpu * PAGE_BYTES | 1)


BEGIN: Final = [register_page(0), TO_X2APIC, wait(1), *sipi_steps(1)]
FIRST: Final = [*BEGIN, wait(2), RDTSC, wait(3), wait(4), RDTSC, READ_ADJUST]
LATE: Final = [register_page(1), wait(2), wait(3), RDTSC, READ_ADJUST, wait(4)]
"""vCPU 0 reads its TSC before and after vCPU 1 does, as the marks have it."""


def let_both_read(guest: TscGuest) -> tuple[list[int], list[int]]:
    """What the two vCPUs find, from mark 1 on, at which vCPU 1 was added."""
    for mark in (1, 2, 3, 4):
        guest.let_pass(mark)
        guest.wait_until_all_reach(mark + 1 if mark < 4 else 255)
    return guest.results(0), guest.results(1)


def wait_until_first_reaches(guest: TscGuest, mark: int) -> None:
    """Return once vCPU 0, the only one yet, waits at `mark`."""
    TscGuest(guest.machine, guest.steps[:1]).wait_until_all_reach(mark)


@both
def test_a_late_vcpu_reads_the_same_tsc(clock: Clock, tsc_offsets: TscOffsets) -> None:
    """Started by INIT and SIPI it reads a TSC between two of vCPU 0's, and has the same offset on a host with such."""
    with tsc_guest(clock, FIRST, LATE, present=1) as guest:
        wait_until_first_reaches(guest, 1)
        assert guest.machine.add_vcpu() == 1
        (before, after, adjust), (late, late_adjust) = let_both_read(guest)
        assert before <= late <= after
        assert (late_adjust, adjust) == (0, 0)
        guest.machine.pause()
        if tsc_offsets is TscOffsets.HONOURED:
            assert len({vcpu.get_tsc_offset() for vcpu in guest.machine.vcpus}) == 1


@both
@pytest.mark.parametrize("msr", [TSC, TSC_ADJUST], ids=["TSC", "TSC_ADJUST"])
def test_a_late_vcpu_follows_what_the_guest_wrote(clock: Clock, msr: int) -> None:
    """vCPU 0's guest has moved its TSC by an hour: a late one is where that is, though KVM puts it elsewhere."""
    moved = [register_page(0), Step("wrmsr", msr, MOVED), *FIRST[1:]]
    with tsc_guest(clock, moved, LATE, present=1) as guest:
        wait_until_first_reaches(guest, 1)
        guest.machine.add_vcpu()
        (before, after, adjust), (late, late_adjust) = let_both_read(guest)
        assert before <= late <= after
        assert late_adjust == adjust


def test_a_late_vcpu_is_part_of_the_one_publish() -> None:
    """Its page has vCPU 0's line from its registration on, and at each later operation, dilated and paused between."""
    with tsc_guest("engine", FIRST, LATE, present=1) as guest:
        machine, clock = guest.machine, guest.machine.clock
        assert clock is not None
        wait_until_first_reaches(guest, 1)
        clock.dilate(1, 7)
        machine.pause()
        machine.add_vcpu()
        assert machine.run_state.current is RunState.PAUSED
        machine.resume("advance")
        (before, after, _), (late, _) = let_both_read(guest)
        assert before <= late <= after
        operations: list[Callable[[], object]] = [clock.refresh, partial(clock.dilate, 2), machine.pause]
        operations.append(partial(machine.resume, "freeze"))
        for operation in operations:
            operation()
            first, second = clock.page(0), clock.page(1)
            assert first is not None
            assert second is not None
            assert first[1:5] == second[1:5]
            assert (first.flags ^ second.flags) & TSC_STABLE_BIT == 0
            now = HostTsc(clock.backend.counter.read())
            assert clock.guest_tsc(0, now) == clock.guest_tsc(1, now)


def test_one_that_is_not_there_leaves_stable_alone(stable_bit: int) -> None:
    """A guest with one vCPU of two moves its TSC, and its page says STABLE as before: nobody is out of step with it."""
    with tsc_guest("engine", [register_page(0), Step("wrmsr", TSC, MOVED)], [], present=1) as guest:
        wait_until_first_reaches(guest, 255)
        clock = guest.machine.clock
        assert clock is not None
        clock.refresh()
        page = clock.page(0)
        assert page is not None
        assert page.flags == stable_bit


def test_a_late_vcpu_has_its_own_numbers() -> None:
    """Its Hyper-V VP index is its number, as its APIC id is."""
    vp_index, x2apic_id = Step("rdmsr", 0x40000002), Step("rdmsr", 0x802)
    first = [TO_X2APIC, wait(1), *sipi_steps(1)]
    late = [vp_index, Step("wrmsr", 0x1B, 0xFEE00C00), x2apic_id]
    with tsc_guest("engine", first, late, present=1, provider="HyperV") as guest:
        guest.machine.add_vcpu()
        guest.let_pass(1)
        guest.wait_until_all_reach(255)
        assert guest.results(1) == [1, 1]


def test_before_the_first_start() -> None:
    """One that is added then runs from start() on, waiting for its SIPI."""
    with Machine(SPIN, vcpus=1, max_vcpus=3) as machine:
        assert [machine.add_vcpu(), machine.add_vcpu()] == [1, 2]
        assert machine.run_state.current is RunState.PRELAUNCH
        machine.start()
        assert machine.runner.gate.threads() == len(machine.vcpus) == machine.max_vcpus == 3
        assert machine.clock is not None
        assert machine.clock.vcpus_present == 3


@both
def test_a_reset_keeps_it(clock: Clock) -> None:
    """It is there in the booted guest, as after power-on: it waits, and is started by INIT and SIPI once more."""
    program = [TO_X2APIC, wait(1), *sipi_steps(1)]
    with tsc_guest(clock, program, [RDTSC], present=1) as guest:
        machine = guest.machine
        machine.add_vcpu()
        guest.let_pass(1)
        guest.wait_until_all_reach(255)
        assert machine.vcpus[1].vcpu_id == 1
        machine.reset()
        assert machine.runner.gate.threads() == 2
        machine.pause()
        assert machine.vcpus[1].get_mp_state() == MP_STATE_UNINITIALIZED
        assert machine.clock is None or machine.clock.tsc(1).offset == machine.clock.tsc(0).offset


def test_saved_and_restored_with_it() -> None:
    """The state goes into a machine of as many at most; its `vcpus` says how many are there, and more can come."""
    with Machine(SPIN, vcpus=1, max_vcpus=3) as machine:
        machine.start()
        machine.add_vcpu()
        machine.pause()
        state = machine.save()
        machine.add_vcpu()
        machine.roll_back(state)
        assert machine.clock is not None
        assert machine.clock.vcpus_present == 3
    with pytest.raises(ConfigError, match="give max_vcpus=3"):
        Machine(SPIN, vcpus=2, max_vcpus=4, restore=state)
    with pytest.raises(ConfigError, match="give vcpus=3"):
        Machine(SPIN, vcpus=2, restore=state)
    with Machine(SPIN, vcpus=2, max_vcpus=3, restore=state) as machine:
        machine.start()
        assert machine.add_vcpu() == 2
        assert machine.clock is not None
        assert len({machine.clock.tsc(vcpu).offset for vcpu in range(3)}) == 1


@pytest.mark.usefixtures("offsets_are_honoured")
def test_on_a_clock_of_execution_time() -> None:
    """There, too, the late vCPU's TSC is between two of the first one's."""
    with tsc_guest("engine", FIRST, LATE, present=1, backend=ExecutionTimeBackend) as guest:
        wait_until_first_reaches(guest, 1)
        guest.machine.add_vcpu()
        (before, after, _), (late, _) = let_both_read(guest)
        assert before <= late <= after


@both
def test_no_more_than_declared(clock: Clock) -> None:
    """A StateError, and the machine runs on; by default there can be no others."""
    with Machine(SPIN, clock=clock) as machine:
        machine.start()
        with pytest.raises(StateError, match="larger max_vcpus"):
            machine.add_vcpu()
        assert machine.run_state.current is RunState.RUNNING
    with pytest.raises(StateError, match="closed"):
        machine.add_vcpu()


@pytest.mark.parametrize(
    ("vcpus", "max_vcpus", "platform"), [(2, 1, "bare"), (1, 0, "bare"), (1, 1 << 20, "bare"), (1, 256, "pc")]
)
def test_how_many_can_be_declared(vcpus: int, max_vcpus: int, platform: Literal["bare", "pc"]) -> None:
    """Not fewer than there are, not more than KVM takes; on a PC as many as have an APIC id of 8 bits."""
    with pytest.raises(ConfigError, match=r"max_vcpus is|vCPUs; choose"):
        Machine(SPIN, vcpus=vcpus, max_vcpus=max_vcpus, platform=platform)


def test_not_on_a_vcpus_own_thread() -> None:
    """That one cannot wait for the others; its run ends by the StateError."""
    machines: list[Machine] = []

    def add(_vcpu: int, _reason: object) -> None:
        machines[0].add_vcpu()

    with Machine(b"\xe6\x10" + SPIN, max_vcpus=2, on_exit=add) as machine:  # out %al, $0x10
        machines.append(machine)
        machine.start()
        with pytest.raises(StateError, match="the thread of a vCPU"):
            machine.wait(HANG_S)
        machines.clear()


def test_many_are_added_while_the_others_are_paused_and_go_on() -> None:
    """All at once from several threads: each gets a number of its own, and the last quiesce counts them all."""
    most = 8
    with Machine(SPIN, max_vcpus=most) as machine:
        machine.start()
        with ThreadPoolExecutor(max_workers=4) as pool:
            others = [pool.submit(machine.add_vcpu) for _ in range(most - 1)]
            for _ in range(20):
                machine.pause()
                machine.resume("freeze")
        assert sorted(other.result() for other in others) == list(range(1, most))
        assert machine.runner.gate.threads() == most
        assert len({machine.runner.thread_id(vcpu) for vcpu in range(most)}) == most
        machine.stop()
        assert machine.runner.gate.threads() == 0
        machine.start()
        assert machine.runner.gate.threads() == most


def test_the_guides_example() -> None:
    """It adds three."""
    guide = (Path(__file__).parents[2] / "docs/embedding.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n([^`]*def add_three[^`]*)```", guide)
    names: dict[str, Any] = {}
    exec(block, names)  # noqa: S102 - our own document
    assert names["add_three"]() == [1, 2, 3]


# What a PC's guest is told


@pytest.mark.row("E22")
def test_a_pcs_guest_reads_how_many_there_are() -> None:
    """The vCPU register counts, its interrupt waits until the guest knows of all, and a reset tells all by tables."""
    with Machine(SPIN, max_vcpus=3, platform="pc") as machine:
        assert machine.bus.read_port(VCPU_REGISTER_PORT, 2) == b"\1\0"
        assert not is_raised(machine)
        machine.add_vcpu()
        machine.add_vcpu()
        assert machine.bus.read_port(VCPU_REGISTER_PORT, 2) == b"\3\0"
        assert is_raised(machine)
        machine.bus.write_port(VCPU_REGISTER_PORT, 2, b"\2\0")
        assert is_raised(machine)
        machine.bus.write_port(VCPU_REGISTER_PORT, 1, b"\3")  # no whole register
        assert is_raised(machine)
        machine.bus.write_port(VCPU_REGISTER_PORT, 2, b"\3\0")
        assert not is_raised(machine)
        machine.bus.write_port(VCPU_REGISTER_PORT, 2, b"\0\0")
        assert is_raised(machine)
        machine.reset()
        assert not is_raised(machine)
        assert machine.memory.read(ACPI_TABLES, 0x1000).count(MADT_ENTRY_ENABLED) == 1


@pytest.mark.row("E22")
def test_a_pc_that_gets_no_others_has_no_register() -> None:
    """Its tables have no processors that may come; the one event device is the power button's."""
    with Machine(SPIN, platform="pc") as machine:
        assert machine.bus.read_port(VCPU_REGISTER_PORT, 2) == b"\xff\xff"
        tables = machine.memory.read(ACPI_TABLES, 0x1000)
        assert (tables.count(b"ACPI0007"), tables.count(b"ACPI0013")) == (0, 1)


def is_raised(machine: Machine) -> bool:
    """Is the vCPU register's input of the IOAPIC high?"""
    ioapic = machine.vm.get_irqchip(2)
    return bool(int.from_bytes(ioapic[IOAPIC_IRR], "little") >> VCPU_REGISTER_GSI & 1)


# A run from start to end


@pytest.mark.row("E22")
def test_run_is_start_and_wait() -> None:
    """The exit code, once the guest has written it."""
    with Machine(EXIT_5) as machine:
        assert machine.run() == 5
        machine.reset()
        assert machine.run(HANG_S) == 5


@pytest.mark.row("E22")
def test_a_run_that_takes_too_long_is_stopped() -> None:
    """StateError; then no vCPU executes, and run() lets the guest go on, who may not get a CPU in a run that short."""
    with Machine(COUNTS) as machine:

        def goes_on() -> bool:
            before = machine.memory.read(0x2000, 8)
            with pytest.raises(StateError, match="has not ended"):
                machine.run(0.05)
            assert machine.run_state.current is RunState.SHUTDOWN
            assert machine.runner.gate.threads() == 0
            return machine.memory.read(0x2000, 8) != before

        for _ in range(2):
            wait_until(goes_on)


@pytest.mark.row("E22")
@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupted_run_is_stopped() -> None:
    """KeyboardInterrupt comes out of run(), and nothing executes any more."""

    def interrupt(_vcpu: int, _reason: object) -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    with Machine(b"\xe6\x10" + SPIN, on_exit=interrupt) as machine:  # out %al, $0x10
        with pytest.raises(KeyboardInterrupt):
            machine.run(HANG_S)
        assert machine.runner.gate.threads() == 0
        assert machine.run_state.current is RunState.SHUTDOWN


@pytest.mark.row("E22")
def test_a_run_that_goes_on_already() -> None:
    """run() is the StateError that start() is, and lets it go on."""
    with Machine(SPIN) as machine:
        machine.start()
        with pytest.raises(StateError, match="run already"):
            machine.run()
        assert machine.run_state.current is RunState.RUNNING
