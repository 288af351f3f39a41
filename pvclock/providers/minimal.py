"""The frequencies and nothing else: the leaf by which macOS and others find them, without calibrating.

Source: VMware's timing-information leaf, as VirtualBox's "Minimal" provider shows it.
"""

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
from pvclock.providers.timing import APIC_BUS_HZ, timing_leaf, with_timing_leaf

__all__ = ["MinimalProvider"]


class MinimalProvider:
    """Leaf 0x40000010 says the frequencies of TSC and APIC bus (`apic_bus_hz`; QEMU's and KVM's is 1 GHz); no MSR."""

    name = "Minimal"
    number = 1
    version = 1
    msr_ranges: tuple[MsrRange, ...] = ()
    allows_stable = publishes_time = False
    refreshes_pages = tells_of_pauses = True

    def __init__(self, clock: ClockServices, vcpus: int, *, apic_bus_hz: int = APIC_BUS_HZ) -> None:
        self.clock = clock
        self.config: Mapping[str, int | bool | str] = {"apic_bus_hz": apic_bus_hz}
        self.cpuid_leaves: Mapping[int, CpuidLeaf] = with_timing_leaf({}, timing_leaf(clock.tsc_hz, apic_bus_hz))

    def read_msr(self, vcpu: int, index: int) -> int:
        """Faults."""
        raise MsrFault(index)

    def write_msr(self, vcpu: int, index: int, value: int) -> None:
        """Faults."""
        raise MsrFault(index, value)

    def hypercall(self, vcpu: int, registers: HypercallRegisters) -> HypercallResult:
        """There are none."""
        return HypercallResult(Status.NOT_AVAILABLE)

    def reset(self) -> None:
        """Nothing was written."""

    def save(self) -> Mapping[str, MsrValue]:
        """Nothing was written."""
        return {}

    def load(self, msrs: Mapping[str, object]) -> None:
        """There is nothing to take."""
        if msrs:
            raise ConfigError(f"provider 'Minimal' saves no MSRs, and these were found: {', '.join(msrs)}")
