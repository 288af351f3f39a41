"""Steal time: how long a vCPU was runnable without running, and whether it is running now.

Source: record_steal_time(), kvm_steal_time_set_preempted(); Documentation/virt/kvm/x86/msr.rst.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from pvclock._memory import GuestMemory
from pvclock._records import (
    STEAL_TIME_BYTES,
    VCPU_FLUSH_TLB,
    add_steal_time,
    clear_preempted,
    record_steal_time,
    set_preempted,
)
from pvclock.errors import MsrFault, RangeError
from pvclock.providers.kvm.features import MSR_KVM_STEAL_TIME
from pvclock.providers.kvm.msr_state import Msr, Register
from pvclock.providers.kvm.profiles import Profile
from pvclock.quantities import U64_MASK

__all__ = ["StealTime"]

ENABLED: Final = 1
RESERVED: Final = 0x3E
ADDRESS: Final = U64_MASK & ~0x3F


class StealTime:
    """Each vCPU's record.  serves_flush: can the guest request a TLB flush in it?"""

    def __init__(self, memory: GuestMemory, vcpus: int, profile: Profile, *, serves_flush: bool) -> None:
        self._memory, self._profile, self._serves_flush = memory, profile, serves_flush
        self._where = Register("steal_time", vcpus, legal=lambda value: not value & RESERVED)
        self._said = bytearray(vcpus)  # bits of `preempted` bytes that were cleared, until the VMM gets them
        self.msrs = {MSR_KVM_STEAL_TIME: Msr(self._where, self._write)}
        self.registers = (self._where,)

    def add(self, vcpu: int, ns: int) -> bool:
        """See KvmProvider.add_steal_time()."""
        if not 0 <= ns <= U64_MASK:
            raise RangeError(f"steal time of {ns} ns; it must be in [0, 2^64)")
        where = self._where[vcpu]
        if where & ENABLED:
            record_steal_time(self._memory, where & ADDRESS, ns, self._said, vcpu)
        return self._take_flush(vcpu)

    def addition(self, vcpu: int, ns: int) -> Callable[[], None]:
        """See Hooks.run_delay; `preempted` is left alone, because vCPU may be out of the guest."""
        where = self._where[vcpu]
        if not where & ENABLED or not ns:
            return nothing_to_add
        return partial(add_steal_time, self._memory, where & ADDRESS, ns)

    def set_preempted(self, vcpu: int, preempted: bool) -> bool:
        """See KvmProvider.set_preempted()."""
        where = self._where[vcpu]
        if preempted:
            if where & ENABLED:
                set_preempted(self._memory, where & ADDRESS)
            return False
        if where & ENABLED:
            clear_preempted(self._memory, where & ADDRESS, self._said, vcpu)
        return self._take_flush(vcpu)

    def _take_flush(self, vcpu: int) -> bool:
        """True if the guest requested a flush that the VMM does not know of: now, or at a call that on_dirty broke."""
        said, self._said[vcpu] = self._said[vcpu], 0
        return self._serves_flush and bool(said & VCPU_FLUSH_TLB)

    def _write(self, vcpu: int, index: int, value: int) -> None:
        if value & RESERVED:
            raise MsrFault(index, value, "bits 1 to 5 are reserved")
        is_in_memory = self._memory.contains(value & ADDRESS, STEAL_TIME_BYTES)
        if self._profile.steal_time_must_be_good and value & ENABLED and not is_in_memory:
            raise MsrFault(index, value, f"there are no {STEAL_TIME_BYTES} bytes of memory")
        if value & ENABLED and is_in_memory:
            # The record has to be valid before the guest's next instruction.
            record_steal_time(self._memory, value & ADDRESS, 0, self._said, vcpu)
        self._where[vcpu] = value


def nothing_to_add() -> None:
    """For a vCPU without a record, or without a delay."""
