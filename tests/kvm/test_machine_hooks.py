"""What a caller changes and sees of a machine: its guest's CPUID, and each exit."""

from __future__ import annotations

from typing import Final

import pytest

from pvclock.errors import WrongType
from pvclock.kvm.exits import Exit, IoIn, IoOut, WrmsrExit
from pvclock.machine import EXIT_PORT, Machine
from pvclock.machine.cpuid import CpuidEntry
from tests.kvm.guests import HLT, out, write_msr
from tests.waiting import HANG_S

pytestmark = [pytest.mark.kvm, pytest.mark.row("E22")]

LEAF: Final = 0x4000_0800
"""A hypervisor's, which no provider has."""
CPUID: Final = (
    b"\x66\xb8" + LEAF.to_bytes(4, "little") + bytes.fromhex("0fa2 88d8")
)  # mov $LEAF, %eax; cpuid; mov %bl, %al


def with_leaf(vcpu: int, entries: list[CpuidEntry]) -> list[CpuidEntry]:
    """The same and one more."""
    return [*entries, {"function": LEAF, "index": 0, "flags": 0, "eax": 0, "ebx": 40 + vcpu, "ecx": 0, "edx": 0}]


@pytest.mark.parametrize("clock", ["engine", "kernel"])
def test_a_leaf_of_the_callers_own(clock: str) -> None:
    """The guest reads it; each vCPU may have another one, and all others are as they are without."""
    seen: dict[int, list[CpuidEntry]] = {}

    def change(vcpu: int, entries: list[CpuidEntry]) -> list[CpuidEntry]:
        seen[vcpu] = entries
        return with_leaf(vcpu, entries)

    with Machine(CPUID + bytes([0xE6, EXIT_PORT]), vcpus=2, clock=clock, cpuid=change) as machine:  # type: ignore[arg-type]
        machine.start()
        assert machine.wait(HANG_S) == 40
    assert sorted(seen) == [0, 1]
    assert {0x40000000, 0x40000001, 1} <= {entry["function"] for entry in seen[1]}
    assert {entry["ebx"] >> 24 for entry in seen[1] if entry["function"] == 1} == {1}


def test_every_exit_is_seen_before_it_is_answered() -> None:
    """In the guest's order, those that end the run, too; they are answered as without."""
    exits: list[tuple[int, Exit]] = []
    codes: list[int | None] = []

    def observe(vcpu: int, reason: Exit) -> None:
        exits.append((vcpu, reason))
        codes.append(machine.exit_code)

    image = out(0x80, 1) + bytes.fromhex("e480") + write_msr(0x12, 0x1001) + out(EXIT_PORT, 7)
    with Machine(image, on_exit=observe) as machine:
        machine.start()
        assert machine.wait(HANG_S) == 7
        assert machine.clock is not None
        assert machine.clock.page(0) is not None
    assert [vcpu for vcpu, _ in exits] == [0] * 4
    assert exits[0][1] == IoOut(0x80, 1, b"\x01")
    assert exits[1][1] == IoIn(0x80, 1, 1)
    assert isinstance(exits[2][1], WrmsrExit)
    assert (exits[2][1].msr, exits[2][1].value) == (0x12, 0x1001)
    assert exits[3][1] == IoOut(EXIT_PORT, 1, b"\x07")
    assert codes == [None] * 4


def test_an_observer_that_fails_ends_the_run() -> None:
    """Its error comes out of wait()."""

    def fail(_vcpu: int, _reason: Exit) -> None:
        raise ZeroDivisionError

    with Machine(out(0x80, 1) + HLT, on_exit=fail) as machine:
        machine.start()
        with pytest.raises(ZeroDivisionError):
            machine.wait(HANG_S)


@pytest.mark.parametrize("name", ["cpuid", "on_exit", "serial_output"])
def test_what_is_no_function(name: str) -> None:
    """It is refused by its name, before anything is made."""
    with pytest.raises(WrongType, match=rf"^{name} is 'text', a str; it can be a function of "):
        Machine(HLT, **{name: "text"})  # type: ignore[arg-type]
