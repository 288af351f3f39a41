"""A guest's WRMSRs that are served within Vcpu.run(), and usual TSC writes by a machine's clock among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import pytest

from pvclock import Machine
from pvclock.errors import WrongType
from pvclock.kvm import Runner, exit_on_msrs
from pvclock.kvm.exits import Exit, IoOut, WrmsrExit
from pvclock.machine import EXIT_PORT
from pvclock.msr_ranges import MsrRange
from tests.kvm.guests import Bare, bare_vm, out, write_msr
from tests.kvm.test_runner import eventually, moves_on
from tests.waiting import HANG_S

pytestmark = [pytest.mark.kvm, pytest.mark.row("E9")]

LIMIT_S: Final = float(HANG_S)
TSC_ADJUST: Final = 0x3B
SYSTEM_TIME: Final = 0x4B564D01
COUNT_ON: Final = bytes.fromhex("66ff07")  # incl (%bx)
FLOOD: Final = write_msr(TSC_ADJUST, 5) + COUNT_ON
WRITE_AND_COUNT: Final = FLOOD + b"\xeb" + (256 - len(FLOOD) - 2).to_bytes(1, "little")  # and again
MANY: Final = 200
WRITE_MANY: Final = bytes.fromhex("66be") + MANY.to_bytes(4, "little")  # mov $MANY, %esi
ONE_OF_MANY: Final = (
    bytes.fromhex("66b9") + TSC_ADJUST.to_bytes(4, "little") + bytes.fromhex("6631d2 6689f0 0f30 664e")
)  # mov $0x3b, %ecx; xor %edx, %edx; mov %esi, %eax; wrmsr; dec %esi
WRITES: Final = WRITE_MANY + ONE_OF_MANY + b"\x75" + (256 - len(ONE_OF_MANY) - 2).to_bytes(1, "little")  # jnz

Served = list[tuple[int, int, int]]


@contextmanager
def flooding(
    handler: Callable[[int, Exit], bool], *, vcpus: int = 1, sees_every_exit: bool = False
) -> Iterator[tuple[Bare, Runner]]:
    """vCPUs that write IA32_TSC_ADJUST for ever and count how often, not started yet."""
    with bare_vm(WRITE_AND_COUNT, vcpus=vcpus) as bare:
        exit_on_msrs(bare.vm, (MsrRange(TSC_ADJUST, 1),))
        runner = Runner(bare.vcpus, handler, sees_every_exit=sees_every_exit)
        try:
            yield bare, runner
        finally:
            runner.stop()


def never(vcpu: int, reason: Exit) -> bool:
    """Handle no exit at all."""
    raise AssertionError((vcpu, reason))


@pytest.mark.parametrize("vcpus", [1, 2])
def test_served_writes_do_not_reach_the_handler(vcpus: int) -> None:
    """The guest goes on after each, on every vCPU; the server is told whose it is, the MSR and the value."""
    served: set[tuple[int, int, int]] = set()

    def serve(vcpu: int, index: int, value: int) -> bool:
        served.add((vcpu, index, value))
        return True

    with flooding(never, vcpus=vcpus) as (bare, runner):
        runner.serve_writes(serve)
        with runner:
            moves_on(bare)
            moves_on(bare)
    assert served == {(vcpu, TSC_ADJUST, 5) for vcpu in range(vcpus)}


def test_a_write_that_is_not_served_is_an_exit() -> None:
    """With all that it says, and the handler answers it."""
    exits: list[Exit] = []

    def handle(vcpu: int, reason: Exit) -> bool:
        exits.append(reason)
        bare.vcpus[vcpu].complete_msr()
        return len(exits) < 3

    with flooding(handle) as (bare, runner):
        runner.serve_writes(lambda _vcpu, _index, _value: False)
        with runner:
            assert runner.join(LIMIT_S)
    assert [type(each) for each in exits] == [WrmsrExit] * 3
    assert isinstance(exits[0], WrmsrExit)
    assert (exits[0].msr, exits[0].value) == (TSC_ADJUST, 5)


def test_a_flood_of_served_writes_can_be_paused_and_ended() -> None:
    """A guest that does nothing else is out of the guest after pause(), as any other, and the run ends."""
    with flooding(never, vcpus=2) as (bare, runner):
        runner.serve_writes(lambda _vcpu, _index, _value: True)
        with runner:
            for _ in range(20):
                moves_on(bare)
                runner.pause()
                counts = [bare.count(vcpu) for vcpu in range(2)]
                with runner.quiesce():
                    assert [bare.count(vcpu) for vcpu in range(2)] == counts
                runner.resume()


def test_what_the_server_raises_ends_the_run() -> None:
    """As an error of the handler's."""

    def serve(_vcpu: int, _index: int, _value: int) -> bool:
        raise ZeroDivisionError

    with flooding(never) as (_, runner):
        runner.serve_writes(serve)
        with pytest.raises(ZeroDivisionError), runner:
            runner.join(LIMIT_S)


def test_a_handler_that_sees_every_exit() -> None:
    """It gets those, too, that would be served without it."""
    seen: list[Exit] = []

    def handle(_vcpu: int, reason: Exit) -> bool:
        seen.append(reason)
        return len(seen) < 2

    with flooding(handle, sees_every_exit=True) as (_, runner):
        runner.serve_writes(lambda _vcpu, _index, _value: True)
        with runner:
            assert runner.join(LIMIT_S)
    assert [type(each) for each in seen] == [WrmsrExit] * 2


def test_another_server_takes_over_while_vcpus_run() -> None:
    """From the next write on, and so does None at a vCPU: its writes are exits again."""
    exits: list[Exit] = []
    served: Served = []

    def handle(_vcpu: int, reason: Exit) -> bool:
        exits.append(reason)
        return False

    def serve(vcpu: int, index: int, value: int) -> bool:
        served.append((vcpu, index, value))
        return True

    with flooding(handle) as (bare, runner):
        runner.serve_writes(lambda _vcpu, _index, _value: True)
        with runner:
            moves_on(bare)
            runner.serve_writes(serve)
            eventually(lambda: served)
            assert not exits
            bare.vcpus[0].serve_writes(None)
            assert runner.join(LIMIT_S)
    assert len(exits) == 1


@pytest.mark.parametrize("given", ["text", 1])
def test_what_is_no_function(given: object) -> None:
    """It is refused by its name; what was there stays."""
    with flooding(never) as (bare, runner):
        for serve_writes in (runner.serve_writes, bare.vcpus[0].serve_writes):
            with pytest.raises(WrongType, match=r"^serve is "):
                serve_writes(given)  # type: ignore[arg-type]


# A machine's clock


@pytest.mark.row("J-03", "J-05")
@pytest.mark.usefixtures("offsets_are_honoured", "tsc_is_trusted")
def test_a_machines_clock_serves_usual_writes() -> None:
    """TSC, ADJUST and the page are what the last of them left, and one that Python serves goes on from there."""
    served: list[bool] = []
    with Machine(write_msr(SYSTEM_TIME, 0x2001) + WRITES + out(EXIT_PORT, 0), tick_interval_s=None) as machine:
        clock = machine.clock
        assert clock is not None

        def serve(vcpu: int, index: int, value: int) -> bool:
            if index == TSC_ADJUST:
                served.append(clock.serve_tsc_write(vcpu, index, value))
            return index == TSC_ADJUST and served[-1]

        begin = machine.vcpus[0].get_tsc_offset()
        machine.runner.serve_writes(serve)
        assert machine.run(LIMIT_S) == 0
        assert served == [True] * MANY
        tsc, page = clock.tsc(0), clock.page(0)
        assert (tsc.adjust, tsc.offset) == (1, (begin + 1) % 2**64)
        assert machine.vcpus[0].get_tsc_offset() == tsc.offset
        assert page is not None
        before = page.tsc_timestamp
        clock.write_msr(0, TSC_ADJUST, 1 << 40)
        moved = clock.page(0)
        assert moved is not None
        assert moved.tsc_timestamp - before == (1 << 40) - 1


@pytest.mark.row("J-03", "P-03")
@pytest.mark.usefixtures("offsets_are_honoured", "tsc_is_trusted")
def test_a_machine_that_was_rolled_back_serves_them_by_its_new_clock() -> None:
    """The old one's is asked no more."""
    with Machine(WRITES + out(EXIT_PORT, 0) + WRITES + out(EXIT_PORT, 0)) as machine:
        assert machine.run(LIMIT_S) == 0
        machine.pause()
        machine.roll_back(machine.save())
        clock = machine.clock
        assert clock is not None
        machine.resume()
        assert machine.run(LIMIT_S) == 0
        assert clock.tsc(0).adjust == 1
        assert clock.tsc(0).offset == machine.vcpus[0].get_tsc_offset()


@pytest.mark.row("J-03")
def test_an_observer_sees_every_write() -> None:
    """on_exit: is called with each exit, so none is served before."""
    seen: list[int] = []

    def observe(_vcpu: int, reason: Exit) -> None:
        seen.append(reason.value if isinstance(reason, WrmsrExit) else -1)
        assert isinstance(reason, (WrmsrExit, IoOut))

    with Machine(WRITES + out(EXIT_PORT, 0), on_exit=observe) as machine:
        assert machine.run(LIMIT_S) == 0
    assert seen == [*range(MANY, 0, -1), -1]
