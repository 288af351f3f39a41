"""Steal time: layout, versions, accumulation, the preempted byte and the flush that a guest asks for in it."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock import KvmFeature, MsrFault, RangeError
from tests import golden, oracle
from tests.unit.stub_clock import GUARD, SIZE, StubClock, a_provider, u32, u64, written

STEAL_TIME = 0x4B564D03
RECORD = 0x3000
FLUSH = KvmFeature.STEAL_TIME | KvmFeature.PV_TLB_FLUSH
U64 = st.integers(0, 2**64 - 1)


def record_of(clock: StubClock, gpa: int = RECORD) -> oracle.StealTime:
    """The record as the oracle parses it."""
    return oracle.StealTime.parse(clock.memory.read(gpa, 64))


@pytest.mark.row("K-26", "K-27")
def test_enabling_makes_a_record_of_64_bytes() -> None:
    """The record is valid before the guest's next instruction: an even version, nobody preempted, nothing beside it."""
    provider, clock = a_provider()
    clock.memory.write(RECORD, bytes(64))
    provider.write_msr(0, STEAL_TIME, RECORD | 1)
    assert record_of(clock) == oracle.StealTime(0, 2, 0, 0, bytes(47))
    assert written(clock.memory) == [RECORD]
    assert clock.memory.read(RECORD + 64, 1) == bytes([GUARD])
    assert provider.read_msr(0, STEAL_TIME) == RECORD | 1
    assert provider.read_msr(1, STEAL_TIME) == 0


@pytest.mark.row("K-26", "K-27")
@pytest.mark.parametrize("gpa", [RECORD + 64, RECORD + 128, RECORD + 192, SIZE - 64])
def test_a_record_is_at_any_64_bytes(gpa: int) -> None:
    """The address is in bits 6 to 63; the record there is written, and not a byte beside it."""
    provider, clock = a_provider()
    clock.memory.write(gpa, bytes(64))
    expected = bytearray(clock.memory.read(0, SIZE))
    provider.write_msr(0, STEAL_TIME, gpa | 1)
    provider.add_steal_time(0, 0x1_0000_0005)
    provider.set_preempted(0, True)
    expected[gpa : gpa + 17] = bytes((5, 0, 0, 0, 1, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 1))
    assert clock.memory.read(0, SIZE) == expected


@pytest.mark.row("K-26")
@pytest.mark.parametrize("bit", [1, 2, 3, 4, 5])
def test_reserved_bits_fault(bit: int) -> None:
    """Bits 1 to 5 fault, enabled or not, and nothing changes."""
    provider, clock = a_provider()
    for value in (RECORD | 1 << bit, RECORD | 1 << bit | 1):
        with pytest.raises(MsrFault, match="reserved"):
            provider.write_msr(0, STEAL_TIME, value)
    assert provider.read_msr(0, STEAL_TIME) == 0
    assert written(clock.memory) == []


@pytest.mark.row("K-26")
@pytest.mark.parametrize("gpa", [SIZE, 2**64 - 64, 1 << 63])
def test_a_record_that_is_not_in_memory_is_ignored(gpa: int) -> None:
    """Linux takes the address, writes nothing and says nothing; as documented it would fault."""
    provider, clock = a_provider()
    provider.write_msr(0, STEAL_TIME, gpa | 1)
    assert provider.read_msr(0, STEAL_TIME) == gpa | 1
    assert provider.add_steal_time(0, 5) is False
    assert provider.set_preempted(0, True) is False
    assert written(clock.memory) == []
    strict, _ = a_provider(profile="document")
    with pytest.raises(MsrFault):
        strict.write_msr(0, STEAL_TIME, gpa | 1)
    assert strict.read_msr(0, STEAL_TIME) == 0
    strict.write_msr(0, STEAL_TIME, gpa)  # off: the address is of no account
    assert strict.read_msr(0, STEAL_TIME) == gpa


@pytest.mark.row("K-26")
def test_memory_that_comes_later_is_written_then() -> None:
    """As in Linux, a record outside of memory comes to life with the slot that covers it."""
    provider, clock = a_provider()
    provider.write_msr(0, STEAL_TIME, SIZE | 1)
    clock.memory.add_slot(SIZE, bytearray(0x1000))
    provider.add_steal_time(0, 9)
    assert record_of(clock, SIZE) == oracle.StealTime(9, 2, 0, 0, bytes(47))


@pytest.mark.row("K-29")
@pytest.mark.parametrize("step", golden.TIME_VERSIONS)
def test_versions_are_those_of_the_clock(step: golden.VersionStep) -> None:
    """The version goes on from what the guest's memory holds: odd while written, then even."""
    provider, clock = a_provider()
    clock.memory.write(RECORD + 8, step.old.to_bytes(4, "little"))
    provider.write_msr(0, STEAL_TIME, RECORD | 1)
    assert u32(clock.memory, RECORD + 8) == step.after


@pytest.mark.row("K-29")
def test_versions_seen_on_a_real_host() -> None:
    """Linux went 7, 10, 12, 14 on three updates."""
    provider, clock = a_provider()
    clock.memory.write(RECORD + 8, (7).to_bytes(4, "little"))
    provider.write_msr(0, STEAL_TIME, RECORD | 1)
    versions = [u32(clock.memory, RECORD + 8)]
    for _ in range(2):
        provider.add_steal_time(0, 1)
        versions.append(u32(clock.memory, RECORD + 8))
    assert versions == [10, 12, 14]


@pytest.mark.row("K-27", "K-28", "K-29", "K-30")
@given(before=st.binary(min_size=64, max_size=64), delays=st.lists(U64, max_size=4), offset=st.integers(0, 3))
def test_every_update_is_the_oracles(before: bytes, delays: list[int], offset: int) -> None:
    """Whatever the guest left in the record, each update makes of it what Linux does, byte for byte."""
    provider, clock = a_provider(features=int(FLUSH))
    gpa = RECORD + 64 * offset
    provider.write_msr(1, STEAL_TIME, gpa | 1)
    clock.memory.write(gpa, before)
    expected = oracle.StealTime.parse(before)
    for ns in delays:
        expected, flush = expected.updated(ns)
        assert provider.add_steal_time(1, ns) is flush
        assert record_of(clock, gpa) == expected


@pytest.mark.row("K-28")
def test_only_what_is_fed_counts() -> None:
    """The sum is what was fed, vCPU by vCPU; a way in after an idle time, with nothing to feed, adds nothing."""
    provider, clock = a_provider()
    clock.memory.write(RECORD, bytes(128))
    for vcpu in range(2):
        provider.write_msr(vcpu, STEAL_TIME, RECORD + 64 * vcpu | 1)
    for ns in (10, 0, 32):
        provider.add_steal_time(1, ns)
    assert (u64(clock.memory, RECORD), u64(clock.memory, RECORD + 64)) == (0, 42)


@pytest.mark.row("K-28")
def test_the_guests_own_value_goes_on() -> None:
    """A guest may set its steal time, to 0 at a hot-plug; the host adds to what is there, modulo 2^64."""
    provider, clock = a_provider()
    provider.write_msr(0, STEAL_TIME, RECORD | 1)
    clock.memory.write(RECORD, (2**64 - 1).to_bytes(8, "little"))
    provider.add_steal_time(0, 3)
    assert u64(clock.memory, RECORD) == 2


@pytest.mark.row("K-26")
def test_bit_0_clear_stops_updates() -> None:
    """Disabled, the record stays as it is, whatever is fed; the other vCPU's goes on."""
    provider, clock = a_provider()
    clock.memory.write(RECORD, bytes(128))
    for vcpu in range(2):
        provider.write_msr(vcpu, STEAL_TIME, RECORD + 64 * vcpu | 1)
    provider.write_msr(0, STEAL_TIME, RECORD)
    for vcpu in range(2):
        provider.add_steal_time(vcpu, 5)
        provider.set_preempted(vcpu, True)
    assert record_of(clock) == oracle.StealTime(0, 2, 0, 0, bytes(47))
    assert record_of(clock, RECORD + 64) == oracle.StealTime(5, 4, 0, 1, bytes(47))


@pytest.mark.row("K-27", "K-30")
def test_preempted_is_said_and_taken_back() -> None:
    """The byte is 1 while the vCPU is scheduled out, and 0 once it runs, told either way."""
    provider, clock = a_provider()
    provider.write_msr(0, STEAL_TIME, RECORD | 1)
    for run_again in (partial(provider.add_steal_time, 0, 7), partial(provider.set_preempted, 0, False)):
        provider.set_preempted(0, True)
        assert record_of(clock).preempted == 1
        assert run_again() is False
        assert record_of(clock).preempted == 0


@pytest.mark.row("K-30", "K-34")
@pytest.mark.parametrize(("features", "flushes"), [(FLUSH, True), (KvmFeature.STEAL_TIME, False)])
def test_a_guest_asks_for_a_flush_on_the_way_in(features: KvmFeature, flushes: bool) -> None:
    """What another vCPU put beside the preempted bit is told once, at the way in, and only if CPUID offers it."""
    provider, clock = a_provider(features=int(features))
    provider.write_msr(0, STEAL_TIME, RECORD | 1)
    for run_again in (partial(provider.add_steal_time, 0, 7), partial(provider.set_preempted, 0, False)):
        provider.set_preempted(0, True)
        clock.memory.write(RECORD + 16, b"\x03")
        provider.set_preempted(0, True)  # said again: the request stays
        assert record_of(clock).preempted == 3
        assert run_again() is flushes
        assert run_again() is False


@pytest.mark.row("K-28", "E9")
@pytest.mark.parametrize(("vcpu", "ns"), [(2, 0), (-1, 0), (0, -1), (0, 2**64)])
def test_a_vmms_mistake_is_named(vcpu: int, ns: int) -> None:
    """A vCPU that is not there, or a time that no record holds, is a RangeError, and nothing is written."""
    provider, clock = a_provider()
    provider.write_msr(0, STEAL_TIME, RECORD | 1)
    before = clock.memory.read(0, SIZE)
    with pytest.raises(RangeError):
        provider.add_steal_time(vcpu, ns)
    assert clock.memory.read(0, SIZE) == before


@pytest.mark.row("E14")
def test_writes_are_told_to_the_dirty_log() -> None:
    """KVM's dirty log does not see them, so on_dirty hears of the record, at every update."""
    provider, clock = a_provider()
    heard: list[tuple[int, int]] = []
    clock.memory.on_dirty = lambda gpa, length: heard.append((gpa, length))
    provider.write_msr(0, STEAL_TIME, RECORD | 1)
    provider.set_preempted(0, True)
    provider.set_preempted(0, False)
    assert heard == [(RECORD, 64)] * 3
