"""The KVM provider: which of KVM's surfaces this VM's guest has, and what a VMM in the kernel's place tells them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, Literal, TypeAlias

from pvclock.arguments import vcpu_number
from pvclock.errors import ConfigError, MsrFault
from pvclock.msr_ranges import MsrRange
from pvclock.providers import timing
from pvclock.providers.guest_log import GuestLog
from pvclock.providers.hypercall_instructions import VMCALL
from pvclock.providers.interface import (
    CPUID_BASE,
    ClockServices,
    CpuidLeaf,
    DebugSetup,
    Hooks,
    HypercallRegisters,
    HypercallResult,
    MsrValue,
    OwnPage,
    Status,
)
from pvclock.providers.kvm import virtualbox_unit
from pvclock.providers.kvm.async_pf import WAKE_ALL, AsyncPf
from pvclock.providers.kvm.features import (
    FEATURE_OF_MSR,
    MSR_RANGES,
    NAME,
    KvmFeature,
    KvmHint,
    check_cpuid_base,
    default_features,
    kvm_cpuid_leaves,
    names_of,
    servable_features,
)
from pvclock.providers.kvm.guest_switches import GuestSwitches
from pvclock.providers.kvm.hypercalls import Hypercalls
from pvclock.providers.kvm.kvmclock import KvmClock
from pvclock.providers.kvm.msr_state import Surface, load_all, save_all
from pvclock.providers.kvm.profiles import PROFILES
from pvclock.providers.kvm.pv_eoi import PvEoi
from pvclock.providers.kvm.steal_time import StealTime
from pvclock.quantities import quoted
from pvclock.timekeeping.events import EventKind

__all__ = ["KvmProvider"]

TimingLeaf: TypeAlias = bool | Literal["boot"]
"""See KvmProvider."""

SAVED_BY_VERSION_1: Final = frozenset({"system_time", "wall_clock", "boot_vcpu_runs_old_kvmclock"})
ADDED_TO_VERSION_2: Final = (
    frozenset({"time_page_flags", "time_page_tsc", "time_page_ns"}),
    frozenset({"time_page_tsc", "time_page_ns"}),
)


class KvmProvider:
    """KVM's paravirtual interface of one VM: clock, steal time, EOI, page faults, hypercalls.

    features: what CPUID offers; None for the clock, steal time (opt-in on KVM) and what the host's kernel serves beside
    the engine.  hints: CPUID's, see KvmHint.
    enforce_cpuid: refuse an MSR or hypercall whose feature is not offered; False is Linux without
    KVM_CAP_ENFORCE_PV_FEATURE_CPUID, which serves all that it can.
    profile: "linux", "document" or "virtualbox", see pvclock.providers.kvm.profiles.  version: of the interface, as
    configured; only profile "virtualbox" depends on it.
    cpuid_base: where the leaves begin; 0x40000100 beside an interface whose leaves are at 0x40000000, such as Hyper-V.
    timing_leaf: offer leaf 0x40000010, too, with the frequencies of TSC and APIC bus (`apic_bus_hz`, 1 GHz by default).
    True: the guest lives by it, on its TSC and out of reach of every clock policy, so a restore on a TSC of another
    frequency is refused.  "boot": it is what the guest would have measured as it booted, and such a restore is an
    event.  None: "boot" by profile "linux" where the clock keeps the TSC's rate (ClockServices), False elsewhere.

    ConfigError for what cannot be served here, naming what can.
    """

    name = NAME
    number = 3
    version = 2
    node_keys: Mapping[str, str] = {}
    is_enabled = shows_invariant_tsc = True
    msr_ranges = MSR_RANGES
    hypercall_opcodes: tuple[bytes, ...] = (VMCALL,)
    """What Linux executes until it has patched itself for AMD's CPUs."""
    hypercall_port: int | None = None
    are_hypercalls_enabled = True
    """On every vCPU, from the start."""
    is_paravirt_tsc_enabled = False
    debug_setup: DebugSetup | None = None

    def __init__(  # noqa: PLR0913  # one for each key of the configuration, all by keyword
        self,
        clock: ClockServices,
        vcpus: int,
        *,
        features: int | None = None,
        hints: int = 0,
        enforce_cpuid: bool = True,
        profile: str = "linux",
        version: int = 0,
        cpuid_base: int = CPUID_BASE,
        timing_leaf: TimingLeaf | None = None,
        apic_bus_hz: int | None = None,
    ) -> None:
        if profile not in PROFILES:
            raise ConfigError(f"profile {quoted(profile)} is unknown; choose from {', '.join(map(repr, PROFILES))}")
        if hints & ~sum(KvmHint):
            raise ConfigError(f"hints {hints:#x} are unknown; choose from {KvmHint(sum(KvmHint)).name}")
        check_cpuid_base(cpuid_base)
        self.clock, self.hints, self.profile, self.cpuid_base = clock, KvmHint(hints), profile, cpuid_base
        self._vcpus, self._enforce_cpuid, self._profile = vcpus, enforce_cpuid, PROFILES[profile]
        servable = servable_features(clock) & self._profile.features
        self.features = self._default(servable, version) if features is None else KvmFeature(features)
        if int(self.features) & ~int(servable):  # ints: ~ of an IntFlag has only the bits that have names
            refused = names_of(int(self.features) & ~int(servable))
            raise ConfigError(f"features {refused} cannot be served here; choose from {names_of(servable)}")
        if self._profile.stable_by_host and clock.pairing(0) is None:
            self.features &= ~KvmFeature.CLOCKSOURCE_STABLE
        # Asked at every publish, where a test of a flag enum costs as much as the publish itself.
        self._offers_stable = KvmFeature.CLOCKSOURCE_STABLE in self.features
        self.refreshes_pages, self.tells_of_pauses = self._profile.refreshes_pages, self._profile.tells_of_pauses
        self._unit_features = int(self.features)  # as save_unit() writes them
        self.msr_ranges = tuple(self._kept_if_offered(each) for each in MSR_RANGES)
        self._offer_timing(timing_leaf, apic_bus_hz)
        self._log = GuestLog(clock)
        self._make_surfaces(self.features if enforce_cpuid else servable)
        offers_steal_time = KvmFeature.STEAL_TIME in self.features
        self.hooks = Hooks(run_delay=self._steal_time.addition if offers_steal_time else None)

    def _default(self, servable: KvmFeature, version: int) -> KvmFeature:
        """The features that a VMM gets without naming any."""
        if self._profile.features_of_newest_only and version:
            return servable & KvmFeature.CLOCKSOURCE_STABLE
        return servable if self._profile.offers_all else servable & default_features(self.clock)

    def _kept_if_offered(self, msrs: MsrRange) -> MsrRange:
        """That range; what no guest of this profile is offered is not left to the kernel, either."""
        return msrs._replace(kept=tuple(msr for msr in msrs.kept if FEATURE_OF_MSR[msr] & self._profile.features))

    def _offer_timing(self, timing_leaf: TimingLeaf | None, apic_bus_hz: int | None) -> None:
        if apic_bus_hz is not None and not timing_leaf:
            raise ConfigError(
                f"apic_bus_hz is {apic_bus_hz}; only leaf 0x40000010 says it, which timing_leaf=True offers"
            )
        if timing_leaf and self.cpuid_base != CPUID_BASE:
            raise ConfigError(
                f"timing_leaf=True with cpuid_base {self.cpuid_base:#x}; leaf 0x40000010 is among the leaves of the "
                f"interface at {CPUID_BASE:#x}"
            )
        self._apic_bus_hz = timing.APIC_BUS_HZ if apic_bus_hz is None else apic_bus_hz
        self._asked_timing = timing_leaf
        if timing_leaf:
            timing.timing_leaf(self.clock.tsc_hz, self._apic_bus_hz)  # ConfigError for what it cannot say

    @property
    def _timing_leaf(self) -> TimingLeaf:
        """Is leaf 0x40000010 offered at this moment, and how long is it to be true?"""
        if self._asked_timing is not None:
            return self._asked_timing
        has_room = self.cpuid_base == CPUID_BASE and timing.can_say(self.clock.tsc_hz)
        return "boot" if has_room and self._profile.offers_timing_leaf and self.clock.keeps_tsc_rate else False

    def _make_surfaces(self, features: KvmFeature) -> None:
        clock, vcpus, profile = self.clock, self._vcpus, self._profile
        self._kvmclock = KvmClock(clock, vcpus, profile)
        serves_flush = KvmFeature.PV_TLB_FLUSH in features
        self._steal_time = StealTime(clock.memory, vcpus, profile, serves_flush=serves_flush)
        self._pv_eoi = PvEoi(clock.memory, vcpus)
        self._async_pf = AsyncPf(clock.memory, vcpus, profile, features)
        self._switches = GuestSwitches(vcpus)
        self._hypercalls = Hypercalls(clock, vcpus, profile, features)
        surfaces: tuple[Surface, ...]
        surfaces = (self._kvmclock, self._steal_time, self._pv_eoi, self._async_pf, self._switches)
        self._registers = tuple(register for surface in surfaces for register in surface.registers)
        self._msrs = {
            index: msr
            for surface in surfaces
            for index, msr in surface.msrs.items()
            if FEATURE_OF_MSR[index] in features
        }

    # The guest's side

    @property
    def cpuid_leaves(self) -> Mapping[int, CpuidLeaf]:
        """Signature "KVMKVMKVM", the feature word and the hints; the timing leaf where it is offered."""
        leaves = kvm_cpuid_leaves(self.features, self.hints, self.cpuid_base)
        if not self._timing_leaf:
            return leaves
        return timing.with_timing_leaf(leaves, timing.timing_leaf(self.clock.tsc_hz, self._apic_bus_hz))

    @property
    def guest_lives_by_tsc(self) -> bool:
        """Only with a timing leaf that was asked for."""
        return self._asked_timing is True

    @property
    def warnings(self) -> tuple[str, ...]:
        """See Provider."""
        if not self.guest_lives_by_tsc:
            return ()
        return ("leaf 0x40000010 is offered; a guest that goes by its TSC leaves every policy of this clock",)

    @property
    def allows_stable(self) -> bool:
        """Only if offered (or by profile), and not to a boot vCPU with the old MSRs."""
        if self._profile.stable_unasked:
            return True
        return self._offers_stable and not self._kvmclock.boot_vcpu_runs_old_kvmclock

    def own_page(self, vcpu: int) -> OwnPage | None:
        """By profile: what vCPU's page shows if it has a line of its own."""
        return self._kvmclock.own_page(vcpu)

    def read_msr(self, vcpu: int, index: int) -> int:
        """The value last written, even if it was ignored; old and new numbers share it."""
        msr = self._msrs.get(index)
        if msr is None:
            raise self._not_served(index)
        return 0 if msr.register is None else msr.register[vcpu]

    def write_msr(self, vcpu: int, index: int, value: int) -> None:
        """MsrFault where Linux refuses the value; a bad clock address is ignored."""
        msr = self._msrs.get(index)
        if msr is None:
            raise self._not_served(index, value)
        msr.write(vcpu, index, value)

    def hypercall(self, vcpu: int, registers: HypercallRegisters) -> HypercallResult:
        """The guest's VMCALL or VMMCALL; unknown numbers, and those not offered, return -KVM_ENOSYS."""
        return self._hypercalls.call(self._vcpu(vcpu), registers)

    def update_paravirt_tsc(self) -> Status:
        """Nothing to do: the clock publishes the pages."""
        return Status.SUCCESS

    # What the kernel would feed

    def add_steal_time(self, vcpu: int, ns: int) -> bool:
        """On vCPU's way into the guest: it was runnable for `ns` more without running.  Idle time does not count.

        True if the guest requested a TLB flush meanwhile (PV_TLB_FLUSH): flush before vCPU runs.  Does nothing if the
        guest has no record.  RangeError for an unknown vCPU, or `ns` beyond 64 bits.
        """
        return self._steal_time.add(self._vcpu(vcpu), ns)

    def set_preempted(self, vcpu: int, preempted: bool) -> bool:
        """vCPU was scheduled out while runnable (True), or runs again (False), which returns as add_steal_time()."""
        return self._steal_time.set_preempted(self._vcpu(vcpu), preempted)

    def offer_eoi(self, vcpu: int) -> bool:
        """At injection of an interrupt whose EOI needs no exit: offer that.  False if the guest has no EOI byte."""
        return self._pv_eoi.offer(self._vcpu(vcpu))

    def take_eoi(self, vcpu: int) -> bool:
        """At vCPU's next exit: True if its guest has ended the interrupt.

        False: its EOI will exit; the offer is withdrawn, if there was one.
        """
        return self._pv_eoi.take(self._vcpu(vcpu))

    def inject_not_present(self, vcpu: int, token: int, cpl: int, *, in_l2: bool = False) -> bool:
        """Prepare a page-not-present event for vCPU, at `cpl`; the VMM then injects #PF with CR2 = `token`.

        False if the guest does not take it: halt the vCPU until the page is present.  token: 1 to 2^32 - 2, else
        RangeError.  in_l2: does vCPU run a nested guest?  The #PF is an exit of that one then.
        """
        return self._async_pf.inject_not_present(self._vcpu(vcpu), token, cpl, in_l2=in_l2)

    def page_ready(self, vcpu: int, token: int) -> bool:
        """Prepare a page-ready event; the VMM then raises async_pf_vector(), or #PF by profile "document".

        False if the guest does not take it, or has not cleared its words after the last event: retry when it writes the
        ACK MSR.
        """
        return self._async_pf.page_ready(self._vcpu(vcpu), token)

    def wake_all(self, vcpu: int) -> bool:
        """As page_ready(), for all waiting tasks: after the guest enabled events, and after a restore."""
        return self._async_pf.page_ready(self._vcpu(vcpu), WAKE_ALL)

    def async_pf_vector(self, vcpu: int) -> int:
        """The interrupt vector of vCPU's page-ready events."""
        return self._async_pf.vector(self._vcpu(vcpu))

    def awaits_ack(self, vcpu: int) -> bool:
        """Is a page-ready event of vCPU not acknowledged yet?"""
        return self._async_pf.awaits_ack(self._vcpu(vcpu))

    def may_poll(self, vcpu: int) -> bool:
        """May the host poll for vCPU's wake-up while it is halted?"""
        return bool(self._switches.poll[self._vcpu(vcpu)])

    @property
    def may_migrate(self) -> bool:
        """Does the guest allow live migration?"""
        return bool(self._switches.migration[0])

    # Life

    @property
    def config(self) -> Mapping[str, int | bool | str]:
        """The options that make another one like it."""
        return {
            "features": int(self.features),
            "hints": int(self.hints),
            "enforce_cpuid": self._enforce_cpuid,
            "profile": self.profile,
            **({} if self.cpuid_base == CPUID_BASE else {"cpuid_base": self.cpuid_base}),
            **({"timing_leaf": offered, "apic_bus_hz": self._apic_bus_hz} if (offered := self._timing_leaf) else {}),
        }

    def replace(self, written: Mapping[str, MsrValue], begin: Callable[[], object], undo: Callable[[], object]) -> None:
        """Make `written` all that the guest has written, with those pages and no others, in one step.

        written: values of save(), by name; those that this profile does not have are ignored.  ConfigError, with
        nothing changed, for what a guest cannot have written.  begin, undo: see ClockServices.place_time_page().
        """
        before = self.save()

        def take() -> None:
            self._forget()
            self.load({**self.save(), **{name: value for name, value in written.items() if name in before}})
            begin()

        def take_back() -> None:
            undo()
            self.load(before)

        match written.get("system_time"):
            case tuple(system_time):
                self._kvmclock.replace_pages(system_time, take, take_back)
            case _:
                self._kvmclock.take_pages_back(take, take_back)

    def reset(self) -> None:
        """Go back to the state before any write, and take all pages back."""
        self._kvmclock.take_pages_back(self._forget, partial(self.load, self.save()))

    def _forget(self) -> None:
        for register in self._registers:
            register.reset()

    def save(self) -> Mapping[str, MsrValue]:
        """The guest's last writes, and the events that it has not answered."""
        return save_all(self._registers)

    def load(self, msrs: Mapping[str, object]) -> None:
        """Adopt what save() returned, also of version 1; the clock places the pages again."""
        names = frozenset(register.name for register in self._registers)
        load_all(self._registers, msrs, older=(SAVED_BY_VERSION_1, *(names - added for added in ADDED_TO_VERSION_2)))

    def save_unit(self) -> bytes:
        """See virtualbox_unit."""
        part = virtualbox_unit.part_of(self.clock.memory, self.save(), self._unit_features)
        return virtualbox_unit.encode(part)

    def load_unit(self, part: bytes, begin: Callable[[], object], undo: Callable[[], object]) -> None:
        """See Provider.  ConfigError for other features than CPUID has told the guest, but for profile "virtualbox"."""
        found = virtualbox_unit.decode(part, self._vcpus)
        here, before = int(self.features), self._unit_features
        if found.features != here and not self._profile.keeps_unit_features:
            raise ConfigError(
                f"the unit's guest was offered KVM features {found.features:#x}; this VM offers {here:#x}"
            )

        def take() -> None:
            self._unit_features = found.features
            begin()

        def take_back() -> None:
            undo()
            self._unit_features = before

        self.replace(virtualbox_unit.written_in(found), take, take_back)

    def _not_served(self, index: int, value: int | None = None) -> MsrFault:
        fault = MsrFault(index, value)
        if self._profile.tells_of_faults and index in FEATURE_OF_MSR:
            self._log(EventKind.REFUSED, str(fault))
        return fault

    def _vcpu(self, vcpu: int) -> int:
        if type(vcpu) is int and 0 <= vcpu < self._vcpus:  # the usual case, without a call
            return vcpu
        return vcpu_number(vcpu, self._vcpus)
