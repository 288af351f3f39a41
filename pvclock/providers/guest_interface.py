"""The guest's clock interface: one provider, chosen by name for the life of a VM, and the dispatch to it.

VirtualBox calls this the guest interface manager, GIM.  Everything that differs between providers is in the provider
(interface.py); nothing here depends on which one it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, NamedTuple

from pvclock import arguments
from pvclock.arguments import flag, function, instance, serving, text, vcpu_number, whole
from pvclock.errors import ConfigError, RangeError, StateFileError
from pvclock.msr_ranges import MsrRange
from pvclock.providers import configuration, hypercall_instructions
from pvclock.providers.configuration import PROFILES, Configuration, combined, effective_provider
from pvclock.providers.interface import (
    ClockServices,
    CpuidLeaf,
    HypercallRegisters,
    HypercallResult,
    Provider,
    Status,
)
from pvclock.providers.registry import PROVIDER_NUMBERS, PROVIDERS
from pvclock.providers.virtualbox import saved_unit
from pvclock.providers.virtualbox.debug_channel import DebugChannel
from pvclock.quantities import U64_MASK, Gpa, shown
from pvclock.threads import renew_in_children

__all__ = [
    "PROFILES",
    "Executed",
    "GuestInterface",
    "Statistics",
    "combined",
    "effective_provider",
    "usual_msr_ranges",
]

# RIP stays on an instruction that is not a hypercall here, and on one that the guest has to repeat.
STAYS: Final = (Status.NOT_ENABLED, Status.NOT_AVAILABLE, Status.CONTINUING)
GENERAL_REGISTERS: Final = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "r8")


class Statistics(NamedTuple):
    """Hypercalls of the guest, whatever their outcome, and complete transfers over the debug channel; never decreasing.

    Hypercalls that came as #UD are counted separately; not at all under profile "virtualbox".
    """

    hypercalls: int
    hypercalls_by_ud: int
    debug_transmit: int
    debug_transmit_bytes: int
    debug_receive: int
    debug_receive_bytes: int


class Executed(NamedTuple):
    """Outcome of a hypercall instruction, and the RAX and RDX that the guest gets; None leaves the register as it is.

    length: by how many bytes RIP advances.  patched: was the instruction replaced by the CPU's own?  NOT_ENABLED,
    NOT_AVAILABLE, INVALID_INSTRUCTION, and ACCESS_DENIED without a RAX: nothing was done, and the guest gets its #UD.
    """

    status: Status
    rax: int | None = None
    length: int = 0
    patched: bool = False
    rdx: int | None = None


class GuestInterface:
    """The clock interface that one VM's guest sees: CPUID, MSRs, hypercalls.

    config: `provider` (a name in registry.PROVIDERS; "None" if left out), `version` (0 is the newest), `profile`
    ("linux", "document", "virtualbox") and the provider's options; see configuration.checked(), whose result may be
    given, too.  ConfigError names key, value and what is legal, or what this vCPU host cannot serve.
    tsc_usable: do the host's TSCs run evenly and in step?  log: gets one line on what was chosen, and one per warning.

    Thread-safety: hypercalls, the debug channel and statistics may be used from any thread; everything else needs the
    clock's lock, which GuestClock holds around MSR writes.
    """

    def __init__(
        self,
        config: Mapping[str, object] | Configuration,
        clock: ClockServices,
        vcpus: int,
        *,
        tsc_usable: bool = True,
        log: Callable[[str], object] = lambda _: None,
    ) -> None:
        chosen = configuration.checked(config)
        serving("clock", clock, "place_time_page", "write_wall_clock", "tell", wanted="a ClockServices")
        function("log", log)
        self._vcpus = whole("vcpus", vcpus, 1)
        self._provider: Provider = PROVIDERS[chosen.provider](clock, vcpus, **chosen.options)  # type: ignore[call-arg]
        self._counts_lock = threading.Lock()
        self._hypercalls = self._hypercalls_by_ud = 0
        self.profile = chosen.profile
        self.version = chosen.version
        """Of the interface, as configured (0 is the newest), or as in a unit that was loaded."""
        self.debug = DebugChannel(self._provider.debug_setup)
        """The byte stream between the guest's debugger stub and the VMM's debugger."""

        # The provider's bound methods, without a wrapper: MSR accesses are the hot path.
        self.read_msr = self._provider.read_msr
        """read_msr(vcpu, index) -> the 64-bit value; MsrFault is #GP."""
        self.write_msr = self._provider.write_msr
        """write_msr(vcpu, index, value); MsrFault is #GP."""

        log(
            f"provider {self.name}, id {self.number}, version {chosen.implementation}, profile {self.profile}, "
            f"on {clock.vcpu_host}"
        )
        for warning in self._provider.warnings:
            log(f"warning: {warning}")
        if not flag("tsc_usable", tsc_usable):
            log(f"warning: the host's TSC is not usable; guests of provider {self.name} may see time run unevenly")
        renew_in_children(self)

    def begin_anew(self) -> None:
        """See HasLock."""
        self._counts_lock = threading.Lock()

    # What it is

    @property
    def provider(self) -> Provider:
        """The provider, for the life of the VM."""
        return self._provider

    @property
    def name(self) -> str:
        """The provider's name."""
        return self._provider.name

    @property
    def number(self) -> int:
        """The provider's id."""
        return self._provider.number

    @property
    def is_enabled(self) -> bool:
        """Does the guest have a paravirtual interface at all?"""
        return self._provider.is_enabled

    @property
    def are_hypercalls_enabled(self) -> bool:
        """Are hypercalls served at this moment?"""
        return self._provider.are_hypercalls_enabled

    @property
    def is_paravirt_tsc_enabled(self) -> bool:
        """Does the guest read a TSC page that update_paravirt_tsc() has to maintain?  VirtualBox says no of KVM's."""
        return self._provider.is_paravirt_tsc_enabled

    @property
    def guest_lives_by_tsc(self) -> bool:
        """Is the guest told its TSC's frequency, or does it have no other clock than its TSC?"""
        return self._provider.guest_lives_by_tsc

    @property
    def config(self) -> Mapping[str, int | bool | str]:
        """The options that make an equal interface, without a profile and a version that are the defaults."""
        version = {"version": self.version} if self.version else {}
        profile = {} if self.profile == PROFILES[0] else {"profile": self.profile}
        return {**version, **profile, **self._provider.config}

    @property
    def cpuid_leaves(self) -> Mapping[int, CpuidLeaf]:
        """The hypervisor CPUID leaves that it offers."""
        return self._provider.cpuid_leaves

    @property
    def msr_ranges(self) -> tuple[MsrRange, ...]:
        """MSRs that must exit to the clock on /dev/kvm: every provider's, because the kernel would serve some."""
        own = {each.base: each for each in self._provider.msr_ranges}
        return tuple(
            ({each.base: each for each in usual_msr_ranges()} | own).values()
        )  # of what comes twice, this VM's counts

    @property
    def statistics(self) -> Statistics:
        """The counters as they are now."""
        with self._counts_lock:
            return Statistics(self._hypercalls, self._hypercalls_by_ud, *self.debug.traffic)

    # Hypercalls

    @property
    def hypercall_port(self) -> int | None:
        """The port to which the guest's hypercalls write on /dev/kvm; None without."""
        return self._provider.hypercall_port

    def hypercall(self, vcpu: int, registers: HypercallRegisters) -> HypercallResult:
        """The guest's VMCALL or VMMCALL, already decoded by the VMM.

        NOT_ENABLED without an interface, NOT_AVAILABLE if it has no hypercalls; ACCESS_DENIED outside ring 0 and
        NOT_SUPPORTED for an unknown call, both with the RAX that tells the guest, or else with its #UD.
        RangeError for an unknown vCPU, or registers that cannot be.
        """
        self._check(vcpu, registers)
        with self._counts_lock:
            self._hypercalls += 1
        return self._provider.hypercall(vcpu, registers)

    def execute(self, vcpu: int, registers: HypercallRegisters, code: bytes) -> Executed:
        """As hypercall(), decoding `code`, the 3 to 15 bytes at RIP; INVALID_INSTRUCTION for another instruction."""
        self._check(vcpu, registers)
        length = hypercall_instructions.recognized_length(arguments.data("code", code), long_mode=registers.long_mode)
        if length is None:
            return Executed(Status.INVALID_INSTRUCTION)
        return _advanced(self.hypercall(vcpu, registers), length)

    def should_trap_ud(self, vendor: str) -> bool:
        """Must #UD exit to the VMM on a CPU by `vendor`, so that handle_ud() can serve the guest?"""
        return hypercall_instructions.should_trap_ud(text("vendor", vendor), self._provider.hypercall_opcodes)

    def handle_ud(
        self, vcpu: int, registers: HypercallRegisters, code: bytes, gpa: Gpa, vendor: str, *, fix: bool = True
    ) -> Executed:
        """A #UD of the guest: if it was a hypercall instruction, execute it and replace it by the CPU's own.

        code, gpa: the bytes at RIP, and their address in guest memory.  vendor: the CPU's, as in CPUID leaf 0
        (ConfigError for one without hypercalls).  fix: False leaves the guest's code alone, at the cost of a #UD per
        call.  Code outside ring 0 is always left alone.  What other vCPUs may see: hypercall_instructions.patch().
        """
        hypercall_instructions.native_opcode(text("vendor", vendor))
        self._check(vcpu, registers)
        gpa, fix = Gpa(whole("gpa", gpa)), flag("fix", fix)
        length = hypercall_instructions.recognized_length(arguments.data("code", code), long_mode=registers.long_mode)
        if length is None:
            return Executed(Status.INVALID_INSTRUCTION)
        if self.profile != "virtualbox":
            with self._counts_lock:
                self._hypercalls_by_ud += 1
        done = _advanced(self._provider.hypercall(vcpu, registers), length)
        may_fix = fix and done.length and registers.cpl == 0
        patched = may_fix and hypercall_instructions.patch(self._provider.clock.memory, gpa, code[:length], vendor)
        return done._replace(patched=bool(patched))

    # Life

    def update_paravirt_tsc(self) -> Status:
        """The VMM's TSC offsets have changed: publish what the provider itself derives from them."""
        return self._provider.update_paravirt_tsc()

    def reset(self) -> None:
        """The VM is reset: MSRs go back to their initial values, and all pages are taken back.  Statistics go on."""
        self._provider.reset()

    def term(self) -> None:
        """The VM ends: as reset(), and the debug device is removed.  May be called twice."""
        self._provider.reset()
        self.debug.unregister()

    # VirtualBox's saved unit, for emulators

    def save_unit(self) -> bytes:
        """The unit "GIM", version 1, of a VM whose vCPUs are out of the guest."""
        return saved_unit.encode_header(self.number, self.version) + self._provider.save_unit()

    def load_unit(self, data: bytes, *, version: int = saved_unit.UNIT_VERSION, is_final_pass: bool = True) -> None:
        """Adopt a unit of save_unit() or VirtualBox, its interface version included, and publish the pages in it.

        version: the unit's, as its container says.  is_final_pass: a live migration sends a unit several times; only
        the last one is read.  StateFileError for a unit that is unsound, of another version, or of a newer interface
        than this one (which profile "virtualbox" accepts); ConfigError if it is of another provider, or of one that was
        set up differently.  Nothing changes if it is refused.
        """
        if not flag("is_final_pass", is_final_pass):
            return
        if whole("version", version) != saved_unit.UNIT_VERSION:
            raise StateFileError("unit version", str(version), str(saved_unit.UNIT_VERSION))
        number, provider_version, part = saved_unit.decode_header(arguments.data("data", data))
        if number != self.number:
            raise ConfigError(f"the unit is of provider {_titled(number)}; this VM has provider {_titled(self.number)}")
        newest = self._provider.version
        if provider_version > newest and self.profile != "virtualbox":
            raise StateFileError("provider version", str(provider_version), f"0 to {newest}")
        set_version = partial(setattr, self, "version")
        self._provider.load_unit(part, partial(set_version, provider_version), partial(set_version, self.version))

    # Inside

    def _check(self, vcpu: int, registers: HypercallRegisters) -> None:
        vcpu_number(vcpu, self._vcpus)
        instance("registers", registers, HypercallRegisters)
        for name in GENERAL_REGISTERS:
            value = getattr(registers, name)
            if not 0 <= whole(name, value) <= U64_MASK:
                raise RangeError(f"{name} is {value:#x}; a register has 64 bits")
        if not 0 <= whole("cpl", registers.cpl) <= 3:
            raise RangeError(f"cpl is {shown(registers.cpl)}; rings are 0 to 3")


def usual_msr_ranges() -> tuple[MsrRange, ...]:
    """An interface's msr_ranges unless its options change them: each provider's."""
    return tuple({each.base: each for kind in PROVIDERS.values() for each in kind.msr_ranges}.values())


def _advanced(result: HypercallResult, length: int) -> Executed:
    stays = result.status in STAYS or (result.status is Status.ACCESS_DENIED and result.rax is None)
    return Executed(result.status, result.rax, 0 if stays else length, rdx=result.rdx)


def _titled(number: int) -> str:
    names = {each: name for name, each in PROVIDER_NUMBERS.items()}
    return f"{number} ({names.get(number, 'unknown')})"
