"""Guest-visible clock interfaces: one is chosen by name for the life of a VM, and `GuestInterface` dispatches to it.

VirtualBox calls this the guest interface manager, GIM.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final, NamedTuple

from pvclock import arguments
from pvclock.arguments import flag, function, instance, serving, text, whole
from pvclock.errors import ConfigError, RangeError, StateFileError
from pvclock.msr_ranges import MsrRange
from pvclock.providers import configuration, hypercall_instructions
from pvclock.providers.configuration import PROFILES, combined, effective_provider
from pvclock.providers.interface import (
    ClockServices,
    CpuidLeaf,
    HypercallRegisters,
    HypercallResult,
    MsrValue,
    Provider,
    Status,
)
from pvclock.providers.kvm import KvmProvider
from pvclock.providers.minimal import MinimalProvider
from pvclock.providers.none import NoneProvider
from pvclock.providers.timing import CPUID_TIMING
from pvclock.providers.virtualbox import saved_unit
from pvclock.providers.virtualbox.debug_channel import DebugChannel
from pvclock.quantities import U64_MASK, Gpa, shown
from pvclock.threads import renew_in_children

__all__ = [
    "PROFILES",
    "PROVIDERS",
    "PROVIDER_NUMBERS",
    "Executed",
    "GuestInterface",
    "Statistics",
    "combined",
    "effective_provider",
    "provider_named_in",
]

PROVIDERS: Final[Mapping[str, type[Provider]]] = {
    each.name: each for each in (NoneProvider, MinimalProvider, KvmProvider)
}

PROVIDER_NUMBERS: Final[Mapping[str, int]] = {"None": 0, "Minimal": 1, "HyperV": 2, "KVM": 3}
"""VirtualBox's ids, which saved units hold; not all of them are provided here."""

PARAVIRT_TSC: Final[Mapping[str, Status]] = {
    "None": Status.NOT_ENABLED,
    "Minimal": Status.NOT_AVAILABLE,
    "KVM": Status.SUCCESS,
}
"""What becomes of an update of the TSC that a provider publishes by itself; KVM's pages are the clock's."""

# RIP stays on an instruction that was not a hypercall here, and on one that the guest shall repeat.
STAYS: Final = (Status.NOT_ENABLED, Status.NOT_AVAILABLE, Status.CONTINUING)


class Statistics(NamedTuple):
    """Hypercalls of guests, whatever became of them, and whole transfers over the debug channel; none ever decreases.

    Hypercalls that came as #UD are counted apart; not at all under profile "virtualbox".
    """

    hypercalls: int
    hypercalls_by_ud: int
    debug_transmit: int
    debug_transmit_bytes: int
    debug_receive: int
    debug_receive_bytes: int


class Executed(NamedTuple):
    """A hypercall instruction's `status`; the `rax` that the guest gets, None for the one it has.

    length: by how many bytes RIP advances.  patched: was the instruction made the CPU's own?  With NOT_ENABLED,
    NOT_AVAILABLE and INVALID_INSTRUCTION nothing was done, and the guest gets its #UD.
    """

    status: Status
    rax: int | None = None
    length: int = 0
    patched: bool = False


class GuestInterface:
    """The interface that one VM's guest has to its clock, the same one for life.

    config: `provider` ("None", "Minimal", "KVM"; "None" if left out), `version` (0 is the newest), `profile` ("linux",
    "document", "virtualbox") and the provider's options; VirtualBox's spelling will do, see configuration.checked().
    ConfigError names key, value and what is legal, or what this engine cannot serve.
    tsc_usable: does the host's TSC run evenly and alike on all CPUs?  log: is told in a line what was chosen, and in
    others if the TSC is not usable, or is what the guest will go by.

    Thread-safety: hypercalls, the debug channel and statistics may be used from any thread; all else is for who holds
    the clock, as GuestClock does for the MSRs.
    """

    def __init__(
        self,
        config: Mapping[str, object],
        clock: ClockServices,
        vcpus: int,
        *,
        tsc_usable: bool = True,
        log: Callable[[str], object] = lambda _: None,
    ) -> None:
        chosen = configuration.checked(config, PROVIDERS)
        serving("clock", clock, "place_time_page", "write_wall_clock", "tell", wanted="a ClockServices")
        function("log", log)
        self._vcpus = whole("vcpus", vcpus, 1)
        self._provider: Provider = PROVIDERS[chosen.provider](clock, vcpus, **chosen.options)  # type: ignore[call-arg]
        self._counts_lock = threading.Lock()
        self._hypercalls = self._hypercalls_by_ud = 0
        self._adopted_features: int | None = None
        self.profile = chosen.profile
        self.version = chosen.version
        """Of the interface, as configured (0 is the newest; None's is 0), or as in a unit that was loaded."""
        self.debug = DebugChannel(getattr(self._provider, "debug_setup", None))
        """The byte stream between the guest's debugger stub and the VMM's debugger."""

        # The provider's methods themselves: a guest's MSR accesses are the most frequent thing here.
        self.read_msr = self._provider.read_msr
        """read_msr(vcpu, index) -> the 64-bit value; MsrFault is #GP, and without a provider there is nothing else."""
        self.write_msr = self._provider.write_msr
        """write_msr(vcpu, index, value); MsrFault is #GP."""

        log(
            f"provider {self.name}, id {self.number}, version {chosen.implementation}, profile {self.profile}, "
            f"on {clock.engine}"
        )
        if chosen.options.get("timing_leaf"):
            log("warning: leaf 0x40000010 is offered; a guest that goes by its TSC leaves every policy of this clock")
        if not flag("tsc_usable", tsc_usable):
            log(f"warning: the host's TSC is not usable; guests of provider {self.name} may see time run unevenly")
        renew_in_children(self)

    def begin_anew(self) -> None:
        """See HasLock."""
        self._counts_lock = threading.Lock()

    # What it is

    @property
    def provider(self) -> Provider:
        """The provider; it stays."""
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
        """Does the guest have an interface at all?"""
        return self.number != PROVIDER_NUMBERS["None"]

    @property
    def are_hypercalls_enabled(self) -> bool:
        """Are there hypercalls for the guest?  KVM's are enabled on every vCPU from the start."""
        return self.name == "KVM"

    @property
    def is_paravirt_tsc_enabled(self) -> bool:
        """Does the guest read a TSC page of Hyper-V's?  Pages of KVM's are none: False, as VirtualBox says."""
        return False

    @property
    def guest_lives_by_tsc(self) -> bool:
        """Is the guest told its TSC's frequency, or has it no other clock?"""
        return CPUID_TIMING in self.cpuid_leaves or not self._provider.publishes_time

    @property
    def config(self) -> Mapping[str, int | bool | str]:
        """The options that make another one like it; a profile and a version that nobody chose are left out."""
        version = {"version": self.version} if self.version else {}
        profile = {} if self.profile == PROFILES[0] else {"profile": self.profile}
        return {**version, **profile, **self._provider.config}

    @property
    def cpuid_leaves(self) -> Mapping[int, CpuidLeaf]:
        """The hypervisor CPUID leaves that it offers."""
        return self._provider.cpuid_leaves

    @property
    def msr_ranges(self) -> tuple[MsrRange, ...]:
        """What must come to the clock where vCPUs run on /dev/kvm: every provider's, for the kernel serves some."""
        return tuple(each for provider in PROVIDERS.values() for each in provider.msr_ranges)

    @property
    def statistics(self) -> Statistics:
        """The counters as they are now."""
        with self._counts_lock:
            return Statistics(self._hypercalls, self._hypercalls_by_ud, *self.debug.traffic)

    # Hypercalls

    def hypercall(self, vcpu: int, registers: HypercallRegisters) -> HypercallResult:
        """The guest's VMCALL or VMMCALL, that the VMM knows to be one.

        NOT_ENABLED without a provider, NOT_AVAILABLE if it has no hypercalls; ACCESS_DENIED outside of ring 0 and
        NOT_SUPPORTED for a call that it does not have, both with the RAX that tells the guest.
        RangeError for a vCPU or registers that there are not.
        """
        self._check(vcpu, registers)
        with self._counts_lock:
            self._hypercalls += 1
        return self._provider.hypercall(vcpu, registers)

    def execute(self, vcpu: int, registers: HypercallRegisters, code: bytes) -> Executed:
        """The same by `code`, the bytes at RIP (3, or up to 15); INVALID_INSTRUCTION if they begin with another one."""
        self._check(vcpu, registers)
        length = hypercall_instructions.recognized_length(arguments.data("code", code), long_mode=registers.long_mode)
        if length is None:
            return Executed(Status.INVALID_INSTRUCTION)
        return _advanced(self.hypercall(vcpu, registers), length)

    def should_trap_ud(self, vendor: str) -> bool:
        """Must #UD exit to the VMM on a CPU by `vendor`, so that handle_ud() can serve the guest?"""
        return hypercall_instructions.should_trap_ud(text("vendor", vendor), self.name)

    def handle_ud(
        self, vcpu: int, registers: HypercallRegisters, code: bytes, gpa: Gpa, vendor: str, *, fix: bool = True
    ) -> Executed:
        """A #UD of the guest: if it was the other vendor's hypercall instruction, do it, and put the CPU's own there.

        code, gpa: the bytes at RIP, and where they are in guest memory.  vendor: the CPU's, as CPUID leaf 0 says it
        (ConfigError for one that has no hypercall).  fix: False leaves the guest's code alone, and each call costs a
        #UD.  Code outside of ring 0 is always left alone.  What other vCPUs may see: patch().
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
        return PARAVIRT_TSC[self.name]

    def reset(self) -> None:
        """The VM is reset: nothing was written, and no page is kept.  Statistics go on."""
        self._provider.reset()

    def term(self) -> None:
        """The VM ends: as reset(), and the debug device is let go.  May be called twice."""
        self._provider.reset()
        self.debug.unregister()

    # VirtualBox's saved unit

    def save_unit(self) -> bytes:
        """The unit "GIM", version 1, of a VM whose vCPUs are out of the guest."""
        header = saved_unit.encode_header(self.number, self.version)
        return header + (saved_unit.encode_kvm(self._kvm_part()) if self.name == "KVM" else b"")

    def load_unit(self, data: bytes, *, version: int = saved_unit.UNIT_VERSION, is_final_pass: bool = True) -> None:
        """Take what save_unit() gave, or VirtualBox, and publish the pages in it; nothing changes if it is refused.

        version: the unit's, which its container says.  is_final_pass: a live migration sends a unit more than once, and
        the last one counts; the others are not looked at.  The interface's version is adopted.  StateFileError if the
        unit is unsound or of another version, or of an interface newer than is known here (any will do under profile
        "virtualbox"); ConfigError if its provider, or that one's features, are not this VM's (other
        features are kept for the next save under profile "virtualbox", and CPUID stays).
        """
        if not flag("is_final_pass", is_final_pass):
            return
        if whole("version", version) != saved_unit.UNIT_VERSION:
            raise StateFileError("unit version", str(version), str(saved_unit.UNIT_VERSION))
        number, provider_version, rest = saved_unit.decode_header(arguments.data("data", data))
        if number != self.number:
            raise ConfigError(f"the unit is of provider {_titled(number)}; this VM has provider {_titled(self.number)}")
        newest = self._provider.version
        if provider_version > newest and self.profile != "virtualbox":
            raise StateFileError("provider version", str(provider_version), f"0 to {newest}")
        if isinstance(self._provider, KvmProvider):
            self._take_kvm(self._provider, saved_unit.decode_kvm(rest, self._vcpus), provider_version)
        elif rest:
            raise StateFileError("unit", f"{len(rest)} bytes after the header", f"none of provider {self.name!r}")
        else:
            self.version = provider_version

    # Inside

    def _check(self, vcpu: int, registers: HypercallRegisters) -> None:
        if not 0 <= whole("vcpu", vcpu) < self._vcpus:
            raise RangeError(f"vCPU {shown(vcpu)}; this VM has vCPUs 0 to {self._vcpus - 1}")
        instance("registers", registers, HypercallRegisters)
        for name, value in zip(registers._fields[:6], registers[:6], strict=True):
            if not 0 <= whole(name, value) <= U64_MASK:
                raise RangeError(f"{name} is {value:#x}; a register has 64 bits")
        if not 0 <= whole("cpl", registers.cpl) <= 3:
            raise RangeError(f"cpl is {shown(registers.cpl)}; rings are 0 to 3")

    def _kvm_part(self) -> saved_unit.KvmPart:
        memory = self._provider.clock.memory
        match self._provider.save(), self._provider.config:
            case {"system_time": tuple(system_time), "wall_clock": int(wall_clock)} as saved, {
                "features": int(features)
            }:
                parts = [saved_unit.vcpu_part(memory, each) for each in system_time]
                adopted = features if self._adopted_features is None else self._adopted_features
                return saved_unit.KvmPart(_with_own(parts, saved), wall_clock, adopted)
        raise AssertionError("provider 'KVM' saved neither system time nor wall clock")

    def _take_kvm(self, provider: KvmProvider, part: saved_unit.KvmPart, version: int) -> None:
        here = int(provider.config["features"])
        if part.features != here and self.profile != "virtualbox":
            raise ConfigError(f"the unit's guest was offered KVM features {part.features:#x}; this VM offers {here:#x}")
        written: dict[str, MsrValue] = {
            "system_time": tuple(vcpu.system_time_msr for vcpu in part.vcpus),
            "wall_clock": part.wall_clock_msr,
            "time_page_version": tuple(vcpu.version for vcpu in part.vcpus),
            "time_page_flags": tuple(vcpu.flags for vcpu in part.vcpus),
        }
        # The features are not CPUID's: the guest was told of those.
        adopt = partial(self._adopt, version, part.features)
        provider.replace(written, adopt, partial(self._adopt, self.version, self._adopted_features))

    def _adopt(self, version: int, features: int | None) -> None:
        self.version, self._adopted_features = version, features


def provider_named_in(config: Mapping[str, object], beside: str = "") -> str:
    """The name of the provider that a configuration asks for; ConfigError if that is not sound.

    beside: how the error for an unknown key ends, where its caller takes other keywords, too.
    """
    return configuration.checked(config, PROVIDERS, text("beside", beside)).provider


def _advanced(result: HypercallResult, length: int) -> Executed:
    return Executed(result.status, result.rax, 0 if result.status in STAYS else length)


def _with_own(parts: Sequence[saved_unit.VcpuPart], saved: Mapping[str, MsrValue]) -> tuple[saved_unit.VcpuPart, ...]:
    """The vCPUs' parts with the versions and flags that the provider counts by itself, where it does."""
    match saved:
        case {"time_page_version": tuple(versions), "time_page_flags": tuple(flags)}:
            own = zip(parts, versions, flags, strict=True)
            return tuple(part._replace(version=version, flags=each) for part, version, each in own)
    return tuple(parts)


def _titled(number: int) -> str:
    names = {each: name for name, each in PROVIDER_NUMBERS.items()}
    return f"{number} ({names.get(number, 'unknown')})"
