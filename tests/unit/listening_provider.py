"""A provider that wants to be told of everything and answers everything its own way: what the contract allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pvclock import CpuidLeaf, MsrFault
from pvclock.msr_ranges import MsrRange
from pvclock.providers.hypercall_instructions import VMMCALL
from pvclock.providers.interface import (
    CPUID_BASE,
    ClockServices,
    DebugSetup,
    Hooks,
    HypercallRegisters,
    HypercallResult,
    MsrValue,
    Status,
)

__all__ = ["Listener"]


class Listener:
    """No guest of it exists; what it is told is kept in `told`."""

    name = "Listener"
    number = 99
    version = 1
    node_keys: Mapping[str, str] = {"Loudness": "loudness"}
    is_enabled = True
    config: Mapping[str, int | bool | str] = {}
    warnings: tuple[str, ...] = ("it listens", "to everything")
    cpuid_base = CPUID_BASE
    cpuid_leaves: Mapping[int, CpuidLeaf] = {CPUID_BASE: CpuidLeaf(CPUID_BASE)}
    guest_lives_by_tsc = shows_invariant_tsc = False
    msr_ranges: tuple[MsrRange, ...] = (MsrRange(0x40000000, 2, why="its own"),)
    hypercall_opcodes: tuple[bytes, ...] = (VMMCALL,)
    hypercall_port: int | None = None
    are_hypercalls_enabled = is_paravirt_tsc_enabled = refreshes_pages = True
    allows_stable = tells_of_pauses = False
    debug_setup: DebugSetup | None = DebugSetup(4096)

    def __init__(self, clock: ClockServices, vcpus: int) -> None:
        self.clock = clock
        self.told: list[tuple[object, ...]] = []
        self.hooks = Hooks(
            run_delay=lambda vcpu, ns: lambda: self.told.append(("run delay", vcpu, ns)),
            tick=lambda: self.told.append(("tick",)),
            time_changed=lambda is_paused: self.told.append(("time", is_paused)),
        )

    def take(self) -> list[tuple[object, ...]]:
        """What it was told since the last time."""
        told, self.told = self.told, []
        return told

    def own_page(self, vcpu: int) -> None:
        """Its guests have no pages."""

    def read_msr(self, vcpu: int, index: int) -> int:
        """Faults."""
        raise MsrFault(index)

    def write_msr(self, vcpu: int, index: int, value: int) -> None:
        """Faults."""
        raise MsrFault(index, value)

    def hypercall(self, vcpu: int, registers: HypercallRegisters) -> HypercallResult:
        """RAX and the vCPU's number."""
        return HypercallResult(Status.SUCCESS, registers.rax + vcpu)

    def update_paravirt_tsc(self) -> Status:
        """Kept."""
        self.told.append(("offsets",))
        return Status.SUCCESS

    def reset(self) -> None:
        """Kept."""
        self.told.append(("reset",))

    def save(self) -> Mapping[str, MsrValue]:
        """Nothing."""
        return {}

    def load(self, msrs: Mapping[str, object]) -> None:
        """Anything."""

    def save_unit(self) -> bytes:
        """A byte that is its own."""
        return b"\x07"

    def load_unit(self, part: bytes, begin: Callable[[], object], undo: Callable[[], object]) -> None:
        """Kept."""
        begin()
        self.told.append(("unit", part))
