"""Steal time: what a vCPU missed while it could have run, and whether it is running.

Source: record_steal_time(), kvm_steal_time_set_preempted(); Documentation/virt/kvm/x86/msr.rst.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from pvclock._memory import GuestMemory
from pvclock._records import STEAL_TIME_BYTES, VCPU_FLUSH_TLB, add_steal_time, clear_preempted, set_preempted
from pvclock.errors import MsrFault, RangeError
from pvclock.providers.kvm.features import MSR_KVM_STEAL_TIME
from pvclock.providers.kvm.profiles import Profile
from pvclock.providers.kvm.registers import Msr, Register
from pvclock.quantities import U64_MASK

__all__ = ["StealTime"]

ENABLED: Final = 1
RESERVED: Final = 0x3E
ADDRESS: Final = U64_MASK & ~0x3F


class StealTime:
    """Where each vCPU's record is, and what goes into it.  serves_flush: can the guest ask for a TLB flush in it?"""

    def __init__(self, memory: GuestMemory, vcpus: int, profile: Profile, *, serves_flush: bool) -> None:
        self._memory, self._profile, self._serves_flush = memory, profile, serves_flush
        self._where = Register("steal_time", vcpus, legal=lambda value: not value & RESERVED)
        self.msrs = {MSR_KVM_STEAL_TIME: Msr(self._where, self._write)}
        self.registers = (self._where,)

    def add(self, vcpu: int, ns: int) -> bool:
        """See KvmProvider.add_steal_time()."""
        if not 0 <= ns <= U64_MASK:
            raise RangeError(f"steal time of {ns} ns; it must be in [0, 2^64)")
        where = self._where[vcpu]
        return bool(where & ENABLED) and self._asks_for_flush(add_steal_time(self._memory, where & ADDRESS, ns))

    def addition(self, vcpu: int, ns: int) -> Callable[[], int | None]:
        """See KvmProvider.steal_time()."""
        where = self._where[vcpu]
        if not where & ENABLED or not ns:
            return nothing_to_add
        return partial(add_steal_time, self._memory, where & ADDRESS, ns)

    def set_preempted(self, vcpu: int, preempted: bool) -> bool:
        """See KvmProvider.set_preempted()."""
        where = self._where[vcpu]
        if not where & ENABLED:
            return False
        if preempted:
            set_preempted(self._memory, where & ADDRESS)
            return False
        return self._asks_for_flush(clear_preempted(self._memory, where & ADDRESS))

    def _asks_for_flush(self, was_preempted: int | None) -> bool:
        return self._serves_flush and bool((was_preempted or 0) & VCPU_FLUSH_TLB)

    def _write(self, vcpu: int, index: int, value: int) -> None:
        if value & RESERVED:
            raise MsrFault(index, value, "bits 1 to 5 are reserved")
        is_in_memory = self._memory.contains(value & ADDRESS, STEAL_TIME_BYTES)
        if self._profile.steal_time_must_be_good and value & ENABLED and not is_in_memory:
            raise MsrFault(index, value, f"there are no {STEAL_TIME_BYTES} bytes of memory")
        if value & ENABLED and is_in_memory:
            add_steal_time(self._memory, value & ADDRESS, 0)  # a valid record before the guest's next instruction
        self._where[vcpu] = value


def nothing_to_add() -> None:
    """There is no record, or nothing was stolen."""
