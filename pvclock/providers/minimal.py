"""The frequencies and nothing else: macOS and others read them from a CPUID leaf instead of calibrating.

Source: VMware's timing-information leaf, as VirtualBox's "Minimal" provider shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pvclock.errors import ConfigError, MsrFault, StateFileError
from pvclock.msr_ranges import MsrRange
from pvclock.providers.interface import (
    CPUID_BASE,
    ClockServices,
    CpuidLeaf,
    DebugSetup,
    Hooks,
    HypercallRegisters,
    HypercallResult,
    MsrValue,
    Status,
)
from pvclock.providers.timing import APIC_BUS_HZ, timing_leaf, with_timing_leaf

__all__ = ["MinimalProvider"]


class MinimalProvider:
    """Leaf 0x40000010 holds the frequencies of TSC and APIC bus (`apic_bus_hz`; QEMU's and KVM's is 1 GHz); no MSR."""

    name = "Minimal"
    number = 1
    version = 1
    is_enabled = True
    warnings: tuple[str, ...] = ()
    node_keys: Mapping[str, str] = {}
    cpuid_base = CPUID_BASE
    guest_lives_by_tsc = shows_invariant_tsc = True
    msr_ranges: tuple[MsrRange, ...] = ()
    hypercall_opcodes: tuple[bytes, ...] = ()
    hypercall_port: int | None = None
    are_hypercalls_enabled = allows_stable = is_paravirt_tsc_enabled = False
    refreshes_pages = tells_of_pauses = True
    hooks = Hooks()
    debug_setup: DebugSetup | None = None

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
        """#UD."""
        return HypercallResult(Status.NOT_AVAILABLE)

    def own_page(self, vcpu: int) -> None:
        """There are no pages."""

    def update_paravirt_tsc(self) -> Status:
        """There are no pages."""
        return Status.NOT_AVAILABLE

    def reset(self) -> None:
        """There is no state."""

    def save(self) -> Mapping[str, MsrValue]:
        """There is no state."""
        return {}

    def load(self, msrs: Mapping[str, object]) -> None:
        """Accepts no state."""
        if msrs:
            raise ConfigError(f"provider 'Minimal' saves no MSRs, and these were found: {', '.join(msrs)}")

    def save_unit(self) -> bytes:
        """There is no state."""
        return b""

    def load_unit(self, part: bytes, begin: Callable[[], object], undo: Callable[[], object]) -> None:
        """Accepts no state."""
        if part:
            raise StateFileError("unit", f"{len(part)} bytes after the header", "none of provider 'Minimal'")
        begin()
