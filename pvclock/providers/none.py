"""No paravirtual clock: the guest has its TSC and sees no hypervisor."""

from __future__ import annotations

from collections.abc import Mapping

from pvclock.errors import ConfigError, MsrFault
from pvclock.msr_ranges import MsrRange
from pvclock.providers.interface import (
    ClockServices,
    CpuidLeaf,
    HypercallRegisters,
    HypercallResult,
    MsrValue,
    Status,
)

__all__ = ["NoneProvider"]


class NoneProvider:
    """Offers nothing; every MSR faults."""

    name = "None"
    number = 0
    version = 1
    msr_ranges: tuple[MsrRange, ...] = ()
    config: Mapping[str, int | bool | str] = {}
    allows_stable = publishes_time = False
    refreshes_pages = tells_of_pauses = True
    cpuid_leaves: Mapping[int, CpuidLeaf] = {}

    def __init__(self, clock: ClockServices, vcpus: int) -> None:
        self.clock = clock

    def read_msr(self, vcpu: int, index: int) -> int:
        """Faults."""
        raise MsrFault(index)

    def write_msr(self, vcpu: int, index: int, value: int) -> None:
        """Faults."""
        raise MsrFault(index, value)

    def hypercall(self, vcpu: int, registers: HypercallRegisters) -> HypercallResult:
        """There is nobody to call."""
        return HypercallResult(Status.NOT_ENABLED)

    def reset(self) -> None:
        """Nothing was written."""

    def save(self) -> Mapping[str, MsrValue]:
        """Nothing was written."""
        return {}

    def load(self, msrs: Mapping[str, object]) -> None:
        """There is nothing to take."""
        if msrs:
            raise ConfigError(f"provider 'None' saves no MSRs, and these were found: {', '.join(msrs)}")
