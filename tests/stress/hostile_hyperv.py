"""What a hostile guest does to Hyper-V's interface, and a vCPU that reads reference time beside it."""

from __future__ import annotations

import random
import struct
import time
from typing import Final, NamedTuple

from pvclock import GuestClock, HypercallRegisters, RangeError, StateError, read_tsc
from pvclock.quantities import U64_MASK, HostTsc
from tests.stress.hostile_vm import (
    QUIET_REFERENCE_PAGE,
    REFERENCE_TSC,
    TAKEN_OVER,
    Findings,
    Mischief,
    Vm,
    wild_number,
)
from tests.waiting import HANG_S

TIME_REF_COUNT: Final = 0x40000020
STIMERS: Final = range(0x400000B0, 0x400000B8)
HYPERV_MSRS: Final = (
    *(*range(0x40000000, 0x40000004), TIME_REF_COUNT, REFERENCE_TSC, 0x40000022, 0x40000023),
    *range(0x40000070, 0x40000074),
    *range(0x40000080, 0x40000085),
    *range(0x40000090, 0x400000A0),
    *STIMERS,
    *STIMERS,
    *(*range(0x400000F1, 0x400000F6), 0x400000FF, *range(0x40000100, 0x40000109), 0x40000118),
)
"""Of all parts; timers twice as often."""

CALLS: Final = (0x02, 0x03, 0x08, 0x0B, 0x15, 0x50, 0x51, 0x5C, 0x5D, 0x69, 0x6A, 0x6B, 0x8001, 0x8002)
SECOND_UNITS: Final = 10**7
OFF_UNITS_MAX: Final = 2
PAGE: Final = struct.Struct("<IIQq")


def hostile_value(rng: random.Random, index: int) -> int:
    """For one of these MSRs: what it makes something of, or anything."""
    if rng.random() < 0.3:
        return wild_number(rng)
    if index in STIMERS:
        return stimer_count(rng) if index & 1 else stimer_config(rng)
    if index in range(0x40000090, 0x400000A0):
        return rng.choice([0x20, 0xFF, 0xF, 1 << 16, 1 << 17 | 0x30, 1 << 18 | 0x40])
    if index == 0x40000000:
        return rng.choice([0x8100_0005_0A00_0000, 1, 0])
    return wild_number(rng) | rng.randrange(2)


def stimer_config(rng: random.Random) -> int:
    """Any flags, SINT and vector; enabled as a rule."""
    return rng.getrandbits(4) | rng.choice([1, 9, 9]) | rng.getrandbits(8) << 4 | rng.choice([0, 1 << 12, 2 << 16])


def stimer_count(rng: random.Random) -> int:
    """Periods from 100 ns on, times in the past, and times that never come."""
    return rng.choice([0, 1, 2, 3, 10, 1000, SECOND_UNITS, rng.getrandbits(64), U64_MASK, 1 << 63])


def hostile_registers(rng: random.Random) -> HypercallRegisters:
    """A control word of all kinds of bits, and addresses that are no lists of anything."""
    control = rng.choice([*CALLS, rng.getrandbits(16)]) | rng.choice([0, 0, 1 << 16, 1 << 31, 1 << 60, 1 << 44])
    control |= rng.choice([0, 0, 1, 2, 0xFFF, rng.getrandbits(12)]) << 32 | rng.choice([0, 0, 1, 0xFFF]) << 48
    control |= rng.choice([0, 0, 0, rng.getrandbits(10)]) << 17
    rax, rbx, rdx, rsi, rdi, r8 = (wild_number(rng) & rng.choice([U64_MASK, ~7]) for _ in range(6))
    ring, long_mode = rng.choice([0, 0, 0, 3]), rng.random() < 0.7
    return HypercallRegisters(rax, rbx, control, rdx, rsi, rdi, ring, long_mode, r8, rng.random() < 0.9)


class ReadPage(NamedTuple):
    """The page as read at a host TSC; units: what it says, None if it is not valid."""

    host_tsc: int
    sequence: int
    scale: int
    offset: int
    units: int | None


class QuietReference:
    """A vCPU that reads page and counter as a guest does: reference time never goes back, and is what it should be.

    Hostile vCPUs move the page; it moves it to its own place again, and looks at no other one.
    """

    def __init__(self, vm: Vm, findings: Findings) -> None:
        self._vm, self._findings = vm, findings
        self._epoch = -1
        self._last_units = 0
        self._last: ReadPage | None = None

    def step(self) -> str:
        """One reading by the page, and one by the counter after it."""
        moves, epoch = self._vm.moves.number, self._vm.epoch
        try:
            if not self._has_page():
                return "take page"
            with self._vm.backend.gate.in_guest():
                clock = self._vm.clock
                told = clock.events.last
                page = self._read()
            is_own = moves is not None and moves == self._vm.moves.number
            if is_own and self._is_one_epoch(epoch):
                self._look_at(page, clock, told)
            units = clock.read_msr(self._vm.QUIET, TIME_REF_COUNT)
        except Mischief:
            return "a callback's"
        except StateError as error:
            if TAKEN_OVER not in str(error):
                raise
            return "another clock"
        if self._is_one_epoch(epoch):
            self._never_less(units, "the counter")
        return "read page and counter" if is_own and page.units is not None else "read counter"

    def _has_page(self) -> bool:
        """Is the page at its place?  If not, move it there."""
        vm = self._vm
        if vm.clock.read_msr(vm.QUIET, REFERENCE_TSC) == QUIET_REFERENCE_PAGE | 1:
            return True
        self._last = None
        with vm.moves.moving():
            vm.clock.write_msr(vm.QUIET, REFERENCE_TSC, QUIET_REFERENCE_PAGE | 1)
        return False

    def _is_one_epoch(self, epoch: int) -> bool:
        """Was it one clock's time since then?  If another one began, nothing before counts."""
        now = self._vm.epoch
        if epoch != self._epoch:
            self._epoch, self._last_units, self._last = epoch, 0, None
        return epoch == now and not epoch & 1

    def _read(self) -> ReadPage:
        """Linux' loop around the page."""
        page = self._vm.arena.ram[QUIET_REFERENCE_PAGE : QUIET_REFERENCE_PAGE + PAGE.size]
        end_s = time.monotonic() + HANG_S
        while time.monotonic() < end_s:
            (before,) = struct.unpack_from("<I", page)
            host_tsc = read_tsc()
            tsc = host_tsc + self._vm.backend.offsets.get(self._vm.QUIET, 0) & U64_MASK
            sequence, _, scale, offset = PAGE.unpack(page)
            if before == sequence == struct.unpack_from("<I", page)[0]:
                units = (tsc * scale >> 64) + offset & U64_MASK
                return ReadPage(host_tsc, sequence, scale, offset, units if sequence else None)
        raise AssertionError(f"VM {self._vm.name}: the reference TSC page never stays as it is")

    def _look_at(self, page: ReadPage, clock: GuestClock, told: int) -> None:
        """told: the newest event before it was read; a step is declared a little before vCPUs are out of the guest."""
        if page.units is None:
            return
        self._never_less(page.units, "the page")
        self._check_sequence(page)
        try:
            units = clock.at(HostTsc(page.host_tsc)) / 100
        except RangeError:  # too long ago
            return
        if abs(page.units - units) > OFF_UNITS_MAX and clock.events.last == told:
            by = f"10^{len(str(int(abs(page.units - units)))) - 1}"
            self._findings.add(f"VM {self._vm.name}: the page is {by} units or more off, VMM: {self._vm.doing}")

    def _never_less(self, units: int, what: str) -> None:
        if units < self._last_units:
            self._findings.add(f"VM {self._vm.name}: {what} went back, VMM: {self._vm.doing}")
        self._last_units = units

    def _check_sequence(self, page: ReadPage) -> None:
        last, self._last = self._last, page
        if last is None:
            return
        ahead = page.sequence - last.sequence & 0xFFFFFFFF
        if page.sequence == 0xFFFFFFFF or ahead >= 1 << 31:
            self._findings.add(f"VM {self._vm.name}: sequence {page.sequence:#x} after {last.sequence:#x}")
        if not ahead and (page.scale, page.offset) != (last.scale, last.offset):
            self._findings.add(f"VM {self._vm.name}: a sequence was used again")
