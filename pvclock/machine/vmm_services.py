"""What a machine does for its guest's clock interface: wakes and interrupts vCPUs, and resets itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from pvclock.guest_layout import LOCAL_APIC
from pvclock.kvm import Runner, Vcpu, Vm
from pvclock.timekeeping.travel import MP_STATE_HALTED

__all__ = ["MachineServices"]

MP_STATE_RUNNABLE: Final = 0

APIC_ID_SHIFT: Final = 12
"""Where an MSI's address has the destination, a physical APIC id."""
APIC_IDS_END: Final = 0xFF
"""As ids are 8 bits there, and this one is all vCPUs."""

ICR_TO_MSI: Final = 0xC7FF
"""An interrupt in ICR's low half, at the same places as in an MSI's data: vector, delivery mode, level, trigger."""


class MachineServices:
    """VmmServices, InterruptServices and ResetServices of a machine with in-kernel local APICs.

    A vCPU's number is its APIC id.  reset: called by request_reset(), returns at once.
    Thread-safety: all methods may be called from any thread.
    """

    def __init__(self, vm: Vm, vcpus: list[Vcpu], runner: Runner, reset: Callable[[], object]) -> None:
        self._vm = vm
        self._vcpus = vcpus
        self._runner = runner
        self.request_reset = reset
        """See ResetServices."""

    def kick(self, apic_id: int) -> None:
        """See VmmServices: KVM lets the state of a vCPU be changed while it is out of the guest."""
        if not 0 <= apic_id < len(self._vcpus):
            return
        with self._runner.quiesce():
            vcpu = self._vcpus[apic_id]
            if vcpu.get_mp_state() == MP_STATE_HALTED:
                vcpu.set_mp_state(MP_STATE_RUNNABLE)

    def yield_to(self, _apic_id: int) -> None:
        """See VmmServices: the host's scheduler knows best which of its threads waits."""
        os.sched_yield()

    def send_ipi(self, apic_ids: list[int], icr: int) -> int:
        """See VmmServices."""
        return sum(self._signal(apic_id, icr & ICR_TO_MSI) for apic_id in apic_ids)

    def inject(self, vcpu: int, vector: int) -> None:
        """See InterruptServices.  A local APIC that the guest has not enabled takes none."""
        self._signal(vcpu, vector)

    def _signal(self, apic_id: int, data: int) -> bool:
        if not 0 <= apic_id < min(len(self._vcpus), APIC_IDS_END):
            return False
        return self._vm.signal_msi(LOCAL_APIC | apic_id << APIC_ID_SHIFT, data)
