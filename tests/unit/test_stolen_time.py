"""Steal time as a clock counts it: through rollbacks, new vCPU threads and pauses."""

from __future__ import annotations

from functools import partial
from typing import Final

import pytest

from pvclock import GuestClock, GuestMemory, KvmFeature, SimulatedBackend
from pvclock.providers.kvm import KvmProvider
from tests.unit.clocks import NS_PER_S

STEAL_TIME: Final = 0x4B564D03
RECORD: Final = 0x4000
PREEMPTED: Final = 16
FLUSH: Final = KvmFeature.STEAL_TIME | KvmFeature.PV_TLB_FLUSH


def a_vm(vcpus: int = 1, **options: object) -> tuple[GuestClock, SimulatedBackend, GuestMemory]:
    """A VM whose guest has enabled steal time on each vCPU."""
    backend = SimulatedBackend(2_500_000_000, tsc=10**13, boot_id="one")
    memory = GuestMemory(bytearray(1 << 16))
    clock = GuestClock(memory, vcpus, backend=backend, **options)  # type: ignore[arg-type]  # a test's own choice
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


@pytest.mark.row("K-26")
def test_a_record_that_was_disabled_takes_no_run_delay() -> None:
    """A tick leaves the record of a vCPU whose bit 0 is clear as it is, and adds to the other's."""
    clock, backend, memory = a_vm(2)
    clock.write_msr(0, STEAL_TIME, RECORD)
    before = memory.read(RECORD, 64)
    backend.run_delays_ns = {0: 5, 1: 7}
    clock.tick()
    assert memory.read(RECORD, 64) == before
    assert stolen_ns(memory, 1) == 7


@pytest.mark.row("K-28", "E9")
def test_each_vcpu_has_its_own_account() -> None:
    """What one vCPU's thread waited is told to that vCPU alone; a delay that nobody knows is 0."""
    clock, backend, memory = a_vm(3)
    backend.run_delays_ns.update({0: 11, 2: 33})
    clock.tick()
    assert [stolen_ns(memory, vcpu) for vcpu in range(3)] == [11, 0, 33]


@pytest.mark.row("K-28")
def test_time_that_passes_is_not_stolen() -> None:
    """A vCPU that did not wait, idle or not, is told nothing: an hour later its record is the same, byte for byte."""
    clock, backend, memory = a_vm()
    backend.run_delays_ns[0] = 5
    clock.tick()
    before = memory.read(RECORD, 64)
    for _ in range(60):
        backend.advance(ns=60 * NS_PER_S)
        clock.tick()
        clock.refresh()
    assert stolen_ns(memory) == 5
    assert memory.read(RECORD, 64) == before


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


def a_preempted_vcpu(features: KvmFeature) -> tuple[GuestClock, SimulatedBackend, KvmProvider]:
    """A VM whose vCPU 0 was scheduled out, and was then asked by another one to flush its TLB, without an interrupt."""
    clock, backend, memory = a_vm(features=int(features))
    provider = clock.interface.provider
    assert isinstance(provider, KvmProvider)
    provider.set_preempted(0, True)
    assert memory.read(RECORD + PREEMPTED, 1) == b"\x01"
    memory.write(RECORD + PREEMPTED, b"\x03")  # cmpxchg by that one: preempted, flush
    return clock, backend, provider


@pytest.mark.row("K-30", "K-28")
@pytest.mark.parametrize(("features", "flushes"), [(FLUSH, True), (KvmFeature.STEAL_TIME, False)])
def test_a_tick_leaves_a_preempted_vcpu_preempted(features: KvmFeature, flushes: bool) -> None:
    """What a tick adds leaves `preempted` alone, so the flush that the guest asked for is told when the vCPU runs."""
    clock, backend, provider = a_preempted_vcpu(features)
    backend.run_delays_ns[0] = 5_000_000
    clock.tick()
    assert stolen_ns(clock.memory) == 5_000_000
    assert clock.memory.read(RECORD + PREEMPTED, 1) == b"\x03"
    assert provider.set_preempted(0, False) is flushes
    assert clock.memory.read(RECORD + PREEMPTED, 1) == b"\x00"
    assert provider.set_preempted(0, False) is False


@pytest.mark.row("K-30", "E9")
@pytest.mark.parametrize("way_in", ["add_steal_time", "set_preempted"])
def test_a_flush_outlives_an_error_of_on_dirty(way_in: str) -> None:
    """Where on_dirty raises on the vCPU's way in, the next call tells the flush that was asked for, once."""
    clock, _, provider = a_preempted_vcpu(FLUSH)
    go_in = (
        partial(provider.add_steal_time, 0, 0)
        if way_in == "add_steal_time"
        else partial(provider.set_preempted, 0, False)
    )

    def full(gpa: int, length: int) -> None:
        raise OSError(f"{gpa:#x}+{length}: the dirty log is full")

    clock.memory.on_dirty = full
    with pytest.raises(OSError, match="full"):
        go_in()
    clock.memory.on_dirty = None
    assert go_in() is True
    assert go_in() is False


@pytest.mark.row("K-30", "K-26")
def test_a_flush_outlives_a_write_of_the_msr() -> None:
    """A record that is enabled anew begins without `preempted`, and a flush that was asked for in it is told."""
    clock, _, provider = a_preempted_vcpu(FLUSH)
    clock.write_msr(0, STEAL_TIME, RECORD | 1)
    assert clock.memory.read(RECORD + PREEMPTED, 1) == b"\x00"
    assert provider.set_preempted(0, False) is True
    assert provider.set_preempted(0, False) is False
