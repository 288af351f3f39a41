"""A real-mode guest that sleeps by its LAPIC's timer, again and again, and notes when it wakes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from pvclock import Machine
from pvclock.boot import EntryState, enter
from tests.kvm.guests import write_msr
from tests.waiting import HANG_S, wait_until

__all__ = ["HALTED_FOR_GOOD", "SleepingGuest", "sleeping_guest"]

HALTED_FOR_GOOD: Final = bytes.fromhex("faf4ebfc")
"""cli; 1: hlt; jmp 1b"""

CODE: Final = 0x8000
HANDLER: Final = 0x9000
HANDLER_CODE: Final = range(HANDLER, 0xA000)
VECTOR: Final = 0x40
STACK: Final = 0x7000

SLEEP_TICKS: Final = 0x2000
DEADLINE: Final = 0x2008
WOKE_FOR: Final = 0x2010
WOKE_AT: Final = 0x2018
WAKES: Final = 0x2020

APIC_BASE, APIC_BASE_X2APIC = 0x1B, 0xFEE00D00
X2APIC_EOI, X2APIC_SPURIOUS, X2APIC_LVT_TIMER = 0x80B, 0x80F, 0x832
TSC_DEADLINE, TSC_DEADLINE_MODE = 0x6E0, 1 << 18


class Wake(NamedTuple):
    """The last one so far: when it was to be and when it was, in the guest's own ticks; and the how many-th it was."""

    due: int
    woke: int
    number: int

    @property
    def late(self) -> int:
        """In ticks."""
        return self.woke - self.due


class SleepingGuest(NamedTuple):
    """A running one."""

    machine: Machine

    def wake(self, at_least: int = 1) -> Wake:
        """The last one, once there were so many.  Not while the handler writes it down: that would be half of two."""
        found: list[Wake] = []

        def is_written_down() -> bool:
            if self._word(WAKES) >= at_least:
                with self.machine.runner.quiesce():
                    if self.machine.vcpus[0].get_regs()["rip"] not in HANDLER_CODE:
                        found.append(Wake(self._word(WOKE_FOR), self._word(WOKE_AT), self._word(WAKES)))
            return bool(found)

        wait_until(is_written_down, HANG_S)
        return found[0]

    def wait_until_asleep(self) -> None:
        """Return once it is halted."""

        def is_halted() -> bool:
            with self.machine.runner.quiesce():
                return self.machine.vcpus[0].get_mp_state() == 3 and self._word(DEADLINE) > self._word(WOKE_FOR)

        wait_until(is_halted)

    def _word(self, at: int) -> int:
        return int.from_bytes(self.machine.memory.read(at, 8), "little")


@contextmanager
def sleeping_guest(sleep_ticks: int, **options: object) -> Iterator[SleepingGuest]:
    """One that sleeps for so many ticks each time.  options: Machine's."""
    with Machine(b"\xf4", memory_bytes=1 << 20, **options) as machine:  # type: ignore[arg-type]
        machine.memory.write(CODE, _program())
        machine.memory.write(HANDLER, _handler())
        machine.memory.write(4 * VECTOR, _u16(HANDLER) + _u16(0))
        machine.memory.write(SLEEP_TICKS, sleep_ticks.to_bytes(8, "little"))
        enter(machine.vcpus[0], EntryState("real", CODE, {}))
        machine.start()
        yield SleepingGuest(machine)


def _program() -> bytes:
    sleep = (
        b"\x0f\x31"  # 1: rdtsc
        + (b"\x66\x03\x06" + _u16(SLEEP_TICKS) + b"\x66\x13\x16" + _u16(SLEEP_TICKS + 4))  # add, adc
        + (b"\x66\xa3" + _u16(DEADLINE) + b"\x66\x89\x16" + _u16(DEADLINE + 4))
        + (b"\x66\xb9" + TSC_DEADLINE.to_bytes(4, "little") + b"\x0f\x30")  # wrmsr
        + b"\xfb\xf4\xfa"  # sti; hlt; cli
    )
    return (
        b"\x31\xc0\x8e\xd8\x8e\xd0\xbc"  # xor %ax, %ax; mov %ax, %ds; mov %ax, %ss; mov $STACK, %sp
        + _u16(STACK)
        + write_msr(APIC_BASE, APIC_BASE_X2APIC)
        + write_msr(X2APIC_SPURIOUS, 0x1FF)
        + write_msr(X2APIC_LVT_TIMER, TSC_DEADLINE_MODE | VECTOR)
        + sleep
        + b"\xeb"
        + (-len(sleep) - 2).to_bytes(1, "little", signed=True)  # jmp 1b
    )


def _handler() -> bytes:
    return (
        b"\x0f\x31"  # rdtsc
        + (b"\x66\xa3" + _u16(WOKE_AT) + b"\x66\x89\x16" + _u16(WOKE_AT + 4))
        + (b"\x66\xa1" + _u16(DEADLINE) + b"\x66\xa3" + _u16(WOKE_FOR))
        + (b"\x66\xa1" + _u16(DEADLINE + 4) + b"\x66\xa3" + _u16(WOKE_FOR + 4))
        + (b"\x66\xff\x06" + _u16(WAKES))
        + write_msr(X2APIC_EOI, 0)
        + b"\xcf"  # iret
    )


def _u16(value: int) -> bytes:
    return value.to_bytes(2, "little")
