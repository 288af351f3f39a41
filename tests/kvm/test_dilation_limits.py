"""A machine's clock is dilated within what its guest's timers can follow: real vCPUs, by their LAPICs' registers."""

from __future__ import annotations

from fractions import Fraction
from typing import Final

import pytest

from pvclock import GuestClock, RangeError
from pvclock.machine import EXIT_PORT, Machine
from pvclock.machine.cpuid import TSC_DEADLINE, CpuidEntry
from pvclock.machine.dilation_limits import SHOWN_KHZ_MAX
from tests.kvm.guests import HLT, out
from tests.waiting import HANG_S

pytestmark = [pytest.mark.kvm, pytest.mark.row("E12")]

MEMORY_BYTES: Final = 16 << 20
DEADLINE_MODE: Final = (1 << 18 | 0xEC).to_bytes(4, "little")
LVT_TIMER: Final = 0x320


def a_pc(**options: object) -> Machine:
    """One with two vCPUs."""
    return Machine(HLT, vcpus=2, platform="pc", memory_bytes=MEMORY_BYTES, **options)  # type: ignore[arg-type]


def clock_of(machine: Machine) -> GuestClock:
    """The engine's."""
    assert machine.clock is not None
    return machine.clock


def use_deadlines(machine: Machine, vcpu: int) -> None:
    """Set that vCPU's LAPIC timer to TSC-deadline mode, as its guest does when it has booted so far."""
    lapic = machine.vcpus[vcpu].get_lapic()
    machine.vcpus[vcpu].set_lapic(lapic[:LVT_TIMER] + DEADLINE_MODE + lapic[LVT_TIMER + 4 :])


def without_deadlines(_vcpu: int, entries: list[CpuidEntry]) -> list[CpuidEntry]:
    """The same CPUID, and no such timer."""
    return [{**each, "ecx": each["ecx"] & ~TSC_DEADLINE} if each["function"] == 1 else each for each in entries]


def test_a_pc_is_not_booted_too_slow() -> None:
    """Its clock may show a TSC of 34.36 GHz, and no more unless forced."""
    with a_pc() as machine:
        clock = clock_of(machine)
        slowest = Fraction(clock.tsc_hz, 1000 * SHOWN_KHZ_MAX)
        clock.dilate(*(slowest * Fraction(1001, 1000)).as_integer_ratio())
        with pytest.raises(RangeError, match="yet to boot"):
            clock.dilate(*(slowest * Fraction(999, 1000)).as_integer_ratio())
        clock.dilate(*(slowest * Fraction(999, 1000)).as_integer_ratio(), force=True)


@pytest.mark.parametrize("vcpu", [0, 1])
def test_a_guest_that_sets_deadlines_is_not_made_faster_than_it_booted(vcpu: int) -> None:
    """Once any vCPU does: slower than at the boot, as slow as it likes, and back, but faster only by force."""
    with a_pc() as machine:
        clock = clock_of(machine)
        clock.dilate(1, 2)
        use_deadlines(machine, vcpu)
        for slower in (100, 4, 2):
            clock.dilate(1, slower)
        with pytest.raises(RangeError, match=r"dilation 1 of a guest that booted at 0\.5: .* 2 times as long"):
            clock.dilate(1)
        clock.dilate(1, force=True)
        clock.dilate(1, 2)
        with pytest.raises(RangeError, match=r"booted at 0\.5"):
            clock.dilate(2, 3)
        assert clock.dilation == Fraction(1, 2)


def test_a_guest_that_boots_again_learns_the_rate_of_then() -> None:
    """After a reset its timers are to be set anew, by a clock at the rate that it has meanwhile, which is the limit."""
    with a_pc() as machine:
        clock = clock_of(machine)
        use_deadlines(machine, 0)
        clock.dilate(1, 4)
        machine.reset()
        use_deadlines(machine, 0)
        with pytest.raises(RangeError, match=r"booted at 0\.25"):
            clock.dilate(1, 3)


def test_the_limit_stays_with_a_machine_that_is_rolled_back() -> None:
    """Its vCPUs go on with the timers of their boot, by another clock."""
    with a_pc() as machine:
        clock_of(machine).dilate(1, 4)
        use_deadlines(machine, 0)
        machine.start()
        machine.pause()
        machine.roll_back(machine.save())
        with pytest.raises(RangeError, match=r"booted at 0\.25"):
            clock_of(machine).dilate(1, 3)


@pytest.mark.parametrize(
    "options",
    [{"cpuid": without_deadlines}, {"provider": "None"}, {"provider": "Minimal"}],
    ids=["no deadlines", "no interface", "no page"],
)
def test_what_has_no_such_timer_or_no_page_to_set_it_by_has_no_limit(options: dict[str, object]) -> None:
    """It is of guests that learn their TSC's frequency from a dilated page, and set deadlines by that."""
    with a_pc(**options) as machine:
        clock_of(machine).dilate(1, 1000)
        assert clock_of(machine).dilation == Fraction(1, 1000)


def test_a_bare_machine_has_no_limit() -> None:
    """What runs on it is a payload of the caller's, which no kernel's timers need."""
    with Machine(out(EXIT_PORT, 0)) as machine:
        clock_of(machine).dilate(1, 1000)
        machine.start()
        assert machine.wait(HANG_S) == 0
