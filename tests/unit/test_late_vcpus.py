"""vCPUs of a clock that are not there from the start: none makes a difference before it comes, and each agrees then."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import partial

import pytest

from pvclock import ConfigError, GuestClock, HostTsc, RangeError, StateError, TscOffsetNotHonoured
from pvclock._core import TSC_STABLE_BIT
from pvclock._memory import GuestMemory
from pvclock.host.simulated import SimulatedBackend
from pvclock.readings import TimeInfo

pytestmark = pytest.mark.row("E5")

SYSTEM_TIME = 0x4B564D01
TSC, TSC_ADJUST, TSC_AUX = 0x10, 0x3B, 0xC0000103
HZ = 2_600_000_000


def clock_of(backend: SimulatedBackend, vcpus: int = 3, present: int = 1) -> GuestClock:
    """A clock, of whose vCPUs some are there, with a page for each."""
    clock = GuestClock(GuestMemory(bytearray(1 << 16)), vcpus, backend=backend, vcpus_present=present)
    for vcpu in range(present):
        clock.write_msr(vcpu, SYSTEM_TIME, 0x1000 + vcpu * 32 | 1)
    return clock


def page(clock: GuestClock, vcpu: int) -> TimeInfo:
    """What vCPU's guest reads."""
    found = clock.page(vcpu)
    assert found is not None
    return found


def line(info: TimeInfo) -> tuple[object, ...]:
    """What must be equal on all vCPUs: all but the version."""
    return tuple(value for name, value in zip(info._fields, info, strict=True) if name != "version")


def test_one_that_is_not_there_does_not_count() -> None:
    """The only vCPU moves its TSC: no other is out of step with it, so its page stays STABLE; nor has the host one."""
    backend = SimulatedBackend(HZ, tsc=1000)
    clock = clock_of(backend)
    clock.write_msr(0, TSC, 1 << 40)
    clock.refresh()
    assert page(clock, 0).flags & TSC_STABLE_BIT
    assert set(backend.tsc_offsets) == {0}
    assert clock.repair_tsc() == []
    assert (clock.vcpus, clock.vcpus_present) == (3, 1)


def nothing(_: GuestClock) -> None:
    """What leaves a TSC alone."""


@pytest.mark.parametrize(
    "before",
    [
        nothing,
        lambda clock: clock.write_msr(0, TSC, 1 << 50),
        lambda clock: clock.write_msr(0, TSC_ADJUST, 5 << 30),
        lambda clock: clock.host_write_msr(0, TSC, 77),
        lambda clock: clock.host_write_msr(0, TSC_ADJUST, 99),
        lambda clock: clock.dilate(1, 3),
        lambda clock: clock.skip(10**9),
    ],
    ids=["nothing", "guest TSC", "guest ADJUST", "VMM TSC", "VMM ADJUST", "dilate", "skip"],
)
def test_a_late_vcpu_is_as_the_first(before: Callable[[GuestClock], object]) -> None:
    """Whatever was done before: the same TSC at each instant, the same ADJUST, AUX 0, and the same line on its page."""
    backend = SimulatedBackend(HZ, tsc=1000)
    clock = clock_of(backend)
    before(clock)
    clock.write_msr(0, TSC_AUX, 4)
    backend.advance(ns=123_456_789)
    assert clock.add_vcpu() == 1
    assert backend.tsc_offsets[1] == backend.tsc_offsets[0] == clock.tsc(1).offset
    assert (clock.tsc(1).adjust, clock.tsc(1).aux) == (clock.tsc(0).adjust, 0)
    later = HostTsc(backend.tsc + 5)
    assert clock.guest_tsc(1, later) == clock.guest_tsc(0, later)
    clock.write_msr(1, SYSTEM_TIME, 0x1020 | 1)
    clock.refresh()
    assert line(page(clock, 0)) == line(page(clock, 1))
    assert page(clock, 1).flags & TSC_STABLE_BIT


def test_one_publish_serves_it_too() -> None:
    """Each operation after that moves both pages to one new line."""
    backend = SimulatedBackend(HZ)
    clock = clock_of(backend)
    clock.add_vcpu()
    clock.write_msr(1, SYSTEM_TIME, 0x1020 | 1)
    operations: list[Callable[[], object]] = [clock.refresh, partial(clock.dilate, 3, 2), partial(clock.slew, 1000)]
    operations.append(partial(clock.skip, 7))
    for operation in operations:
        backend.advance(ns=10**8)
        versions = [page(clock, vcpu).version for vcpu in range(2)]
        operation()
        assert line(page(clock, 0)) == line(page(clock, 1))
        assert all(page(clock, vcpu).version > versions[vcpu] for vcpu in range(2))


def test_present_ones_that_disagree_stay_so() -> None:
    """It is as vCPU 0; STABLE comes back by the repair, which includes it."""
    backend = SimulatedBackend(HZ, tsc=1000)
    clock = clock_of(backend, vcpus=4, present=2)
    clock.write_msr(1, TSC, 1 << 40)
    clock.add_vcpu()
    clock.refresh()
    assert not page(clock, 0).flags & TSC_STABLE_BIT
    assert clock.tsc(2).offset == clock.tsc(0).offset != clock.tsc(1).offset
    assert [write.vcpu for write in clock.repair_tsc()] == [0, 2]
    assert len(set(backend.tsc_offsets.values())) == 1
    assert page(clock, 0).flags & TSC_STABLE_BIT


def test_one_that_is_not_there_has_no_tsc_to_write() -> None:
    """Neither guest nor VMM can set it before add_vcpu(); it reads as vCPU 0's."""
    clock = clock_of(SimulatedBackend(HZ))
    for write in (clock.write_msr, clock.host_write_msr):
        with pytest.raises(StateError, match="vCPU 1 is not there yet"):
            write(1, TSC, 5)
    assert clock.tsc(1).offset == clock.tsc(0).offset


def test_no_more_than_were_declared() -> None:
    """A StateError, with nothing changed."""
    clock = clock_of(SimulatedBackend(HZ), vcpus=2)
    clock.add_vcpu()
    with pytest.raises(StateError, match="all 2 vCPUs are there"):
        clock.add_vcpu()
    assert clock.vcpus_present == 2


@pytest.mark.parametrize("present", [0, 4, -1])
def test_how_many_can_be_there(present: int) -> None:
    """One or more, and no more than the clock has."""
    with pytest.raises(ConfigError, match="of 3 vCPUs 1 to 3 can be there"):
        clock_of(SimulatedBackend(HZ), present=present)


def test_a_host_that_refuses_the_offset() -> None:
    """TscOffsetNotHonoured, and the vCPU is not there; one whose offset is 0 comes on such a host, too."""
    refusing = SimulatedBackend(HZ, honours_tsc_offset=False)
    clock = clock_of(refusing)
    assert clock.add_vcpu() == 1

    backend = SimulatedBackend(HZ)
    clock = clock_of(backend)
    clock.write_msr(0, TSC, 1 << 40)
    backend._honours_tsc_offset = False
    with pytest.raises(TscOffsetNotHonoured):
        clock.add_vcpu()
    assert clock.vcpus_present == 1
    assert 1 not in backend.tsc_offsets


@pytest.mark.parametrize("is_resumed", [True, False], ids=["resumed", "still stopped"])
def test_after_a_restore(is_resumed: bool) -> None:
    """The restored clock has those that the VMM says are there; another goes on from vCPU 0's saved TSC."""
    backend = SimulatedBackend(HZ, tsc=5000)
    clock = clock_of(backend)
    clock.write_msr(0, TSC_ADJUST, 1 << 35)
    clock.pause()
    state, saved_tsc = clock.save(), clock.guest_tsc(0, backend.tsc)

    host = SimulatedBackend(HZ, tsc=10**12)
    memory = GuestMemory(bytearray(1 << 16))
    restored = GuestClock.restore(state, memory, backend=host, vcpus_present=1)
    assert (restored.vcpus, restored.vcpus_present) == (3, 1)
    if is_resumed:
        restored.resume("freeze")
    restored.add_vcpu()
    if not is_resumed:
        assert restored.guest_tsc(1, host.tsc) == saved_tsc
        restored.resume("freeze")
    assert set(host.tsc_offsets) == {0, 1}
    assert host.tsc_offsets[0] == host.tsc_offsets[1]
    assert restored.guest_tsc(1, host.tsc) == restored.guest_tsc(0, host.tsc) == saved_tsc
    assert restored.tsc(1).adjust == 1 << 35


def test_the_state_has_all_that_are_declared() -> None:
    """So that it goes back into a clock of as many; those that were not there are as vCPU 0 was."""
    backend = SimulatedBackend(HZ, tsc=5000)
    clock = clock_of(backend)
    clock.write_msr(0, TSC, 1 << 41)
    state = clock.save()
    assert len(state.vcpus) == 3
    assert {(vcpu.tsc_offset, vcpu.tsc_adjust) for vcpu in state.vcpus} == {
        (state.vcpus[0].tsc_offset, state.vcpus[0].tsc_adjust)
    }
    assert [vcpu.time_page_gpa for vcpu in state.vcpus] == [0x1000, None, None]


def test_a_step_of_the_hosts_tsc_leaves_it_out() -> None:
    """The TSCs of those that are there go on, no other offset reaches the host, and a late one is in step again."""
    backend = SimulatedBackend(HZ, tsc=10**12)
    clock = clock_of(backend, present=2)
    backend.advance(ns=10**9)
    before = clock.guest_tsc(0, backend.tsc)
    backend.tsc -= 10**11
    clock.tick()
    assert set(backend.tsc_offsets) == {0, 1}
    clock.add_vcpu()
    assert len(set(backend.tsc_offsets.values())) == 1
    assert clock.guest_tsc(2, backend.tsc) - before <= HZ


def test_a_rate_is_one_for_all() -> None:
    """Dilated before and after, all vCPUs that are there read one clock."""
    backend = SimulatedBackend(HZ)
    clock = clock_of(backend)
    clock.dilate(1, 10)
    backend.advance(ns=10**9)
    clock.add_vcpu()
    clock.write_msr(1, SYSTEM_TIME, 0x1020 | 1)
    backend.advance(ns=10**9)
    assert clock.read(0) == clock.read(1)
    assert abs(Fraction(clock.read(1)) - 2 * 10**8) <= 2


def test_a_vcpu_number_beyond_the_clock() -> None:
    """RangeError, as ever: that one will never be there."""
    with pytest.raises(RangeError):
        clock_of(SimulatedBackend(HZ)).host_write_msr(3, TSC, 5)


def test_a_late_vcpu_of_a_restored_clock_follows_what_was_written() -> None:
    """vCPU 0's TSC was written after the restore and before the resume: the late one starts there, too."""
    saved = clock_of(SimulatedBackend(HZ, tsc=5000))
    saved.pause()
    host = SimulatedBackend(HZ, tsc=10**12)
    restored = GuestClock.restore(saved.save(), GuestMemory(bytearray(1 << 16)), backend=host, vcpus_present=1)
    restored.host_write_msr(0, TSC, 1 << 44)
    restored.add_vcpu()
    assert restored.guest_tsc(1, host.tsc) == restored.guest_tsc(0, host.tsc) == 1 << 44
    restored.resume("freeze")
    assert host.tsc_offsets[0] == host.tsc_offsets[1]


@pytest.mark.row("E5", "K-27")
def test_a_late_vcpu_is_told_of_its_stolen_time() -> None:
    """As the others: from its own thread's account, which begins with it."""
    backend, memory = SimulatedBackend(HZ), GuestMemory(bytearray(1 << 16))
    clock = GuestClock(memory, 2, backend=backend, vcpus_present=1)
    clock.tick()
    clock.add_vcpu()
    clock.write_msr(1, 0x4B564D03, 0x6000 | 1)
    backend.run_delays_ns = {0: 900, 1: 50}
    clock.tick()
    assert int.from_bytes(memory.read(0x6000, 8), "little") == 50
