"""Steal time as a clock counts it: through rollbacks, new vCPU threads and pauses."""

from __future__ import annotations

from typing import Final

import pytest

from pvclock import GuestClock, GuestMemory, SimulatedBackend
from tests.unit.clocks import NS_PER_S

STEAL_TIME: Final = 0x4B564D03
RECORD: Final = 0x4000


def a_vm(vcpus: int = 1) -> tuple[GuestClock, SimulatedBackend, GuestMemory]:
    """A VM whose guest has enabled steal time on each vCPU."""
    backend = SimulatedBackend(2_500_000_000, tsc=10**13, boot_id="one")
    memory = GuestMemory(bytearray(1 << 16))
    clock = GuestClock(memory, vcpus, backend=backend)
    for vcpu in range(vcpus):
        clock.write_msr(vcpu, STEAL_TIME, RECORD + 64 * vcpu | 1)
    return clock, backend, memory


def stolen_ns(memory: GuestMemory, vcpu: int = 0) -> int:
    """What that vCPU's guest reads."""
    return int.from_bytes(memory.read(RECORD + 64 * vcpu, 8), "little")


@pytest.mark.row("K-28", "E9")
def test_a_rollback_in_the_same_process_counts_nothing_again() -> None:
    """Saved, put back and restored over the same vCPU threads: the guest's 144,139,048 ns stay that."""
    clock, backend, memory = a_vm()
    backend.run_delays_ns[0] = 144_139_048
    clock.tick()
    clock.pause()
    state, image = clock.save(), memory.read(0, 1 << 16)
    memory.write(0, image)
    restored = GuestClock.restore(state, memory, backend=backend)
    restored.resume()
    restored.tick()
    assert stolen_ns(memory) == 144_139_048
    backend.run_delays_ns[0] += 7
    restored.tick()
    assert stolen_ns(memory) == 144_139_055


@pytest.mark.row("K-28", "E9")
def test_a_vcpu_thread_that_is_made_anew_begins_at_0() -> None:
    """The kernel says 5 s, 0 (a new thread) and 4 s: the guest is told 9 s."""
    clock, backend, memory = a_vm()
    for delay_s in (5, 0, 4):
        backend.run_delays_ns[0] = delay_s * NS_PER_S
        clock.tick()
    assert stolen_ns(memory) == 9 * NS_PER_S


@pytest.mark.row("K-28", "E9")
def test_a_new_thread_that_has_waited_already_loses_nothing() -> None:
    """5 s, then 4 s of a new thread with no look between: 9 s."""
    clock, backend, memory = a_vm()
    for delay_s in (5, 4):
        backend.run_delays_ns[0] = delay_s * NS_PER_S
        clock.tick()
    assert stolen_ns(memory) == 9 * NS_PER_S


@pytest.mark.row("K-28", "E9")
def test_each_vcpu_has_its_own_account() -> None:
    """What one vCPU's thread waited is told to that vCPU alone; a delay that nobody knows is 0."""
    clock, backend, memory = a_vm(3)
    backend.run_delays_ns.update({0: 11, 2: 33})
    clock.tick()
    assert [stolen_ns(memory, vcpu) for vcpu in range(3)] == [11, 0, 33]


@pytest.mark.row("K-28", "E9")
@pytest.mark.parametrize("restored", [False, True])
def test_guest_memory_is_not_written_while_the_clock_is_paused(restored: bool) -> None:
    """A tick of a paused clock leaves every byte as it was, and what came up is told after the resume."""
    clock, backend, memory = a_vm()
    clock.pause()
    if restored:
        clock = GuestClock.restore(clock.save(), memory, backend=backend)
    image = memory.read(0, 1 << 16)
    backend.run_delays_ns[0] = 5
    clock.tick()
    clock.refresh()
    assert memory.read(0, 1 << 16) == image
    clock.resume()
    clock.tick()
    assert stolen_ns(memory) == 5
