"""Paravirtual end of interrupt: one bit in guest memory that saves the guest's EOI an exit.

The VMM sets it at injection and collects it at the next exit; in between the guest may have tested and cleared it.
Source: kvm_lapic_set_pv_eoi(), apic_sync_pv_eoi_to_guest(), apic_sync_pv_eoi_from_guest().
"""

from __future__ import annotations

from typing import Final

from pvclock._memory import GuestMemory
from pvclock._records import offer_eoi, take_eoi
from pvclock.errors import MsrFault
from pvclock.providers.kvm.features import MSR_KVM_PV_EOI_EN
from pvclock.providers.kvm.msr_state import Msr, Register

__all__ = ["PvEoi"]

ENABLED: Final = 1
ALIGNMENT: Final = 4


def _is_legal(value: int) -> bool:
    return (value & ~ENABLED) % ALIGNMENT == 0


class PvEoi:
    """Each vCPU's EOI byte, and whether an offer is pending."""

    def __init__(self, memory: GuestMemory, vcpus: int) -> None:
        self._memory = memory
        self._where = Register("pv_eoi", vcpus, legal=_is_legal)
        # An address of its own, because the guest may move the byte while an offer is pending.
        self._offered = Register("pv_eoi_offered", vcpus, legal=lambda value: value == 0 or bool(value & ENABLED))
        self._ended = bytearray(vcpus)  # answers that did not reach the VMM because on_dirty raised
        self.msrs = {MSR_KVM_PV_EOI_EN: Msr(self._where, self._write)}
        self.registers = (self._where, self._offered)

    def offer(self, vcpu: int) -> bool:
        """See KvmProvider.offer_eoi()."""
        where, before = self._where[vcpu], self._offered[vcpu]
        if not where & ENABLED:
            return False
        self._offered[vcpu] = where  # first: the guest has the offer even if on_dirty raises
        if not offer_eoi(self._memory, where & ~ENABLED):
            self._offered[vcpu] = before
            return False
        return True

    def take(self, vcpu: int) -> bool:
        """See KvmProvider.take_eoi()."""
        offered, self._offered[vcpu] = self._offered[vcpu], 0
        if offered:
            take_eoi(self._memory, offered & ~ENABLED, self._ended, vcpu)
        ended, self._ended[vcpu] = self._ended[vcpu], 0
        return bool(ended)

    def _write(self, vcpu: int, index: int, value: int) -> None:
        if not _is_legal(value):
            raise MsrFault(index, value, f"the address must be {ALIGNMENT}-byte aligned")
        if value & ENABLED and not self._memory.contains(value & ~ENABLED, 1):
            raise MsrFault(index, value, "there is no memory")
        self._where[vcpu] = value
