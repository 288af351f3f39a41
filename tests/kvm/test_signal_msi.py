"""KVM_SIGNAL_MSI: a guest takes the interrupt that its VMM raises, on the vCPU that it is for."""

from __future__ import annotations

import time

import pytest

from pvclock import Machine
from pvclock.errors import KvmError, RangeError
from pvclock.guest_layout import LOCAL_APIC
from pvclock.kvm import Kvm
from pvclock.machine import EXIT_PORT
from tests.kvm.guests import out
from tests.kvm.interrupt_guests import COUNT, READY, SET_READY, counting, unless_count
from tests.waiting import HANG_S

pytestmark = [pytest.mark.kvm, pytest.mark.row("E13")]

VECTOR = 0x41


def test_a_guest_takes_the_interrupt() -> None:
    """True for each that its APIC takes, False before the guest has enabled that; the guest counts them all."""
    image = counting(VECTOR, SET_READY, unless_count(3, out(EXIT_PORT, 7)))
    with Machine(image) as machine:
        assert not machine.vm.signal_msi(LOCAL_APIC, VECTOR)
        machine.start()
        taken, deadline = 0, time.monotonic() + HANG_S
        while taken < 3 and time.monotonic() < deadline:
            seen = machine.memory.read(COUNT, 4)[0]
            is_ready = machine.memory.read(READY, 1)[0] == 1
            if is_ready and seen >= taken:  # an emulated KVM may take one twice
                assert machine.vm.signal_msi(LOCAL_APIC, VECTOR)
                taken += 1
        assert machine.wait(HANG_S) == 7
        assert machine.memory.read(COUNT, 4) == bytes((3, 0, 0, 0))


def test_an_interrupt_for_nobody() -> None:
    """An APIC id that no vCPU has takes none; without an irqchip it is an error, and so is what no address can be."""
    with Kvm() as kvm, kvm.create_vm() as vm:
        with pytest.raises(KvmError, match="KVM_SIGNAL_MSI"):
            vm.signal_msi(LOCAL_APIC, VECTOR)
        vm.create_irqchip()
        with vm.create_vcpu(0):
            assert not vm.signal_msi(LOCAL_APIC | 5 << 12, VECTOR)
            assert not vm.signal_msi(LOCAL_APIC, VECTOR)
            for address, data in ((-1, 0), (2**64, 0), (0, -1), (0, 2**32)):
                with pytest.raises(RangeError):
                    vm.signal_msi(address, data)
