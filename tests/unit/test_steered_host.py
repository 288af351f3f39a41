"""A host whose KVM puts TSCs forward only: an offset is with KVM and in pages, or with neither, come what may."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, cast

import pytest

from pvclock import GuestClock, GuestMemory, HostTsc, TscOffsetNotHonoured, read_tsc
from pvclock.host.this_host import measured_tsc_hz
from pvclock.kvm import Runner, Vcpu
from pvclock.kvm.backend import SteeredTscBackend
from pvclock.timekeeping.events import EventKind
from tests import oracle
from tests.unit.clocks import NS_PER_S, PAGES, SYSTEM_TIME
from tests.unit.fault_points import product
from tests.unit.schedules import places_in
from tests.unit.test_interrupted_operations import interrupted

FAR_TICKS: Final = 3600 * 10**9
"""At any TSC frequency longer than these tests take."""


class KeepingVcpu:
    """Takes TSC offsets as KVM does, for a guest that reads this host's TSC."""

    offset = 0

    def get_tsc_khz(self) -> int:
        """The rate of this host's TSC: pages at another one would soon be ahead of it."""
        return measured_tsc_hz() // 1000

    def set_tsc_offset(self, offset: int) -> None:
        """Keep it."""
        self.offset = offset

    def run(self) -> None:
        """Nobody asks for it."""

    request_exit = run


class Vm:
    """Two vCPUs and a clock on such a host; its guest has registered both pages."""

    def __init__(self) -> None:
        self.vcpus = [KeepingVcpu(), KeepingVcpu()]
        vcpus = cast("list[Vcpu]", self.vcpus)
        self.backend = SteeredTscBackend(vcpus, Runner(vcpus, lambda *_: True))
        self.memory = GuestMemory(bytearray(1 << 16))
        self.clock = GuestClock(self.memory, 2, backend=self.backend, vcpu_host="kvm")
        for vcpu in range(2):
            self.clock.write_msr(vcpu, SYSTEM_TIME, PAGES[vcpu] | 1)

    def put_forward(self, vcpu: int = 0) -> None:
        """Put a vCPU's TSC far forward."""
        self.clock.host_write_msr(vcpu, 0x10, (self.clock.guest_tsc(vcpu, self.now) + FAR_TICKS) % 2**64)

    @property
    def now(self) -> HostTsc:
        """The host's TSC, which is kernel time."""
        return HostTsc(self.backend.counter.read())

    def offsets(self) -> list[int]:
        """The vCPUs' offsets as the clock has them, which KVM has, too; each guest reads the clock's time."""
        offsets = [self.clock.tsc(vcpu).offset for vcpu in range(2)]
        assert offsets == [self.backend.tsc_offset(vcpu) for vcpu in range(2)]
        for page, vcpu in zip(PAGES, self.vcpus, strict=True):
            reads = oracle.TimeInfo.parse(self.memory.read(page, 32)).read((read_tsc() + vcpu.offset) % 2**64)
            assert abs(reads - self.clock.now()) < NS_PER_S
        return offsets


def a_vm_apart() -> Vm:
    """vCPU 1's TSC is far ahead of vCPU 0's."""
    vm = Vm()
    vm.put_forward(1)
    return vm


def a_restored_vm() -> Vm:
    """Such a VM, whose clock was restored and is paused."""
    vm = a_vm_apart()
    vm.clock.pause()
    vm.clock = GuestClock.restore(vm.clock.save(), vm.memory, backend=vm.backend, vcpu_host="kvm")
    return vm


def put_forward(vm: Vm) -> None:
    """By the VMM."""
    vm.put_forward()


def guest_puts_forward(vm: Vm) -> None:
    """By the guest, whose IA32_TSC_ADJUST moves along."""
    vm.clock.write_msr(0, 0x3B, (vm.clock.read_msr(0, 0x3B) + FAR_TICKS) % 2**64)


def repair(vm: Vm) -> None:
    """vCPU 0 follows vCPU 1, which is ahead."""
    vm.clock.repair_tsc()


@pytest.mark.row("J-05", "E9", "E5")
@pytest.mark.parametrize("operate", [put_forward, guest_puts_forward, repair])
def test_an_interrupted_write_is_with_kvm_and_in_pages_or_with_neither(operate: Callable[[Vm], None]) -> None:
    """At whatever line an interrupt comes: what KVM does not take back stays in pages, with its ADJUST, and is told."""
    undisturbed, stayed = a_vm_apart(), 0
    for place in [*places_in(lambda: operate(undisturbed), product()), None]:
        vm = a_vm_apart()
        before, events = vm.offsets(), vm.clock.events.last
        if place is None:
            operate(vm)
        else:
            interrupted(lambda: operate(vm), place)  # noqa: B023  # called at once
        after = vm.offsets()
        told = [event for event in vm.clock.events.read(events).events if event.kind == EventKind.TSC]
        assert len(told) == (after != before)
        adjust = vm.clock.read_msr(0, 0x3B)
        assert adjust == (FAR_TICKS if after != before and operate is guest_puts_forward else 0)
        stayed += any("stays" in event.why for event in told)
    assert after != before
    assert stayed


@pytest.mark.row("E9", "E5")
def test_an_interrupted_resume_leaves_no_other_offset_than_kvms() -> None:
    """Resumed at last, a restored clock's guests read its time by the offsets that KVM has."""
    undisturbed, came = a_restored_vm(), 0
    for place in places_in(lambda: undisturbed.clock.resume("advance"), product(), 1):
        vm = a_restored_vm()
        came += interrupted(lambda: vm.clock.resume("advance"), place)  # noqa: B023  # called at once
        if vm.clock.is_paused:
            vm.clock.resume("advance")
        vm.offsets()
    undisturbed.offsets()
    assert came > 10


@pytest.mark.row("E9", "E5")
def test_a_write_that_one_vcpu_refuses_is_given_to_none() -> None:
    """A new clock whose offset puts vCPU 1 back is none, and the old one's vCPU 0 stays where it was."""
    vm = Vm()
    vm.put_forward(1)
    before, by_kvm = vm.offsets(), [vcpu.offset for vcpu in vm.vcpus]
    with pytest.raises(TscOffsetNotHonoured, match="forward only"):
        GuestClock(vm.memory, 2, backend=vm.backend, vcpu_host="kvm", tsc_offset=FAR_TICKS // 2)
    vm.clock.refresh()
    assert vm.offsets() == before
    assert [vcpu.offset for vcpu in vm.vcpus] == by_kvm
