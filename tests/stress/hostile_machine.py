"""A real VM of the hostile-guest run: its guest goes through a table of MSR accesses that the VMM rewrites."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from pvclock import GuestClock, Machine, PvclockError
from pvclock.clock.ticker import Ticker
from tests.kvm.msr_script import COUNT_AND_SKIP, FAULTS, GP_VECTOR, HANDLER
from tests.stress.hostile_actors import MSRS
from tests.stress.hostile_hyperv import HYPERV_MSRS, hostile_value
from tests.stress.hostile_vm import wild_number

MEMORY_BYTES: Final = 1 << 20
TABLE: Final = 0xA000
ENTRIES: Final = 256
ENTRY: Final = struct.Struct("<IQ")
PAGES_BEGIN: Final = 0xC000
"""Below it are vectors, stack, code and table: a guest that puts its pages there destroys itself."""

HYPERV_PART: Final = 0.7
RESET: Final = 0x40000003
PAGE_MSRS: Final = (0x40000001, 0x40000021, 0x40000073, 0x40000082, 0x40000083)
"""Hypercall, reference TSC, APIC assist, event and message page."""

# mov $0x500, %sp; 1: mov $TABLE, %si; 2: mov (%si), %ecx; mov 4(%si), %eax; mov 8(%si), %edx; wrmsr; rdmsr;
# add $12, %si; cmp $TABLE_END, %si; jb 2b; jmp 1b
GUEST: Final = (
    b"\xbc\x00\x05\xbe"
    + TABLE.to_bytes(2, "little")
    + bytes.fromhex("668b0c 668b4404 668b5408 0f30 0f32 83c60c 81fe")
    + (TABLE + ENTRIES * ENTRY.size).to_bytes(2, "little")
    + bytes.fromhex("72e7 ebe2")
)


class MachineVmm:
    """The VMM of such a machine; one that its guest has crashed is made anew."""

    def __init__(self, ticker: Ticker, rng: random.Random, provider: str = "KVM") -> None:
        self._ticker, self._rng, self._provider = ticker, rng, provider
        self._ended_faults = 0
        self._begin()

        def clock() -> GuestClock:  # that of the present machine
            return self._clock

        self._operations: tuple[tuple[str, Callable[[], object]], ...] = (
            ("table", self._rewrite),
            ("table", self._rewrite),
            ("dilate", lambda: clock().dilate(rng.randrange(1, 2000), rng.randrange(500, 1000))),
            ("skip", lambda: clock().skip(rng.randrange(10**6))),
            ("slew", lambda: clock().slew(rng.randrange(-(10**6), 10**6))),
            ("pause", self._pause),
            ("pause the clock", lambda: clock().pause()),
            ("run_for", self._run_for),
            ("save", lambda: clock().save()),
            ("refresh", lambda: clock().refresh()),
            ("tick", lambda: clock().tick()),
            ("repair_tsc", lambda: clock().repair_tsc()),
            ("host_write_msr", lambda: clock().host_write_msr(0, rng.choice([0x10, 0x3B]), rng.getrandbits(64))),
            ("read", lambda: clock().read(0)),
        )

    @property
    def faults(self) -> int:
        """How many #GPs its guests have met with; those of one that is being made anew may be left out."""
        try:
            return self._ended_faults + self._present_faults()
        except PvclockError:  # closed
            return self._ended_faults

    def _present_faults(self) -> int:
        return int.from_bytes(self._machine.memory.read(FAULTS, 4), "little")

    def step(self) -> str:
        """One operation; an error of ours is an answer."""
        if self._machine.runner.failure is not None:
            raise self._machine.runner.failure
        if self._machine.runner.join(0):
            self._end()
            self._begin()
            return "made anew"
        name, operate = self._rng.choice(self._operations)
        try:
            operate()
        except PvclockError as error:
            return f"{name}: {type(error).__name__}"
        return name

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _begin(self) -> None:
        self._machine = machine = Machine(
            GUEST, memory_bytes=MEMORY_BYTES, tick_interval_s=None, provider=self._provider
        )
        assert machine.clock is not None
        self._clock = machine.clock
        machine.memory.write(4 * GP_VECTOR, HANDLER.to_bytes(4, "little"))
        machine.memory.write(HANDLER, COUNT_AND_SKIP)
        self._rewrite()
        self._ticker.add(self._clock)
        machine.start()

    def _end(self) -> None:
        self._ticker.remove(self._clock)
        self._machine.stop()
        faults = self._present_faults()
        self._machine.close()
        self._ended_faults += faults

    def _rewrite(self) -> None:
        entries = (self._entry() for _ in range(ENTRIES))
        self._machine.memory.write(TABLE, b"".join(entries))

    def _entry(self) -> bytes:
        if self._provider != "KVM" and self._rng.random() < HYPERV_PART:
            return self._hyperv_entry()
        value = 0
        while value < PAGES_BEGIN:
            value = wild_number(self._rng)
        return ENTRY.pack(self._rng.choice(MSRS), value)

    def _hyperv_entry(self) -> bytes:
        """Of Hyper-V's MSRs; now and then one that resets the machine."""
        index = self._rng.choice(HYPERV_MSRS)
        while index == RESET and self._rng.random() < 0.999:
            index = self._rng.choice(HYPERV_MSRS)
        value = hostile_value(self._rng, index)
        while index in PAGE_MSRS and value < PAGES_BEGIN:
            value = hostile_value(self._rng, index)
        return ENTRY.pack(index, value)

    def _pause(self) -> None:
        self._machine.pause()
        try:
            self._clock.skip(self._rng.randrange(1000))
            self._clock.save()
        finally:
            self._resume()

    def _run_for(self) -> None:
        self._machine.pause()
        try:
            self._machine.run_for(self._rng.choice([1000, 10**5, 0]))
        finally:
            self._resume()

    def _resume(self) -> None:
        self._machine.resume(self._rng.choice(["freeze", "advance", "slew", None]))
