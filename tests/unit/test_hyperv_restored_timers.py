"""Synthetic timers and their messages on a clock that was saved and restored: they go on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvclock import GuestClock, GuestMemory, SimulatedBackend
from pvclock.state import clock_state
from tests.unit.stub_clock import NotedVmm

pytestmark = pytest.mark.row("E1", "H-41", "H-42", "H-72")

STATES: Final = Path(__file__).parents[1] / "states"
HZ: Final = 2_596_132_000
SIMP, EOM, SINT2, STIMER0_CONFIG = 0x40000083, 0x40000084, 0x40000092, 0x400000B0
PAGE: Final = 0x3000
SLOT: Final = PAGE + 2 * 256
VECTOR, DIRECT_VECTOR = 0x21, 0x31
ENABLE, PERIODIC, DIRECT = 1 << 0, 1 << 1, 1 << 12
BY_MESSAGE: Final = 2 << 16
UNIT_NS: Final = 100
MS_UNITS: Final = 10_000


class Vm:
    """A guest's clock, its memory, and the interrupts that it has raised."""

    def __init__(self, provider: str = "HyperV") -> None:
        self.backend = SimulatedBackend(HZ, 10**9, ref_ns=10**9, boot_id="one")
        self.memory, self.vmm = GuestMemory(bytearray(1 << 16)), NotedVmm()
        self.clock = GuestClock(self.memory, 2, provider, backend=self.backend, vmm=self.vmm)
        self.clock.write_msr(0, SIMP, PAGE | 1)
        self.clock.write_msr(0, SINT2, VECTOR)

    def arm(self, timer: int, flags: int, count: int) -> None:
        """Set vCPU 0's timer; count: as its MSR has it, in units."""
        self.clock.write_msr(0, STIMER0_CONFIG + 2 * timer, flags | ENABLE)
        self.clock.write_msr(0, STIMER0_CONFIG + 2 * timer + 1, count)

    def interrupts(self) -> list[int]:
        """Vectors that were raised since the last call, all of them on vCPU 0."""
        notes, self.vmm.notes = self.vmm.notes, []
        assert all(note[:2] == ("inject", 0) for note in notes)
        return [int(str(note[2])) for note in notes]

    def step(self, ns: int) -> tuple[list[int], int]:
        """Let time pass and the timers expire; what was raised, and the expiration of the message in the slot."""
        self.backend.advance(ns=ns)
        self.clock.expire_timers()
        return self.interrupts(), self.message()

    def message(self) -> int:
        """When the timer whose message is in the slot expired; 0 if the slot is free."""
        slot = self.memory.read(SLOT, 40)
        return int.from_bytes(slot[24:32], "little") if any(slot[:4]) else 0

    def take(self) -> None:
        """The guest has read the message: free its slot, and say so."""
        self.memory.write(SLOT, bytes(4))
        self.clock.write_msr(0, EOM, 0)

    def restored(self) -> Vm:
        """The same guest elsewhere, from its saved clock and a copy of its memory; resumed where it stood."""
        self.clock.pause()
        text = clock_state.to_json(self.clock.save())
        again = Vm.__new__(Vm)
        again.backend = SimulatedBackend(HZ, 77, ref_ns=5, boot_id="two")
        again.memory, again.vmm = GuestMemory(bytearray(self.memory.read(0, 1 << 16))), NotedVmm()
        state = clock_state.from_json(text)
        again.clock = GuestClock.restore(state, again.memory, backend=again.backend, vmm=again.vmm)
        return again


@pytest.mark.parametrize("provider", ["HyperV", "HyperV+KVM"])
def test_an_interrupt_is_raised_again_at_the_resume(provider: str) -> None:
    """One for a message that lies in its slot, for the first may have been on its way; none while time stands still."""
    vm = Vm(provider)
    vm.arm(0, BY_MESSAGE, MS_UNITS)
    assert vm.step(10**6 + UNIT_NS) == ([VECTOR], MS_UNITS)
    again = vm.restored()
    assert again.step(10**6) == ([], MS_UNITS)
    again.clock.resume("freeze")
    assert again.step(0) == ([VECTOR], MS_UNITS)
    assert again.step(10**6) == ([], MS_UNITS)


def test_messages_that_wait_go_on_to_wait() -> None:
    """Of three one-shot timers for one slot, the later two are told of in their order, once the slot is free."""
    vm = Vm()
    dues = (MS_UNITS, MS_UNITS + 1, MS_UNITS + 2)
    for timer, due in enumerate(dues):
        vm.arm(timer, BY_MESSAGE, due)
    assert vm.step(2 * 10**6) == ([VECTOR], dues[0])
    again = vm.restored()
    again.clock.resume("freeze")
    again.step(0)
    for due in dues[1:]:
        again.take()
        assert again.step(0) == ([VECTOR], due)
    again.take()
    assert again.step(10**9) == ([], 0)


@pytest.mark.row("P-25", "H-36", "E4")
@pytest.mark.parametrize("name", ["v3-hyperv.json", "v3-hyperv-kvm.json"])
def test_a_kept_state_goes_on(name: str) -> None:
    """From a file that never changes: counter, page and timers go on, on a TSC that is not what the guest was told."""
    state = clock_state.read(STATES / name)
    memory, vmm, backend = GuestMemory(bytearray(1 << 16)), NotedVmm(), SimulatedBackend(state.host.tsc_hz, 1 << 50)
    clock = GuestClock.restore(state, memory, backend=backend, vmm=vmm, policy="freeze")
    assert clock.save().provider == state.provider
    clock.resume()
    assert 288_000_000_001 <= clock.read_msr(1, 0x40000020) <= 288_000_000_002
    assert int.from_bytes(memory.read(0x5000, 4), "little") == 8
    clock.expire_timers()
    assert int.from_bytes(memory.read(0x6000 + 2 * 256 + 24, 8), "little") == 287_999_999_999  # the message that waited
    assert vmm.notes == [("inject", 0, 0x20), ("inject", 0, 0xF1)]  # and the re-enlightenment interrupt
    backend.advance(ns=1_000_000)  # a tenth of it is guest time, at the saved rate
    clock.expire_timers()
    assert vmm.notes[2:] == [("inject", 0, 0x30)]


TIMERS: Final = st.tuples(
    st.sampled_from([BY_MESSAGE, BY_MESSAGE | PERIODIC, DIRECT | DIRECT_VECTOR << 4, DIRECT | PERIODIC | 0x41 << 4]),
    st.integers(1, 3 * MS_UNITS),
)


@settings(max_examples=30)
@given(
    timers=st.lists(TIMERS, min_size=1, max_size=4),
    before=st.lists(st.integers(0, 10**6), min_size=1, max_size=4),
    after=st.lists(st.integers(UNIT_NS, 10**6), min_size=1, max_size=8),
)
def test_a_restored_guest_meets_the_same_interrupts(
    timers: list[tuple[int, int]], before: list[int], after: list[int]
) -> None:
    """Any timers: after a save, a restore and a resume the same ones expire at the same guest times as without."""
    stays, moves = Vm(), Vm()
    for vm in (stays, moves):
        for timer, (flags, count) in enumerate(timers):
            vm.arm(timer, flags, count)
        for ns in before:
            vm.step(ns)
        if vm.message():
            vm.take()
        vm.step(0)
    moves = moves.restored()
    moves.clock.resume("freeze")
    moves.step(0)  # interrupts of messages in their slots, a second time
    at = (moves.clock.now(), stays.clock.now())
    assert abs(at[0] - at[1]) <= 1
    for ns in after:
        # In the middle of a unit, for the two TSCs are at other fractions of it.
        there, here = (vm.step(ns - (vm.clock.now() + ns) % UNIT_NS + UNIT_NS // 2) for vm in (moves, stays))
        assert there == here
        for vm in (moves, stays):
            if vm.message():
                vm.take()
