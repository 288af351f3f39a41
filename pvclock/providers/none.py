"""No paravirtual clock: the guest has its TSC and sees no hypervisor."""

from __future__ import annotations

from collections.abc import Mapping

from pvclock.errors import MsrFault
from pvclock.providers.interface import ClockServices, CpuidLeaf

__all__ = ["NoneProvider"]


class NoneProvider:
    """Offers nothing; every MSR faults."""

    name = "None"
    allows_stable = False
    cpuid_leaves: Mapping[int, CpuidLeaf] = {}

    def __init__(self, clock: ClockServices, vcpus: int) -> None:
        self.clock = clock

    def read_msr(self, vcpu: int, index: int) -> int:
        """Faults."""
        raise MsrFault(index)

    def write_msr(self, vcpu: int, index: int, value: int) -> None:
        """Faults."""
        raise MsrFault(index, value)
