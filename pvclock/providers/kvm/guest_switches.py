"""The guest's two switches: may the host poll for a halted vCPU, and may the VM be migrated?

Source: kvm_set_msr_common() for MSR_KVM_POLL_CONTROL; Documentation/virt/kvm/x86/msr.rst.  Linux leaves migration
control to user space, which is this file.
"""

from __future__ import annotations

from typing import Final

from pvclock.errors import MsrFault
from pvclock.providers.kvm.features import MSR_KVM_MIGRATION_CONTROL, MSR_KVM_POLL_CONTROL
from pvclock.providers.kvm.msr_state import Msr, Register

__all__ = ["GuestSwitches"]

ON: Final = 1


class GuestSwitches:
    """Poll control of each vCPU, migration control of the VM; on at reset."""

    def __init__(self, vcpus: int) -> None:
        self.poll = Register("poll_control", vcpus, initial=ON, legal=lambda value: value <= ON)
        self.migration = Register("migration_control", None, initial=ON, legal=lambda value: value <= ON)
        self.msrs = {
            MSR_KVM_POLL_CONTROL: Msr(self.poll, self._write_poll),
            MSR_KVM_MIGRATION_CONTROL: Msr(self.migration, self._write_migration),
        }
        self.registers = (self.poll, self.migration)

    def _write_poll(self, vcpu: int, index: int, value: int) -> None:
        _check(index, value)
        self.poll[vcpu] = value

    def _write_migration(self, vcpu: int, index: int, value: int) -> None:
        _check(index, value)
        self.migration[vcpu] = value


def _check(index: int, value: int) -> None:
    if value > ON:
        raise MsrFault(index, value, "bits 1 to 63 are reserved")
