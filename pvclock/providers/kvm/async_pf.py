"""Asynchronous page faults: while a page is brought in, the guest runs another task, and is notified when it is ready.

The VMM resolves faults and injects the events; this is the guest's side: three MSRs and two words.
Source: kvm_pv_enable_async_pf(), kvm_can_deliver_async_pf(), kvm_arch_async_page_present(); msr.rst.
"""

from __future__ import annotations

from typing import Final

from pvclock._memory import GuestMemory
from pvclock._records import ASYNC_PF_BYTES, PAGE_NOT_PRESENT, PAGE_READY, load_word, store_word
from pvclock.errors import MsrFault, RangeError
from pvclock.providers.kvm.features import (
    MSR_KVM_ASYNC_PF_ACK,
    MSR_KVM_ASYNC_PF_EN,
    MSR_KVM_ASYNC_PF_INT,
    KvmFeature,
)
from pvclock.providers.kvm.msr_state import Msr, Register
from pvclock.providers.kvm.profiles import Profile
from pvclock.quantities import U64_MASK

__all__ = ["WAKE_ALL", "AsyncPf"]

WAKE_ALL: Final = 0xFFFFFFFF
"""The token that wakes all waiting tasks."""

ENABLED: Final = 1 << 0
SEND_ALWAYS: Final = 1 << 1
DELIVERY_AS_PF_VMEXIT: Final = 1 << 2
DELIVERY_AS_INT: Final = 1 << 3
RESERVED: Final = 0x30
ADDRESS: Final = U64_MASK & ~0x3F
TOKEN: Final = 4  # offset of the second word
VECTOR: Final = 0xFF
ACK: Final = 1


class AsyncPf:
    """Each vCPU's MSRs and its two words.  features: the MSR bits that are not reserved depend on them."""

    def __init__(self, memory: GuestMemory, vcpus: int, profile: Profile, features: KvmFeature) -> None:
        self._memory, self._profile = memory, profile
        self._reserved = RESERVED
        if KvmFeature.ASYNC_PF_VMEXIT not in features:
            self._reserved |= DELIVERY_AS_PF_VMEXIT
        if KvmFeature.ASYNC_PF_INT not in features or profile.page_ready_by_fault:
            self._reserved |= DELIVERY_AS_INT
        self._needed = ENABLED if profile.page_ready_by_fault else ENABLED | DELIVERY_AS_INT
        self._enable = Register("async_pf", vcpus, legal=lambda value: not value & self._reserved)
        self._interrupt = Register("async_pf_interrupt", vcpus, legal=lambda value: value <= VECTOR)
        self._unacknowledged = Register("async_pf_unacknowledged", vcpus, legal=lambda value: value <= 1)
        self.msrs = {
            MSR_KVM_ASYNC_PF_EN: Msr(self._enable, self._write_enable),
            MSR_KVM_ASYNC_PF_INT: Msr(self._interrupt, self._write_interrupt),
            MSR_KVM_ASYNC_PF_ACK: Msr(None, self._write_ack),
        }
        self.registers = (self._enable, self._interrupt, self._unacknowledged)

    def inject_not_present(self, vcpu: int, token: int, cpl: int, *, in_l2: bool) -> bool:
        """See KvmProvider.inject_not_present()."""
        _check_token(token)
        enable = self._enable[vcpu]
        if not self.is_enabled(vcpu) or (cpl == 0 and not enable & SEND_ALWAYS):
            return False
        if in_l2 and not enable & DELIVERY_AS_PF_VMEXIT:
            return False
        if self._profile.page_ready_by_fault and self._word(vcpu, 0) != 0:
            return False
        return store_word(self._memory, enable & ADDRESS, PAGE_NOT_PRESENT)

    def page_ready(self, vcpu: int, token: int) -> bool:
        """See KvmProvider.page_ready()."""
        if token != WAKE_ALL:
            _check_token(token)
        by_fault = self._profile.page_ready_by_fault
        at, word = (0, PAGE_READY) if by_fault else (TOKEN, token)
        if not self.is_enabled(vcpu) or self._word(vcpu, at) != 0:
            return False
        before, self._unacknowledged[vcpu] = self._unacknowledged[vcpu], int(not by_fault)  # even if on_dirty raises
        if not store_word(self._memory, (self._enable[vcpu] & ADDRESS) + at, word):
            self._unacknowledged[vcpu] = before
            return False
        return True

    def is_enabled(self, vcpu: int) -> bool:
        """Are events delivered to vCPU at all?"""
        return self._enable[vcpu] & self._needed == self._needed

    def vector(self, vcpu: int) -> int:
        """The interrupt vector of page-ready events."""
        return self._interrupt[vcpu]

    def awaits_ack(self, vcpu: int) -> bool:
        """Is a page-ready event not acknowledged yet?"""
        return bool(self._unacknowledged[vcpu])

    def _word(self, vcpu: int, at: int) -> int | None:
        return load_word(self._memory, (self._enable[vcpu] & ADDRESS) + at)

    def _write_enable(self, vcpu: int, index: int, value: int) -> None:
        if value & self._reserved:
            raise MsrFault(index, value, f"bits {value & self._reserved:#x} are reserved or not offered")
        # Linux stores the value before it checks the memory: after that fault the MSR reads back the new value.
        self._enable[vcpu] = value
        if not self.is_enabled(vcpu):
            self._unacknowledged[vcpu] = 0
        elif not self._memory.contains(value & ADDRESS, ASYNC_PF_BYTES):
            raise MsrFault(index, value, f"there are no {ASYNC_PF_BYTES} bytes of memory")

    def _write_interrupt(self, vcpu: int, index: int, value: int) -> None:
        if value > VECTOR:
            raise MsrFault(index, value, "a vector has 8 bits")
        self._interrupt[vcpu] = value

    def _write_ack(self, vcpu: int, index: int, value: int) -> None:
        if value & ACK:
            self._unacknowledged[vcpu] = 0


def _check_token(token: int) -> None:
    if not 0 < token < WAKE_ALL:
        raise RangeError(f"page-fault token {token:#x}; it must be in [1, 2^32 - 2]")
