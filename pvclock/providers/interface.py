"""What a paravirtual interface is to the clock, and what the clock and the VMM are to it.

A provider is one guest-visible surface: CPUID leaves, MSRs, hypercalls and what they put into guest memory.  It knows
no other provider and no host clock; it asks the clock, through `ClockServices`, for what its guest asked of it, and
the VMM, through `VmmServices`, for what only that can do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from enum import StrEnum
from typing import NamedTuple, Protocol, TypeAlias

from pvclock._memory import GuestMemory
from pvclock.msr_ranges import MsrRange
from pvclock.quantities import Gpa, GuestTsc
from pvclock.timekeeping.events import EventKind

__all__ = [
    "ClockServices",
    "CpuidLeaf",
    "Engine",
    "HypercallRegisters",
    "HypercallResult",
    "MsrValue",
    "Pairing",
    "Provider",
    "Status",
    "VmmServices",
]


MsrValue: TypeAlias = int | bool | str | tuple[int, ...] | None


class CpuidLeaf(NamedTuple):
    """The four registers that CPUID returns, 32 bits each."""

    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0


class Engine(StrEnum):
    """Who runs the guest, and so what can be served at all."""

    LIBRARY = "library"
    """A VMM that emulates CPUs, or traps all that it wants: every surface."""
    KVM = "kvm"
    """vCPUs on /dev/kvm: what the MSR filter routes here, beside what the kernel serves."""


class Status(StrEnum):
    """What became of a hypercall or another request: VirtualBox's vocabulary (VERR_GIM_*), one word each."""

    SUCCESS = "success"
    DEFERRED = "deferred"
    """To be done by the VMM proper, not where it was asked for (VINF_GIM_R3_HYPERCALL)."""
    CONTINUING = "continuing"
    """Not done yet: the guest repeats the instruction (VINF_GIM_HYPERCALL_CONTINUING)."""
    ACCESS_DENIED = "access denied"
    NOT_ENABLED = "not enabled"
    NOT_AVAILABLE = "not available"
    MEMORY_READ_FAILED = "memory read failed"
    MEMORY_WRITE_FAILED = "memory write failed"
    INVALID_INSTRUCTION = "invalid hypercall instruction"
    NOT_SUPPORTED = "not supported"
    OPERATION_FAILED = "operation failed"
    DEVICE_NOT_REGISTERED = "device not registered"
    NO_DEBUG_CONNECTION = "no debug connection"
    NO_DATA = "no data"
    """Of the debug channel (VERR_NO_DATA)."""


class HypercallRegisters(NamedTuple):
    """A vCPU's registers at a hypercall, 64 bits each; long_mode: is it in 64-bit code?"""

    rax: int
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    cpl: int = 0
    long_mode: bool = True


class HypercallResult(NamedTuple):
    """What became of a hypercall, and the RAX that the guest gets; None leaves it as it is."""

    status: Status
    rax: int | None = None


class Pairing(NamedTuple):
    """One instant as UTC (ns since 1970) and as a vCPU's TSC."""

    real_ns: int
    guest_tsc: GuestTsc


class VmmServices(Protocol):
    """What hypercalls ask of the VMM; APIC ids are the guest's, whatever it says."""

    def kick(self, apic_id: int) -> None:
        """Wake a vCPU from its halt; an id that nobody has is ignored."""

    def yield_to(self, apic_id: int) -> None:
        """Let that vCPU run rather than the caller."""

    def send_ipi(self, apic_ids: list[int], icr: int) -> int:
        """Deliver what ICR's low half says to those vCPUs; how many took it."""


class ClockServices(Protocol):
    """What a provider may ask of its clock.  Nothing here faults: bad addresses are ignored, as Linux does."""

    @property
    def memory(self) -> GuestMemory:
        """The guest's."""

    @property
    def engine(self) -> Engine:
        """Who runs the guest."""

    @property
    def vmm(self) -> VmmServices | None:
        """What the VMM does for hypercalls; None if it does nothing."""

    @property
    def kernel_features(self) -> int:
        """KVM feature bits that the host's kernel can offer by itself."""

    @property
    def tsc_hz(self) -> int:
        """The guest's TSC frequency."""

    def place_time_page(
        self, vcpu: int, gpa: Gpa | None, begin: Callable[[], object] = ..., undo: Callable[[], object] = ...
    ) -> None:
        """Keep vCPU's pvclock page at `gpa` (None: nowhere) from now on, and publish.

        begin: what changes with it, before the publish; undo: takes that back where it could not be.
        """

    def place_time_pages(
        self,
        pages: Mapping[int, Gpa | None],
        begin: Callable[[], object],
        undo: Callable[[], object],
        vcpu: int | None = None,
    ) -> None:
        """As place_time_page(), of several vCPUs in one step, which is whole before anybody is told.

        vcpu: one that is out of the guest, the caller's own.
        """

    def keep_time_page(self, vcpu: int, begin: Callable[[], object], undo: Callable[[], object]) -> None:
        """As place_time_page(), with vCPU's page where it is."""

    def write_wall_clock(self, gpa: Gpa, taking: Callable[[], object] = ...) -> None:
        """Write the time of day of guest time 0 into the wall-clock record at `gpa`, once.

        taking: sets what changes with it, when nothing can fail any more.
        """

    def utc_ns(self) -> int:
        """UTC at this instant, in ns since 1970."""

    def quiesce(self, vcpu: int | None) -> AbstractContextManager[None]:
        """Keep all vCPUs out of the guest meanwhile; `vcpu`, the caller's own, is out already."""

    def tell(self, kind: EventKind, why: str) -> None:
        """Let the VMM know, as an event that leaves guest time alone; who calls bounds what a guest can cause."""

    def pairing(self, vcpu: int) -> Pairing | None:
        """One host instant as UTC and as vCPU's TSC; None where the host's TSC is not to be trusted."""


class Provider(Protocol):
    """One guest-visible interface."""

    name: str
    number: int
    """Its id in VirtualBox's saved units: 0 None, 1 Minimal, 2 HyperV, 3 KVM."""
    version: int
    """Of what save() gives; a provider reads all that were ever written."""
    msr_ranges: tuple[MsrRange, ...]
    """What must come to it where vCPUs run on /dev/kvm, offered or not, and what of that the kernel keeps."""
    clock: ClockServices

    @property
    def config(self) -> Mapping[str, int | bool | str]:
        """The options that make another one like it."""

    @property
    def cpuid_leaves(self) -> Mapping[int, CpuidLeaf]:
        """The hypervisor CPUID leaves that it offers."""

    @property
    def allows_stable(self) -> bool:
        """May pages say TSC_STABLE if the TSCs are?"""

    @property
    def publishes_time(self) -> bool:
        """Has the guest a clock by this interface, or nothing but its TSC?"""

    @property
    def refreshes_pages(self) -> bool:
        """Are pages brought up to date beside what the guest and the VMM do?"""

    @property
    def tells_of_pauses(self) -> bool:
        """Do guests hear that they were stopped?"""

    def read_msr(self, vcpu: int, index: int) -> int:
        """RDMSR by the guest: the 64-bit value, or MsrFault."""

    def write_msr(self, vcpu: int, index: int, value: int) -> None:
        """WRMSR by the guest; MsrFault is #GP."""

    def hypercall(self, vcpu: int, registers: HypercallRegisters) -> HypercallResult:
        """The guest's VMCALL or VMMCALL."""

    def reset(self) -> None:
        """The VM is reset: as nothing had been written, with every page taken back."""

    def save(self) -> Mapping[str, MsrValue]:
        """What the guest wrote, by name."""

    def load(self, msrs: Mapping[str, object]) -> None:
        """Take what save() gave, without doing anything again; ConfigError, and nothing taken, if it is not that."""
