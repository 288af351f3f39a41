"""The clock interface of one VM's guest: TSC MSRs, CPUID, the provider's surfaces, and the provider's ClockServices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Final

from pvclock.arguments import instance, whole
from pvclock.clock import reference_time
from pvclock.clock.capture import ClockParts
from pvclock.clock.follower import OFF
from pvclock.clock.placement import Placement
from pvclock.clock.provider_timers import ProviderTimers
from pvclock.clock.run_delays import RunDelays
from pvclock.clock.timekeeper import nothing
from pvclock.clock.usual_writes import tsc_writes
from pvclock.errors import MsrFault, RangeError, WrongType
from pvclock.msr_ranges import MsrRange
from pvclock.providers import guest_interface
from pvclock.providers.configuration import Configuration
from pvclock.providers.guest_interface import GuestInterface
from pvclock.providers.interface import CpuidLeaf, Hooks, OwnPage, Pairing, ReferenceTime, VcpuHost, VmmServices
from pvclock.providers.timing import CPUID_TIMING
from pvclock.quantities import U64_MASK, Gpa, GuestTsc
from pvclock.state.clock_state import OfferState, ProviderState
from pvclock.timekeeping.events import EventCause, EventKind
from pvclock.tsc.vcpu_tsc import MSR_IA32_TSC, MSR_IA32_TSC_ADJUST, MSR_TSC_AUX

__all__ = ["GuestSide", "usual_msr_ranges"]

TSC_MSR_RANGES: Final = (
    MsrRange(
        MSR_IA32_TSC, 1, reads=False, why="IA32_TSC: the engine sets the offset, or reports that the host has none"
    ),
    MsrRange(MSR_IA32_TSC_ADJUST, 1, why="IA32_TSC_ADJUST: part of that offset, and the kernel sees no write of it"),
)
"""The kernel keeps reads of the TSC, TSC_AUX, and the TSC deadline, whose fast path passes by the filter."""


class GuestSide:
    """The clock interface this guest sees: MSRs, CPUID, hypercalls.  Implements its provider's ClockServices.

    parts: the clock's.  config: GuestInterface's.  vcpu_host, vmm, tsc_hz: GuestClock's.  offers: what CPUID
    shows of the TSC.
    """

    def __init__(
        self,
        parts: ClockParts,
        config: Configuration,
        *,
        vcpu_host: VcpuHost,
        vmm: VmmServices | None,
        tsc_hz: int,
        offers: OfferState,
    ) -> None:
        self.vcpu_host = vcpu_host
        self.vmm = vmm
        self.tsc_hz = tsc_hz
        self.offers = offers
        self._keeper, self._tscs, self._host = parts.keeper, parts.tscs, parts.host
        self._operations, self._wall_clock, self._follower = parts.operations, parts.wall_clock, parts.follower
        self.memory = self._keeper.memory
        self._vcpus = self._keeper.vcpus
        self._backend = self._keeper.backend
        self.reference_clock = reference_time.ReferenceTime(self._keeper)
        """The VM's reference time; its line begins when a guest asks for it."""

        self._placement = Placement(self._keeper, self.own_page, self.reference_clock)
        self.kernel_features = _kernel_features(self._backend)
        """See ClockServices."""

        self.tsc_writes = tsc_writes(self._keeper, self._tscs, self._host, has_adjust=offers.tsc_adjust)
        """Serves the guest's usual TSC writes."""

        self._told_tsc_rate: bool | None = None  # what keeps_tsc_rate was when a page first told the guest its rate
        self.interface = GuestInterface(
            config,
            self,
            self._keeper.vcpus,
            tsc_usable=self._backend.tsc_stable,
            log=partial(self._keeper.tell, EventKind.START),
        )
        self._provider = self.interface.provider
        self.timers = ProviderTimers(self._keeper, self._provider.hooks)
        self.at_tick = self._hook_up(self._provider.hooks)
        """What the provider is told at each tick; None if nothing."""

    def _hook_up(self, hooks: Hooks) -> Callable[[], None] | None:
        self._keeper.time_changed = partial(self._tell_of_time, hooks.time_changed)
        if hooks.run_delay is None and hooks.tick is None:
            return None
        return partial(self._tell_at_tick, RunDelays(self._keeper), hooks)

    # What the guest does

    def read_msr(self, vcpu: int, index: int) -> int:
        """See GuestClock.read_msr()."""
        if not (type(vcpu) is type(index) is int and 0 <= vcpu < self._vcpus):
            vcpu, index = self._keeper.check_vcpu(vcpu), whole("index", index)
        if index == MSR_IA32_TSC:
            return self._tscs.read(vcpu, self._keeper.host_tsc())
        if index == MSR_IA32_TSC_ADJUST and self._has_adjust(index):
            return self._tscs.adjust(vcpu)
        if index == MSR_TSC_AUX:
            return self._tscs.aux(vcpu)
        return self.interface.read_msr(vcpu, index)

    def write_msr(self, vcpu: int, index: int, value: int) -> None:
        """See GuestClock.write_msr()."""
        if not (type(vcpu) is type(index) is type(value) is int and 0 <= vcpu < self._vcpus):
            vcpu, index, value = self._keeper.check_vcpu(vcpu), whole("index", index), whole("value", value)
        if not 0 <= value <= U64_MASK:
            raise RangeError(f"WRMSR {index:#x} := {value:#x}; an MSR has 64 bits")
        if index in (MSR_IA32_TSC, MSR_IA32_TSC_ADJUST) and self.tsc_writes.serve(vcpu, index, value):
            return
        with self._keeper.changing:
            if index in (MSR_IA32_TSC, MSR_IA32_TSC_ADJUST):
                self._host.check(vcpu)  # offsets and the TSC that they are added to belong together
            if index in (MSR_IA32_TSC, MSR_TSC_AUX):
                self._tscs.write(vcpu, index, value, EventCause.GUEST)
            elif index == MSR_IA32_TSC_ADJUST and self._has_adjust(index, value):
                if self.offers.tsc_adjust:  # otherwise Linux ignores the write
                    self._tscs.write(vcpu, index, value, EventCause.GUEST)
            else:
                self.interface.write_msr(vcpu, index, value)

    @property
    def msr_ranges(self) -> tuple[MsrRange, ...]:
        """See GuestClock.msr_ranges."""
        return TSC_MSR_RANGES + self.interface.msr_ranges

    def cpuid(self, leaf: int, subleaf: int) -> CpuidLeaf | None:
        """See GuestClock.cpuid()."""
        whole("subleaf", subleaf)
        return self.interface.cpuid_leaves.get(whole("leaf", leaf))

    def patched_cpuid(self, leaf: int, subleaf: int, registers: CpuidLeaf) -> CpuidLeaf:
        """See GuestClock.patch_cpuid()."""
        leaf, subleaf = whole("leaf", leaf), whole("subleaf", subleaf)
        instance("registers", registers, CpuidLeaf)
        if leaf == 1:
            return registers._replace(ecx=_with_bit(registers.ecx, 31, bool(self.interface.cpuid_leaves)))
        if (leaf, subleaf) == (7, 0):
            return registers._replace(ebx=_with_bit(registers.ebx, 1, self.offers.tsc_adjust))
        if leaf == 0x80000007 and not (self.offers.invariant_tsc and self._provider.shows_invariant_tsc):
            return registers._replace(edx=_with_bit(registers.edx, 8, False))
        return registers

    # What the clock tells it

    @property
    def allows_stable(self) -> bool:
        """May pages say TSC_STABLE if the vCPUs' TSCs agree?"""
        return self._provider.allows_stable

    @property
    def tells_of_pauses(self) -> bool:
        """Is GUEST_STOPPED set after a pause?"""
        return self._provider.tells_of_pauses

    @property
    def lives_by_tsc(self) -> bool:
        """May the guest use its TSC as its clock, instead of pages?"""
        return self.offers.invariant_tsc or self.interface.guest_lives_by_tsc

    @property
    def is_told_tsc_hz(self) -> bool:
        """Does the guest live by its TSC, or do its CPUID leaves tell it that TSC's frequency?"""
        return self.lives_by_tsc or CPUID_TIMING in self.interface.cpuid_leaves

    def _tell_at_tick(self, run_delays: RunDelays, hooks: Hooks) -> None:
        with self._keeper.changing:
            if hooks.run_delay is not None and not self._keeper.is_paused:
                run_delays.tell(hooks.run_delay)
            if hooks.tick is not None:
                hooks.tick()

    def _tell_of_time(self, time_changed: Callable[[bool], object] | None, is_paused: bool) -> None:
        if time_changed is not None:
            time_changed(is_paused)
        self.timers.changed()

    def reset(self) -> None:
        """See GuestClock.reset(); for with_vcpus_out()."""
        self._keeper.check_vcpus_out("reset")
        event = self._keeper.event(EventKind.RESET, "reset()", self._backend.stamps())
        self._keeper.record((event,), self._forget_all)

    def own_page(self, vcpu: int) -> OwnPage | None:
        """What vCPU's page shows if it has a line of its own."""
        return self._provider.own_page(vcpu)

    def saved(self) -> ProviderState:
        """The provider as it is saved."""
        return ProviderState(self._provider.name, self._provider.version, self.interface.config, self._provider.save())

    def load(self, state: ProviderState) -> None:
        """Adopt what the guest had written when it was saved."""
        self._told_tsc_rate = False
        self._provider.load(state.msrs)

    # ClockServices

    @property
    def host_tsc_hz(self) -> int:
        """The frequency at which guests' TSCs run here."""
        return self._backend.tsc_hz

    def place_time_page(
        self,
        vcpu: int,
        gpa: Gpa | None,
        begin: Callable[[], object] = nothing,
        undo: Callable[[], object] = nothing,
    ) -> None:
        """Keep vCPU's pvclock page at `gpa` from now on (None: nowhere), and publish; the first ones are events.

        begin: applies what changes along with the page, before the publish.  undo: reverts that if the publish fails.
        """
        self.place_time_pages({vcpu: gpa}, begin, undo, vcpu)

    def place_time_pages(
        self,
        pages: Mapping[int, Gpa | None],
        begin: Callable[[], object],
        undo: Callable[[], object],
        vcpu: int | None = None,
    ) -> None:
        """As place_time_page(), for several vCPUs in one step.  vcpu: the caller's own, which is out of the guest."""
        with self._keeper.changing:
            self._placement.place(pages, begin, undo, vcpu)
            if any(gpa is not None for gpa in pages.values()):
                self._told_tsc_rate = self.keeps_tsc_rate

    def place_reference_page(
        self,
        gpa: Gpa | None,
        begin: Callable[[], object] = nothing,
        undo: Callable[[], object] = nothing,
        vcpu: int | None = None,
    ) -> None:
        """Keep the VM's reference TSC page at `gpa` from now on (None: nowhere), and publish; see ClockServices."""
        with self._keeper.changing:
            self._placement.place_reference_page(gpa, begin, undo, vcpu)

    def reference_units(self, vcpu: int) -> int:
        """The VM's reference time now; see ClockServices."""
        return self.reference_clock.units(vcpu)

    @property
    def reference_time(self) -> ReferenceTime:
        """The VM's reference time, to be saved."""
        with self._keeper.changing:
            return ReferenceTime(*self.reference_clock.shown)

    def adopt_reference_time(self, saved: ReferenceTime, gpa: Gpa | None) -> None:
        """Go on from a saved reference time; see ClockServices."""
        self.reference_clock.adopt(*saved, gpa)

    @property
    def keeps_tsc_rate(self) -> bool:
        """Does guest time go on at its TSC's own rate?  See ClockServices."""
        return self._runs_at_tsc_rate() if self._told_tsc_rate is None else self._told_tsc_rate

    def guest_tsc(self, vcpu: int) -> GuestTsc:
        """What vCPU's TSC reads at this instant."""
        return GuestTsc(self._tscs.read(vcpu, self._keeper.host_tsc()))

    def keep_time_page(self, vcpu: int, begin: Callable[[], object], undo: Callable[[], object]) -> None:
        """Publish with vCPU's page where it is; begin, undo: as place_time_page()."""
        with self._keeper.changing:
            self._keeper.publish_with(begin, undo, tuple, vcpu)

    def refresh(self, vcpu: int | None = None) -> None:
        """See GuestClock.refresh()."""
        if vcpu is not None:
            self._keeper.check_vcpu(vcpu)
        if self._provider.refreshes_pages or self._keeper.timeline.is_slewing:
            self._operations.refresh(vcpu)

    def timers_changed(self) -> None:
        """What Hooks.next_due_ns returns may have changed."""
        self.timers.changed()

    def write_wall_clock(self, gpa: Gpa, on_commit: Callable[[], object] = nothing) -> None:
        """Write the time of day of guest time 0 into the wall-clock record at `gpa`, once; ignored if not in memory.

        on_commit: applies what changes along with it, at the point where nothing can fail any more.
        """
        with self._keeper.changing:
            self._wall_clock.write(gpa, self._host.utc_sample(), on_commit)

    def utc_ns(self) -> int:
        """The guest's time of day at this instant, in ns since 1970."""
        with self._keeper.changing:
            return self._wall_clock.time_of_day_ns(self._host.utc_sample())

    def quiesce(self, vcpu: int | None) -> AbstractContextManager[None]:
        """Keep all vCPUs out of the guest meanwhile; `vcpu`, the caller's own, is out already."""
        return self._backend.quiesce(vcpu)

    def tell(self, kind: EventKind, why: str) -> None:
        """Record an event that the guest caused now, and that leaves guest time alone."""
        with self._keeper.changing:
            self._keeper.tell(kind, why, EventCause.GUEST)

    def pairing(self, vcpu: int) -> Pairing | None:
        """One instant as the guest's time of day and as vCPU's TSC; None if the host's TSC is not reliable."""
        self._keeper.check_vcpu(vcpu)
        with self._keeper.changing:
            sample = self._host.utc_sample(vcpu)
            if not (self._host.is_trusted and self._backend.tsc_stable):
                return None
            return Pairing(self._wall_clock.time_of_day_ns(sample), self._tscs.read(vcpu, sample.tsc))

    # Inside

    def _runs_at_tsc_rate(self) -> bool:
        """Do the guest's clock and its TSC have the host TSC's own rate, which its guest is told?"""
        backend = self._backend
        return (
            backend.tsc_stable
            and backend.counter_follows_host
            and self.tsc_hz == backend.tsc_hz
            and self._keeper.timeline.terms.dilation == 1
            and self._follower.reference == OFF
        )

    def _has_adjust(self, index: int, value: int | None = None) -> bool:
        """True if IA32_TSC_ADJUST is served.  Hardware and profile "document" fault an access if CPUID lacks it."""
        if not self.offers.tsc_adjust and self.interface.profile == "document":
            raise MsrFault(index, value)
        return True

    def _forget_all(self) -> None:
        self.interface.reset()
        self._tscs.reset()
        self._wall_clock.gpa = None


def usual_msr_ranges() -> tuple[MsrRange, ...]:
    """What GuestClock.msr_ranges is unless options of its provider change it: known before there is a clock."""
    return TSC_MSR_RANGES + guest_interface.usual_msr_ranges()


def _kernel_features(backend: object) -> Mapping[str, int]:
    features = getattr(backend, "kernel_features", {})
    if not isinstance(features, Mapping):
        raise WrongType("backend.kernel_features", features, "a mapping of providers' names to feature words")
    return features


def _with_bit(register: int, bit: int, is_set: bool) -> int:
    return register | 1 << bit if is_set else register & ~(1 << bit)
