"""The KVM provider: which of its surfaces a guest of this VM has, and what the VMM tells them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from pvclock.errors import ConfigError, MsrFault, RangeError
from pvclock.providers import timing
from pvclock.providers.interface import ClockServices, CpuidLeaf, HypercallRegisters, HypercallResult, MsrValue
from pvclock.providers.kvm.async_pf import WAKE_ALL, AsyncPf
from pvclock.providers.kvm.features import (
    FEATURE_OF_MSR,
    MSR_RANGES,
    KvmFeature,
    KvmHint,
    default_features,
    kvm_cpuid_leaves,
    names_of,
    servable_features,
)
from pvclock.providers.kvm.guest_log import GuestLog
from pvclock.providers.kvm.guest_switches import Controls
from pvclock.providers.kvm.hypercalls import Hypercalls
from pvclock.providers.kvm.kvmclock import KvmClock
from pvclock.providers.kvm.msr_state import Surface, load_all, save_all
from pvclock.providers.kvm.profiles import PROFILES
from pvclock.providers.kvm.pv_eoi import PvEoi
from pvclock.providers.kvm.steal_time import StealTime
from pvclock.quantities import quoted
from pvclock.timekeeping.events import EventKind

__all__ = ["KvmProvider"]

SAVED_BY_VERSION_1: Final = frozenset({"system_time", "wall_clock", "boot_vcpu_runs_old_kvmclock"})
ADDED_TO_VERSION_2: Final = frozenset({"time_page_flags"})


class KvmProvider:
    """KVM's paravirtual interface of one VM: clock, steal time, EOI, page faults, hypercalls.

    features: what CPUID offers; None for the clock, steal time (not on KVM, where it is offered only if asked for) and
    what the host kernel serves beside the engine.  hints: CPUID's, see KvmHint.
    enforce_cpuid: an MSR or hypercall whose feature is not offered is refused; False is Linux without
    KVM_CAP_ENFORCE_PV_FEATURE_CPUID, where all that can be served is.
    profile: "linux", "document" or "virtualbox", see pvclock.providers.kvm.profiles.  version: of the interface, as
    configured; profile "virtualbox" alone looks at it.
    timing_leaf: is there leaf 0x40000010, too, with the frequencies of TSC and APIC bus (`apic_bus_hz`, 1 GHz by
    default)?  A guest that goes by it takes its TSC, and leaves every clock policy.

    ConfigError for what cannot be served here, naming what can.
    """

    name = "KVM"
    number = 3
    version = 2
    msr_ranges = MSR_RANGES
    publishes_time = True

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
        timing_leaf: bool = False,
        apic_bus_hz: int | None = None,
    ) -> None:
        if profile not in PROFILES:
            raise ConfigError(f"profile {quoted(profile)} is unknown; choose from {', '.join(map(repr, PROFILES))}")
        if hints & ~sum(KvmHint):
            raise ConfigError(f"hints {hints:#x} are unknown; choose from {KvmHint(sum(KvmHint)).name}")
        self.clock, self.hints, self.profile = clock, KvmHint(hints), profile
        self._vcpus, self._enforce_cpuid, self._profile = vcpus, enforce_cpuid, PROFILES[profile]
        servable = servable_features(clock) & self._profile.features
        self.features = self._default(servable, version) if features is None else KvmFeature(features)
        if int(self.features) & ~int(servable):  # ints: ~ of an IntFlag has only the bits that have names
            refused = names_of(int(self.features) & ~int(servable))
            raise ConfigError(f"features {refused} cannot be served here; choose from {names_of(servable)}")
        # Asked at every publish, where a look into a flag enum costs as much as the publish itself.
        self._offers_stable = KvmFeature.CLOCKSOURCE_STABLE in self.features
        self.refreshes_pages, self.tells_of_pauses = self._profile.refreshes_pages, self._profile.tells_of_pauses
        if apic_bus_hz is not None and not timing_leaf:
            raise ConfigError(
                f"apic_bus_hz is {apic_bus_hz}; only leaf 0x40000010 says it, which timing_leaf=True offers"
            )
        self._apic_bus_hz = timing.APIC_BUS_HZ if apic_bus_hz is None else apic_bus_hz
        self._timing = timing.timing_leaf(clock.tsc_hz, self._apic_bus_hz) if timing_leaf else None
        self._log = GuestLog(clock)
        self._make_surfaces(self.features if enforce_cpuid else servable)

    def _default(self, servable: KvmFeature, version: int) -> KvmFeature:
        """What is offered unasked."""
        if self._profile.features_of_newest_only and version:
            return servable & KvmFeature.CLOCKSOURCE_STABLE
        return servable if self._profile.offers_all else servable & default_features(self.clock)

    def _make_surfaces(self, features: KvmFeature) -> None:
        clock, vcpus, profile = self.clock, self._vcpus, self._profile
        self._kvmclock = KvmClock(clock, vcpus, profile, self._log)
        serves_flush = KvmFeature.PV_TLB_FLUSH in features
        self._steal_time = StealTime(clock.memory, vcpus, profile, serves_flush=serves_flush)
        self._pv_eoi = PvEoi(clock.memory, vcpus)
        self._async_pf = AsyncPf(clock.memory, vcpus, profile, features)
        self._controls = Controls(vcpus)
        self._hypercalls = Hypercalls(clock, vcpus, profile, features)
        surfaces: tuple[Surface, ...]
        surfaces = (self._kvmclock, self._steal_time, self._pv_eoi, self._async_pf, self._controls)
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
        """Signature "KVMKVMKVM", the feature word and the hints; the timing leaf on request."""
        features = int(self.features)
        if self._profile.stable_by_host and self.clock.pairing(0) is None:
            features &= ~KvmFeature.CLOCKSOURCE_STABLE
        leaves = kvm_cpuid_leaves(features, self.hints)
        return leaves if self._timing is None else timing.with_timing_leaf(leaves, self._timing)

    @property
    def allows_stable(self) -> bool:
        """Only if offered (or by profile), and not to a boot vCPU with the old MSRs."""
        if self._profile.stable_unasked:
            return True
        return self._offers_stable and not self._kvmclock.boot_vcpu_runs_old_kvmclock

    def read_msr(self, vcpu: int, index: int) -> int:
        """The value last written, whatever became of it; old and new numbers share it."""
        msr = self._msrs.get(index)
        if msr is None:
            raise self._not_served(index)
        return 0 if msr.register is None else msr.register[vcpu]

    def write_msr(self, vcpu: int, index: int, value: int) -> None:
        """MsrFault where Linux refuses the value; an address of the clock that is no good is ignored."""
        msr = self._msrs.get(index)
        if msr is None:
            raise self._not_served(index, value)
        msr.write(vcpu, index, value)

    def hypercall(self, vcpu: int, registers: HypercallRegisters) -> HypercallResult:
        """The guest's VMCALL or VMMCALL; unknown ones, and those not offered, are -KVM_ENOSYS."""
        return self._hypercalls.call(self._vcpu(vcpu), registers)

    # What a kernel would feed

    def add_steal_time(self, vcpu: int, ns: int) -> bool:
        """On vCPU's way in: it could have run for `ns` more, and did not.  Time that it was idle does not count.

        True if its guest asked for a TLB flush meanwhile (PV_TLB_FLUSH): flush before it runs.  Nothing where the guest
        has no record.  RangeError for a vCPU that is not there, or `ns` beyond 64 bits.
        """
        return self._steal_time.add(self._vcpu(vcpu), ns)

    def steal_time(self, vcpu: int, ns: int) -> Callable[[], None]:
        """What adds `ns` to vCPU's steal time, in one step that no interrupt takes apart, if its guest has a record.

        vCPU may be out of the guest, and stays so: only add_steal_time() and set_preempted() say that it runs.
        """
        return self._steal_time.addition(self._vcpu(vcpu), ns)

    def set_preempted(self, vcpu: int, preempted: bool) -> bool:
        """vCPU was scheduled out though it could run (True), or runs again (False); the latter as add_steal_time()."""
        return self._steal_time.set_preempted(self._vcpu(vcpu), preempted)

    def offer_eoi(self, vcpu: int) -> bool:
        """At injection of an interrupt whose end needs no exit: tell vCPU's guest.  False if it cannot be told."""
        return self._pv_eoi.offer(self._vcpu(vcpu))

    def take_eoi(self, vcpu: int) -> bool:
        """At vCPU's next exit: True if its guest has ended the interrupt.

        Else it has not, and will do so by an exit: the offer is withdrawn, or there was none.
        """
        return self._pv_eoi.take(self._vcpu(vcpu))

    def inject_not_present(self, vcpu: int, token: int, cpl: int, *, in_l2: bool = False) -> bool:
        """Tell vCPU's guest, at `cpl`, that it touched a page that is not there: inject #PF with CR2 = `token`.

        False where the guest cannot be told: halt the vCPU until the page is there.  token: 1 to 2^32 - 2, else
        RangeError.  in_l2: does it run a guest of its own?  That #PF is then an exit of that one.
        """
        return self._async_pf.inject_not_present(self._vcpu(vcpu), token, cpl, in_l2=in_l2)

    def page_ready(self, vcpu: int, token: int) -> bool:
        """Tell vCPU's guest that the page of `token` is there: raise async_pf_vector(), or #PF by profile "document".

        False where the guest cannot be told, or has not taken the last event from its words: try again when it writes
        the ACK MSR.
        """
        return self._async_pf.page_ready(self._vcpu(vcpu), token)

    def wake_all(self, vcpu: int) -> bool:
        """As page_ready(), for all who wait: after the guest enabled events, and after a restore."""
        return self._async_pf.page_ready(self._vcpu(vcpu), WAKE_ALL)

    def async_pf_vector(self, vcpu: int) -> int:
        """The interrupt by which vCPU's guest wants to hear that a page is ready."""
        return self._async_pf.vector(self._vcpu(vcpu))

    def awaits_ack(self, vcpu: int) -> bool:
        """Was vCPU's guest told of a page that is ready, and has not acknowledged it?"""
        return self._async_pf.awaits_ack(self._vcpu(vcpu))

    def may_poll(self, vcpu: int) -> bool:
        """May the host poll for vCPU's wake-up while it is halted?"""
        return bool(self._controls.poll[self._vcpu(vcpu)])

    @property
    def may_migrate(self) -> bool:
        """Does the guest allow live migration?"""
        return bool(self._controls.migration[0])

    # Life

    @property
    def config(self) -> Mapping[str, int | bool | str]:
        """The options that make another one like it."""
        return {
            "features": int(self.features),
            "hints": int(self.hints),
            "enforce_cpuid": self._enforce_cpuid,
            "profile": self.profile,
            **self._timing_config,
        }

    @property
    def _timing_config(self) -> Mapping[str, int | bool]:
        if self._timing is None:
            return {}
        return {"timing_leaf": True, "apic_bus_hz": self._apic_bus_hz}

    def replace(self, written: Mapping[str, MsrValue], begin: Callable[[], object], undo: Callable[[], object]) -> None:
        """As nothing had been written but this, with those pages and no others, in one step.

        written: values of save(), by name; those that this profile does not have are left out.  ConfigError, and
        nothing changed, for what a guest could not have written.  begin: what changes with it; undo: takes that back
        where it could not be.
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
        """As nothing had been written, with every page taken back."""
        self._kvmclock.take_pages_back(self._forget, partial(self.load, self.save()))

    def _forget(self) -> None:
        for register in self._registers:
            register.reset()

    def save(self) -> Mapping[str, MsrValue]:
        """What the guest wrote last, and what it has not answered."""
        return save_all(self._registers)

    def load(self, msrs: Mapping[str, object]) -> None:
        """Take what save() gave, of version 1 as well; pages are the clock's to place again."""
        names = frozenset(register.name for register in self._registers)
        load_all(self._registers, msrs, older=(SAVED_BY_VERSION_1, names - ADDED_TO_VERSION_2))

    def _not_served(self, index: int, value: int | None = None) -> MsrFault:
        fault = MsrFault(index, value)
        if self._profile.tells_of_faults and index in FEATURE_OF_MSR:
            self._log(EventKind.REFUSED, str(fault))
        return fault

    def _vcpu(self, vcpu: int) -> int:
        if not 0 <= vcpu < self._vcpus:
            raise RangeError(f"vCPU {vcpu}; this VM has vCPUs 0 to {self._vcpus - 1}")
        return vcpu
