"""The provider contract: what a paravirtual interface is to the clock, and what the clock and the VMM are to it.

A provider is one guest-visible surface: CPUID leaves, MSRs, hypercalls, and the records that these place in guest
memory.  It knows no other provider and no host clock: it asks the clock for what its guest requested
(`ClockServices`), and the VMM for what only the VMM can do (`VmmServices`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from enum import StrEnum
from typing import Final, NamedTuple, Protocol, TypeAlias, runtime_checkable

from pvclock._memory import GuestMemory
from pvclock._scale import ClockScale
from pvclock.msr_ranges import MsrRange
from pvclock.quantities import Gpa, GuestNs, GuestTsc
from pvclock.timekeeping.events import EventKind

__all__ = [
    "ApicServices",
    "CPUID_BASE",
    "ClockServices",
    "CpuidLeaf",
    "DebugLink",
    "DebugSetup",
    "VcpuHost",
    "Hooks",
    "HypercallRegisters",
    "HypercallResult",
    "InterruptServices",
    "MsrValue",
    "OwnPage",
    "Pairing",
    "Provider",
    "ReferenceTime",
    "ResetServices",
    "Status",
    "VmmServices",
]

CPUID_BASE: Final = 0x40000000
"""The first hypervisor CPUID leaf."""

MsrValue: TypeAlias = int | bool | str | tuple[int, ...] | None


class CpuidLeaf(NamedTuple):
    """The four registers that CPUID returns, 32 bits each."""

    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0


class VcpuHost(StrEnum):
    """What runs the guest, which decides what can be served."""

    EMULATOR = "emulator"
    """A VMM that emulates CPUs, or traps all that it wants: every surface."""
    KVM = "kvm"
    """vCPUs on /dev/kvm: what the MSR filter routes here, beside what the kernel serves."""


class Status(StrEnum):
    """Outcome of a hypercall or another request: VirtualBox's VERR_GIM_* codes."""

    SUCCESS = "success"
    DEFERRED = "deferred"
    """The VMM's main loop has to do it, not the exit handler (VINF_GIM_R3_HYPERCALL)."""
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
    """A vCPU's registers at a hypercall, 64 bits each.

    long_mode: does it execute 64-bit code?  protected_mode: False in real mode and in virtual-8086 mode.
    """

    rax: int
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    cpl: int = 0
    long_mode: bool = True
    r8: int = 0
    protected_mode: bool = True


class HypercallResult(NamedTuple):
    """Outcome of a hypercall, and the RAX and RDX that the guest gets; None leaves the register as it is.

    ACCESS_DENIED without a RAX gives the guest #UD.
    """

    status: Status
    rax: int | None = None
    rdx: int | None = None


class DebugLink(Protocol):
    """The guest's end of the debug channel; see DebugChannel."""

    def read(self, count_max: int) -> tuple[Status, bytes]:
        """Bytes for the guest."""

    def write(self, data: bytes) -> tuple[Status, int]:
        """Hand the guest's bytes to the VMM; returns how many it accepted."""


class DebugSetup(NamedTuple):
    """What a provider with a debug interface requires of the VMM's debug device, and how it takes part."""

    transfer_bytes_max: int
    """The most bytes in one transfer."""
    connect: Callable[[DebugLink], object] | None = None
    """Takes the guest's end of the channel, once."""
    data_arrived: Callable[[], object] | None = None
    """The device has bytes for the guest: tell it, if it wants to know.  Any thread may call it."""


class Pairing(NamedTuple):
    """One instant as UTC (ns since 1970) and as a vCPU's TSC."""

    real_ns: int
    guest_tsc: GuestTsc


class OwnPage(NamedTuple):
    """A pvclock page that shows a line of its own, and not the VM's: written once, as TimePages.register() has it.

    version: even, 32 bits.  flags: beside those that all pages have.
    """

    tsc: GuestTsc
    ns: GuestNs
    scale: ClockScale
    version: int
    flags: int


class ReferenceTime(NamedTuple):
    """A VM's reference time as it is saved: no less than any reading of it, and the last sequence of its page.

    units: of 100 ns since guest time 0.  sequence: 32 bits; 0 if no page was valid yet.
    """

    units: int = 0
    sequence: int = 0


class VmmServices(Protocol):
    """What hypercalls ask of the VMM.  APIC ids come from the guest, unchecked.

    ApicServices, InterruptServices and ResetServices are further services that a VMM may have.
    """

    def kick(self, apic_id: int) -> None:
        """Wake a vCPU from HLT; ignore an id that no vCPU has."""

    def yield_to(self, apic_id: int) -> None:
        """Let that vCPU run rather than the caller."""

    def send_ipi(self, apic_ids: list[int], icr: int) -> int:
        """Deliver the interrupt in ICR's low half to those vCPUs; returns how many accepted it."""


@runtime_checkable
class InterruptServices(Protocol):
    """A VMM that raises interrupts for a provider; without it there are none to offer."""

    def inject(self, vcpu: int, vector: int) -> None:
        """Raise a fixed, edge-triggered interrupt on vCPU `vcpu` (a number, not an APIC id)."""


@runtime_checkable
class ApicServices(Protocol):
    """A VMM that emulates its vCPUs' APICs, for registers of theirs that a provider has as MSRs.

    vcpu: a number, not an APIC id.  What a guest writes is passed on as it is, but within the given width; it may be
    nonsense.  The clock's lock is held but for the two reads, so these do not wait for a vCPU.
    """

    def end_interrupt(self, vcpu: int) -> None:
        """The guest writes EOI."""

    def read_icr(self, vcpu: int) -> int:
        """The interrupt command register, 64 bits: its high half above its low one, as the APIC's mode has them."""

    def write_icr(self, vcpu: int, value: int) -> None:
        """The guest sends an interrupt; value: as of read_icr()."""

    def read_tpr(self, vcpu: int) -> int:
        """The task priority, 8 bits."""

    def write_tpr(self, vcpu: int, value: int) -> None:
        """The guest sets its task priority, 8 bits."""


@runtime_checkable
class ResetServices(Protocol):
    """A VMM that resets its VM for the guest."""

    def request_reset(self) -> None:
        """The guest asks for a reset of the VM: do it soon, and not before this returns.  The clock's lock is held."""


class ClockServices(Protocol):
    """What a provider may ask of its clock.  Nothing here faults: bad addresses are ignored, as Linux does."""

    @property
    def memory(self) -> GuestMemory:
        """The guest's memory."""

    @property
    def vcpu_host(self) -> VcpuHost:
        """What runs the guest."""

    @property
    def vmm(self) -> VmmServices | None:
        """What the VMM does for hypercalls; None if it does nothing."""

    @property
    def kernel_features(self) -> Mapping[str, int]:
        """Feature words that the host's kernel can serve vCPUs without the engine, by provider name; see Backend."""

    @property
    def tsc_hz(self) -> int:
        """The guest's TSC frequency."""

    @property
    def host_tsc_hz(self) -> int:
        """The frequency at which guests' TSCs run here: another one where the guest was told of that elsewhere."""

    @property
    def keeps_tsc_rate(self) -> bool:
        """Does guest time of a VM that begins here go on at its TSC's own rate: not dilated, and after no reference?

        It may change until a page has shown that clock to the guest, and stays from then on.  False in a restored
        clock: what its guest was told is among the options that were saved.
        """

    def guest_tsc(self, vcpu: int) -> GuestTsc:
        """What vCPU's TSC reads at this instant."""

    def place_time_page(
        self, vcpu: int, gpa: Gpa | None, begin: Callable[[], object] = ..., undo: Callable[[], object] = ...
    ) -> None:
        """Keep vCPU's pvclock page at `gpa` from now on (None: nowhere), and publish.

        begin: applies what changes along with the page, before the publish.  undo: reverts that if the publish fails.
        """

    def place_time_pages(
        self,
        pages: Mapping[int, Gpa | None],
        begin: Callable[[], object],
        undo: Callable[[], object],
        vcpu: int | None = None,
    ) -> None:
        """As place_time_page(), for several vCPUs in one step, complete before any callback runs.

        vcpu: the caller's own vCPU, which is out of the guest.
        """

    def keep_time_page(self, vcpu: int, begin: Callable[[], object], undo: Callable[[], object]) -> None:
        """As place_time_page(), with vCPU's page where it is."""

    def place_reference_page(
        self,
        gpa: Gpa | None,
        begin: Callable[[], object] = ...,
        undo: Callable[[], object] = ...,
        vcpu: int | None = None,
    ) -> None:
        """Keep the VM's reference TSC page at `gpa`, 4096 bytes, from now on (None: nowhere), and publish.

        begin, undo, vcpu: as place_time_pages().  A page that is not in guest memory comes in as soon as a slot covers
        it.
        """

    def reference_units(self, vcpu: int) -> int:
        """The VM's reference time at this instant: units of 100 ns since guest time 0, as its page shows it.

        Never less than any earlier reading of page or counter.  Sleeps while a publish changes the page.
        """

    @property
    def reference_time(self) -> ReferenceTime:
        """The VM's reference time, to be saved: as of now, or of the pause."""

    def adopt_reference_time(self, saved: ReferenceTime, gpa: Gpa | None) -> None:
        """Go on from a saved reference time with the page at `gpa`; for Provider.load() of a clock that is paused."""

    def timers_changed(self) -> None:
        """What Hooks.next_due_ns returns may have changed; the clock asks anew."""

    def write_wall_clock(self, gpa: Gpa, on_commit: Callable[[], object] = ...) -> None:
        """Write the time of day of guest time 0 into the wall-clock record at `gpa`, once.

        on_commit: applies what changes along with it, at the point where nothing can fail any more.
        """

    def utc_ns(self) -> int:
        """UTC at this instant, in ns since 1970."""

    def quiesce(self, vcpu: int | None) -> AbstractContextManager[None]:
        """Keep all vCPUs out of the guest meanwhile; `vcpu`, the caller's own, is out already."""

    def tell(self, kind: EventKind, why: str) -> None:
        """Record an event that leaves guest time alone.  The caller bounds how many of them a guest can cause."""

    def pairing(self, vcpu: int) -> Pairing | None:
        """One host instant as UTC and as vCPU's TSC; None if the host's TSC is not reliable."""


class Hooks(NamedTuple):
    """What a provider is told beside its guest's accesses.  None, the default, costs nothing.

    The clock reads them once, when it is made, and calls them with its lock held.  They return soon and do not raise.
    """

    run_delay: Callable[[int, int], Callable[[], object]] | None = None
    """(vcpu, ns): vCPU waited `ns` more for a host CPU since the last call.  Asked at each tick while time runs.

    Returns the function that accounts it in guest memory, compiled code that no interrupt can split: it runs exactly
    once.
    """
    tick: Callable[[], object] | None = None
    """At each GuestClock.tick(), about once a second, paused or not, after the pages are published."""
    time_changed: Callable[[bool], object] | None = None
    """(is_paused): guest time was paused, resumed or stepped, or its rate changed.  May be called twice for one change.

    A restored clock calls it with True.  Called before subscribers of the events are.
    """
    next_due_ns: Callable[[], int | None] | None = None
    """Guest time in ns at which the provider's next timer is due, possibly in the past; None: none is set."""
    expire: Callable[[int], Callable[[], object] | None] | None = None
    """(guest time in ns): expire the timers that are due.  Returns what delivers them, for it needs services of the
    VMM; that is called without the clock's lock, and may raise.
    """


class Provider(Protocol):
    """One guest-visible interface, for the life of one VM.

    A provider is a class in registry.PROVIDERS; what serves every provider names none and branches on none, except as
    MAY_NAME in tests/test_layering.py says.  tests/unit/test_provider_contract.py checks all members for each provider.

    Its constructor takes (clock: ClockServices, vcpus: int), and its options as keyword-only parameters: their names
    are the keys that its configuration may have, their annotations (int, bool, str, Literal, None) the legal values
    (configuration.py).  `profile` and `version` are among them if it depends on those.  ConfigError for what cannot be
    served, naming what can.

    Locks: the clock's lock is held for write_msr(), reset(), save(), load() and the hooks.  read_msr(), hypercall() and
    the properties run without it, on any thread.  Services of the VMM are called without it, but for those of an MSR
    write: ApicServices' but the two reads, and ResetServices'.  A DebugLink is called with it by an MSR write, and
    without it by a hypercall.
    """

    # What it is

    name: str
    """Its key in the registry, in configurations and in saved states."""
    number: int
    """Its id in VirtualBox's saved units: see registry.PROVIDER_NUMBERS."""
    version: int
    """Version of what save() returns, from 1 on.  load() accepts every version that was ever written."""
    is_enabled: bool
    """Does the guest have a paravirtual interface at all?  Without one the interface's version is always 0."""
    clock: ClockServices

    @property
    def config(self) -> Mapping[str, int | bool | str]:
        """The options that make an equal provider, without those at their defaults that older states do not have."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the VMM should know of this configuration, a line each; logged once, at the start."""

    node_keys: Mapping[str, str]
    """VirtualBox's keys of its configuration node, which has the provider's name, and the options that they are.

    Empty: there is no such node.  It is legal for every provider, and ignored by the others.
    """

    # CPUID

    cpuid_base: int
    """The first of its leaves: CPUID_BASE, or a multiple of 0x100 above it, where another interface has CPUID_BASE."""

    @property
    def cpuid_leaves(self) -> Mapping[int, CpuidLeaf]:
        """The hypervisor leaves that it offers, from cpuid_base on; that leaf's EAX is the number of the last one."""

    @property
    def guest_lives_by_tsc(self) -> bool:
        """Does the guest take its TSC for its clock: has it no other, or does it prefer it by what it is offered?

        It needs a TSC of the frequency that it was told, wherever it is restored.  Not so a guest that is told the
        frequency and reads its time by a page, as Hyper-V's do: the page is right at any frequency.
        """

    @property
    def shows_invariant_tsc(self) -> bool:
        """May CPUID show an invariant TSC at this moment, if the VMM offers one?"""

    # MSRs

    msr_ranges: tuple[MsrRange, ...]
    """MSRs that must exit to the clock on /dev/kvm, offered or not, and those of them that the kernel keeps.

    The accesses of every provider in the registry exit, whichever one this VM has: the kernel would serve them.
    """

    def read_msr(self, vcpu: int, index: int) -> int:
        """RDMSR by the guest: the 64-bit value, or MsrFault."""

    def write_msr(self, vcpu: int, index: int, value: int) -> None:
        """WRMSR by the guest; MsrFault is #GP."""

    # Hypercalls

    hypercall_opcodes: tuple[bytes, ...]
    """Hypercall instructions that its guests execute on any CPU; #UD must exit where the CPU lacks one of them."""

    hypercall_port: int | None
    """The port to which its guests' hypercalls write on /dev/kvm, where the instructions do not exit; None without."""

    @property
    def are_hypercalls_enabled(self) -> bool:
        """Are hypercalls served at this moment?"""

    def hypercall(self, vcpu: int, registers: HypercallRegisters) -> HypercallResult:
        """The guest's VMCALL or VMMCALL.

        NOT_ENABLED or NOT_AVAILABLE gives the guest its #UD, and so does ACCESS_DENIED without a RAX.
        """

    # Pages and time

    def own_page(self, vcpu: int) -> OwnPage | None:
        """What vCPU's page shows if it has a line of its own; None if it shows the VM's.  Asked when it is placed."""

    @property
    def allows_stable(self) -> bool:
        """May pages say TSC_STABLE if the vCPUs' TSCs agree?  Asked at every publish."""

    refreshes_pages: bool
    """Are pages re-anchored beside what guest and VMM do?"""
    tells_of_pauses: bool
    """Is GUEST_STOPPED set in pages after a pause?"""
    hooks: Hooks

    @property
    def is_paravirt_tsc_enabled(self) -> bool:
        """Does the guest read a TSC page that update_paravirt_tsc() has to maintain?"""

    def update_paravirt_tsc(self) -> Status:
        """The VMM's TSC offsets have changed: publish what this provider itself derives from them.

        SUCCESS also if the clock publishes all there is; NOT_ENABLED or NOT_AVAILABLE without such pages.
        """

    # Life

    def reset(self) -> None:
        """The VM is reset: go back to the state before any MSR write, and take all pages back."""

    def save(self) -> Mapping[str, MsrValue]:
        """The guest's writes by name, as plain data for ClockState."""

    def load(self, msrs: Mapping[str, object]) -> None:
        """Adopt what save() returned, without repeating its effects; the clock places the pages by itself.

        ConfigError, with nothing changed, for anything that save() never returned.
        """

    # VirtualBox's guest interface manager, for emulators

    debug_setup: DebugSetup | None
    """What it requires of the VMM's debug device; None without a debug interface."""

    def save_unit(self) -> bytes:
        """Its part of VirtualBox's saved unit "GIM", which follows provider id and version; empty if it has none."""

    def load_unit(self, part: bytes, begin: Callable[[], object], undo: Callable[[], object]) -> None:
        """Adopt what save_unit() returned, and publish the pages in it.

        begin: applies what changes along with it, in the same step; undo: reverts that if it fails.  StateFileError or
        ConfigError, with nothing changed, if `part` is unsound or is of a VM that was set up differently.
        """
