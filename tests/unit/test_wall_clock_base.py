"""What a guest's time of day is made of: local time, a fixed start, an adjustment; in the record and in pairings."""

from __future__ import annotations

from typing import Any, Final

import pytest

from pvclock import GuestClock, GuestMemory, RangeError, SimulatedBackend, WrongType
from pvclock.clock.wall_clock import WallClockBase
from pvclock.providers.interface import HypercallRegisters
from pvclock.state.clock_state import WallClockState, from_json, to_json
from tests.unit.clocks import NS_PER_S, SYSTEM_TIME

HZ: Final = 2_500_000_000
UTC_NS: Final = 1_800_000_000 * NS_PER_S
HOUR_NS: Final = 3600 * NS_PER_S
WALL_CLOCK: Final = 0x4B564D00
RECORD: Final = 0x3000
PAIRING: Final = 0x5000
Y2K_NS: Final = 946_684_800 * NS_PER_S


def a_vm(vcpus: int = 2) -> tuple[GuestClock, SimulatedBackend, GuestMemory]:
    """A VM that has run for 1 s."""
    backend = SimulatedBackend(HZ, tsc=10**13, ref_ns=4 * 10**12, realtime_ns=UTC_NS)
    memory = GuestMemory(bytearray(1 << 16))
    clock = GuestClock(memory, vcpus, backend=backend)
    for vcpu in range(vcpus):
        clock.write_msr(vcpu, SYSTEM_TIME, 0x2001 + 64 * vcpu)
    backend.advance(ns=NS_PER_S)
    return clock, backend, memory


def recorded_ns(clock: GuestClock, vcpu: int = 0) -> int:
    """The UTC of guest time 0, as the guest finds it in the record that it asks for."""
    clock.memory.write(RECORD, bytes(12))
    clock.write_msr(vcpu, WALL_CLOCK, RECORD)
    record = clock.memory.read(RECORD, 12)
    return int.from_bytes(record[4:8], "little") * NS_PER_S + int.from_bytes(record[8:12], "little")


def paired(clock: GuestClock) -> tuple[int, int]:
    """The time of day in ns and the TSC of KVM_HC_CLOCK_PAIRING."""
    call = HypercallRegisters(rax=9, rbx=PAIRING, rcx=0, rdx=0, rsi=0)
    assert clock.hypercall(0, call).rax == 0
    answer = clock.memory.read(PAIRING, 24)
    sec, nsec, tsc = (int.from_bytes(answer[at : at + 8], "little", signed=at < 16) for at in (0, 8, 16))
    return sec * NS_PER_S + nsec, tsc


@pytest.mark.row("TM-16", "K-06")
@pytest.mark.parametrize("offset_ns", [0, HOUR_NS, -5 * HOUR_NS - HOUR_NS // 2, 123_456_789])
def test_local_time_is_utc_and_an_offset(offset_ns: int) -> None:
    """The record of each vCPU says UTC plus the offset, at guest time 0."""
    clock, _, _ = a_vm()
    clock.wall_clock = WallClockBase(offset_ns)
    assert [recorded_ns(clock, vcpu) for vcpu in range(2)] == [UTC_NS + offset_ns] * 2


@pytest.mark.row("TM-16", "K-07")
@pytest.mark.parametrize("offset_ns", [0, 5])
def test_a_fixed_start_is_the_time_of_day_at_guest_time_0(offset_ns: int) -> None:
    """Whatever the host's UTC is and is set to, adjustment included."""
    clock, backend, _ = a_vm()
    clock.wall_clock = WallClockBase(offset_ns, Y2K_NS)
    backend.realtime_ns += HOUR_NS
    assert recorded_ns(clock) == Y2K_NS + offset_ns
    clock.dilate(2)
    backend.advance(ns=NS_PER_S)
    assert recorded_ns(clock) == Y2K_NS + offset_ns


@pytest.mark.row("TM-16", "K-37")
@pytest.mark.parametrize(
    ("base", "expected_ns"),
    [
        (WallClockBase(), UTC_NS + NS_PER_S),
        (WallClockBase(HOUR_NS), UTC_NS + NS_PER_S + HOUR_NS),
        (WallClockBase(0, Y2K_NS), Y2K_NS + NS_PER_S),
        (WallClockBase(-7, Y2K_NS), Y2K_NS + NS_PER_S - 7),
    ],
)
def test_clock_pairing_says_the_same_time_of_day(base: WallClockBase, expected_ns: int) -> None:
    """At one instant: the pair's TSC is that at which guest time and record make the pair's time of day."""
    clock, backend, _ = a_vm()
    clock.wall_clock = base
    ns, tsc = paired(clock)
    assert (ns, tsc) == (expected_ns, backend.tsc)
    assert recorded_ns(clock) + clock.now() == ns
    backend.advance(ns=NS_PER_S)
    assert paired(clock) == (expected_ns + NS_PER_S, backend.tsc)


@pytest.mark.row("TM-16", "P-25")
@pytest.mark.parametrize("base", [WallClockBase(-HOUR_NS), WallClockBase(3, Y2K_NS), WallClockBase(0, -1)])
def test_it_is_saved_and_comes_back(base: WallClockBase) -> None:
    """The state holds it, and the restored clock tells by it."""
    clock, backend, memory = a_vm()
    clock.wall_clock = base
    clock.pause()
    state = from_json(to_json(clock.save()))
    assert state.wall_clock == WallClockState(*base)
    host = SimulatedBackend(HZ, realtime_ns=backend.realtime_ns + HOUR_NS)
    restored = GuestClock.restore(state, memory, backend=host)
    assert restored.wall_clock == base
    restored.resume("freeze")
    of_utc = UTC_NS + HOUR_NS + base.offset_ns
    expected = of_utc if base.fixed_ns is None else base.fixed_ns + base.offset_ns
    assert recorded_ns(restored) == expected % (2**32 * NS_PER_S)


@pytest.mark.row("TM-16", "P-25")
def test_a_state_of_version_1_is_utc() -> None:
    """It knows of nothing else."""
    clock, backend, memory = a_vm()
    clock.pause()
    old = from_json(to_json(clock.save()._replace(version=1)))
    assert GuestClock.restore(old, memory, backend=backend).wall_clock == WallClockBase(0, None)


@pytest.mark.row("TM-16", "E9")
@pytest.mark.parametrize(
    "base", [(2**63, None), (-(2**63) - 1, None), (0, 2**63), (0, -(2**63) - 1), (0.5, None), (0, 0.5)]
)
def test_what_cannot_be_saved_is_refused(base: tuple[Any, Any]) -> None:
    """Beyond 2^63 ns, or in parts of a ns: an error, and the base is what it was."""
    clock, _, _ = a_vm()
    clock.wall_clock = WallClockBase(1, 2)
    with pytest.raises((RangeError, WrongType)):
        clock.wall_clock = WallClockBase(*base)
    assert clock.wall_clock == (1, 2)
    to_json(clock.save())


@pytest.mark.row("TM-16", "E9")
@pytest.mark.parametrize("ns", [-(2**63), 2**63 - 1])
def test_the_utmost_can_be_told_and_saved(ns: int) -> None:
    """Record and pairing take any base that is accepted; seconds of the record are modulo 2^32."""
    clock, _, _ = a_vm()
    clock.wall_clock = WallClockBase(ns, ns)
    assert recorded_ns(clock) == 2 * ns % (2**32 * NS_PER_S)
    assert paired(clock)[0] == 2 * ns + NS_PER_S
    assert from_json(to_json(clock.save())).wall_clock == (ns, ns)
