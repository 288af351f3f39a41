"""A restored clock that was not resumed yet answers as what it was saved as, whatever fails on its way."""

from __future__ import annotations

from typing import Final

import pytest

from pvclock import GuestClock, GuestMemory, HostTsc, SimulatedBackend
from pvclock.errors import KvmError
from pvclock.state.clock_state import from_json, to_json
from pvclock.timekeeping.events import EventKind
from tests.unit.clocks import NS_PER_S, SYSTEM_TIME, guest_ns, guest_tsc, shown

HZ: Final = 2_000_000_000
BEGIN: Final = HostTsc(10**12)


class Failing(SimulatedBackend):
    """A host whose KVM says EIO once, when an offset is set for one vCPU."""

    failing: int | None = None

    def set_tsc_offset(self, vcpu: int, offset: int) -> None:
        """See Backend."""
        if vcpu == self.failing:
            self.failing = None
            raise KvmError("KVM_SET_DEVICE_ATTR TSC_OFFSET", 5)
        super().set_tsc_offset(vcpu, offset)


def saved(vcpus: int = 3) -> tuple[GuestClock, SimulatedBackend]:
    """A paused clock on another host, whose TSC is 10^12."""
    backend = SimulatedBackend(HZ, tsc=BEGIN, ref_ns=4 * 10**12, boot_id="one")
    clock = GuestClock(GuestMemory(bytearray(1 << 16)), vcpus, backend=backend)
    for vcpu in range(vcpus):
        clock.write_msr(vcpu, SYSTEM_TIME, 0x2001 + 64 * vcpu)
    clock.pause()
    return clock, backend


@pytest.mark.row("E1", "E5", "E9")
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_resume_that_fails_leaves_each_vcpu_its_saved_tsc(failing: int) -> None:
    """KVM's EIO for any of three vCPUs: paused as before, and the second resume() gives all of them 10^12."""
    source, _ = saved()
    state, backend = source.save(), Failing(HZ, tsc=77)
    clock = GuestClock.restore(state, source.memory, backend=backend)
    image, last = clock.memory.read(0, 1 << 16), clock.events.last
    backend.failing = failing
    with pytest.raises(KvmError):
        clock.resume()
    assert clock.is_paused
    assert (clock.memory.read(0, 1 << 16), clock.events.last) == (image, last)
    assert [clock.guest_tsc(vcpu, backend.tsc) for vcpu in range(3)] == [10**12] * 3
    assert clock.save().vcpus == state.vcpus
    backend.advance(ns=NS_PER_S)
    clock.resume()
    assert [guest_tsc(backend, vcpu) for vcpu in range(3)] == [10**12] * 3
    assert [shown(clock.memory, vcpu, 10**12) for vcpu in range(2)] == [1, 1]  # what the saved guest may have read
    resumed = [event for event in clock.events.read().events if event.kind is EventKind.RESUME]
    assert len(resumed) == 1


@pytest.mark.row("E1", "E9", "P-25")
def test_it_is_saved_as_it_was_saved() -> None:
    """Saved again on a host of another frequency, later: the old host's stamps with that host's own frequency."""
    source, _ = saved()
    state = source.save()
    backend = SimulatedBackend(3_000_000_000, tsc=77, ref_ns=5, realtime_ns=9)
    clock = GuestClock.restore(state, source.memory, backend=backend)
    backend.advance(ns=NS_PER_S)
    again = clock.save()
    assert (again.host.tsc, again.host.tsc_hz) == (BEGIN, HZ)
    assert again == state
    assert from_json(to_json(again)) == state


@pytest.mark.row("E1", "E9")
def test_it_gains_all_that_passed_though_it_was_saved_in_between() -> None:
    """Saved, restored, saved again unresumed and restored: time missed counts from the first pause."""
    source, backend = saved()
    backend.advance(ns=NS_PER_S)
    first = GuestClock.restore(source.save(), source.memory, backend=backend)
    backend.advance(ns=NS_PER_S)
    second = GuestClock.restore(first.save(), source.memory, backend=backend)
    assert second.resume("advance").step_ns == 2 * NS_PER_S
    assert [abs(guest_ns(backend, source.memory, vcpu) - 2 * NS_PER_S) <= 1 for vcpu in range(2)] == [True, True]


@pytest.mark.row("E1", "E5", "E9")
def test_a_tsc_that_steps_before_it_is_resumed() -> None:
    """The restoring host's TSC begins anew: the guest's TSCs stand as saved, and go on from there."""
    source, _ = saved()
    backend = SimulatedBackend(HZ, tsc=10**15, ref_ns=1, boot_id="two", realtime_ns=0)
    clock = GuestClock.restore(source.save(), source.memory, backend=backend)
    backend.tsc = HostTsc(5)
    clock.tick()
    assert [clock.guest_tsc(vcpu, backend.tsc) for vcpu in range(3)] == [10**12] * 3
    clock.resume("freeze")
    for passed_ns in (0, NS_PER_S):
        backend.advance(ns=passed_ns)
        assert [guest_tsc(backend, vcpu) for vcpu in range(3)] == [10**12 + passed_ns * HZ // NS_PER_S] * 3
        assert clock.now() == passed_ns
        assert [abs(guest_ns(backend, source.memory, vcpu) - passed_ns) <= 1 for vcpu in range(2)] == [True, True]
