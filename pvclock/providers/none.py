"""No paravirtual clock: the guest has its TSC and sees no hypervisor."""

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

__all__ = ["NoneProvider"]


class NoneProvider:
    """Offers nothing; every MSR faults."""

    name = "None"
    number = 0
    version = 1
    is_enabled = False
    config: Mapping[str, int | bool | str] = {}
    warnings: tuple[str, ...] = ()
    node_keys: Mapping[str, str] = {}
    cpuid_base = CPUID_BASE
    cpuid_leaves: Mapping[int, CpuidLeaf] = {}
    guest_lives_by_tsc = shows_invariant_tsc = True
    msr_ranges: tuple[MsrRange, ...] = ()
    hypercall_opcodes: tuple[bytes, ...] = ()
    hypercall_port: int | None = None
    are_hypercalls_enabled = allows_stable = is_paravirt_tsc_enabled = False
    refreshes_pages = tells_of_pauses = True
    hooks = Hooks()
    debug_setup: DebugSetup | None = None

    def __init__(self, clock: ClockServices, vcpus: int) -> None:
        self.clock = clock

    def read_msr(self, vcpu: int, index: int) -> int:
        """Faults."""
        raise MsrFault(index)

    def write_msr(self, vcpu: int, index: int, value: int) -> None:
        """Faults."""
        raise MsrFault(index, value)

    def hypercall(self, vcpu: int, registers: HypercallRegisters) -> HypercallResult:
        """#UD."""
        return HypercallResult(Status.NOT_ENABLED)

    def own_page(self, vcpu: int) -> None:
        """There are no pages."""

    def update_paravirt_tsc(self) -> Status:
        """There are no pages."""
        return Status.NOT_ENABLED

    def reset(self) -> None:
        """There is no state."""

    def save(self) -> Mapping[str, MsrValue]:
        """There is no state."""
        return {}

    def load(self, msrs: Mapping[str, object]) -> None:
        """Accepts no state."""
        if msrs:
            raise ConfigError(f"provider 'None' saves no MSRs, and these were found: {', '.join(msrs)}")

    def save_unit(self) -> bytes:
        """There is no state."""
        return b""

    def load_unit(self, part: bytes, begin: Callable[[], object], undo: Callable[[], object]) -> None:
        """Accepts no state."""
        if part:
            raise StateFileError("unit", f"{len(part)} bytes after the header", "none of provider 'None'")
        begin()
