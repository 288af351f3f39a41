"""One VM's clock: its published timeline, its vCPUs' TSCs and the provider that its guest talks to, wired together.

This is what a VMM embeds.  It hands in guest memory and a backend, routes the guest's MSR accesses and CPUID leaves
here, and calls refresh() at least every `MAX_AGE_S`.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from functools import partial
from typing import Final, Self

from pvclock import catchup, clockstate
from pvclock._core import GUEST_STOPPED, TSC_STABLE_BIT, publish_wall_clock
from pvclock._memory import GuestMemory
from pvclock.backend import Backend
from pvclock.catchup import CatchUpTable, Policy, Slew
from pvclock.clockstate import (
    VERSION,
    ClockState,
    HostState,
    OfferState,
    ProviderState,
    SlewState,
    TimelineState,
    VcpuState,
)
from pvclock.discipline import Steering
from pvclock.disciplined import OFF
from pvclock.errors import ConfigError, MsrFault, RangeError, StateFileError
from pvclock.events import EventKind
from pvclock.hostwatch import HostWatch, Trouble, TroubleKind
from pvclock.providers import GuestInterface, combined
from pvclock.providers.interface import (
    CpuidLeaf,
    Engine,
    HypercallRegisters,
    HypercallResult,
    Pairing,
    VmmServices,
)
from pvclock.providers.kvm import KvmFeature, KvmProvider
from pvclock.published import MAX_AGE_S
from pvclock.quantities import NS_PER_S, U64_MASK, Gpa, HostTsc, RefNs
from pvclock.readings import HostStamps, Reference
from pvclock.sampling import SampleSource
from pvclock.timeline import Tempo, Timeline
from pvclock.tsc import MSR_IA32_TSC, MSR_IA32_TSC_ADJUST, VcpuTsc
from pvclock.tsctimeline import TscTimeline

__all__ = ["GUEST_STOPPED", "MAX_AGE_S", "TSC_STABLE_BIT", "GuestClock"]


PAGES_TOLD: Final = 20
"""A guest may place its pages for ever; it shall not fill the log with that."""


class GuestClock(TscTimeline):
    """The clock of one VM; guest time 0 is now.

    memory, vcpus: the VM's.  provider: "KVM", "Minimal" or "None", or a configuration of GuestInterface with more keys;
    further ones as keywords (`profile`, `features`, ...).  engine: who runs the guest, "library" for a VMM that serves
    all that it traps, "kvm" for /dev/kvm.  vmm: what that VMM does for hypercalls.
    reference: see follow().  tsc_offset: ticks added to the host's TSC on every vCPU.  offer_tsc_adjust,
    offer_invariant_tsc: what patch_cpuid() shows; a guest with an invariant TSC prefers its TSC to this clock.

    Thread-safety: all methods may be called from any thread, vCPU threads included; a vCPU's own `write_msr` must come
    while that vCPU is out of the guest, as it is after the exit.
    """

    def __init__(  # noqa: PLR0913  # a VM has so many facts; all but three are by keyword, and have defaults
        self,
        memory: GuestMemory,
        vcpus: int = 1,
        provider: str | Mapping[str, object] = "KVM",
        *,
        backend: Backend,
        engine: Engine | str = Engine.LIBRARY,
        vmm: VmmServices | None = None,
        reference: Reference | str | SampleSource = OFF,
        tsc_offset: int = 0,
        offer_tsc_adjust: bool = True,
        offer_invariant_tsc: bool = False,
        **provider_options: object,
    ) -> None:
        super().__init__(memory, vcpus, backend, tsc_offset)
        self.follow(reference)
        self.engine = _engine_named(engine)
        self.vmm = vmm
        self.quiesce = backend.quiesce
        self.offer_tsc_adjust = offer_tsc_adjust
        self.offer_invariant_tsc = offer_invariant_tsc
        self._host_trusted = True
        self._tsc_failed = False  # once, which no later look can make good
        self._wall_clock_gpa: Gpa | None = None
        self._pages_to_tell = PAGES_TOLD
        self._run_delays_ns = [0] * vcpus  # of which the guest was told
        self._saved_vcpus: tuple[VcpuState, ...] | None = None  # of a restored clock, until it is resumed
        self._interface = GuestInterface(
            combined(provider, provider_options),
            self,
            vcpus,
            tsc_usable=backend.tsc_stable,
            log=partial(self._tell, EventKind.START),
        )
        self._provider = self._interface.provider

    @property
    def interface(self) -> GuestInterface:
        """What the guest has to its clock: the provider, its statistics, the debug channel, VirtualBox's saved unit."""
        return self._interface

    # The guest's side

    def read_msr(self, vcpu: int, index: int) -> int:
        """RDMSR by vCPU's guest: 64 bits, or MsrFault for #GP."""
        tsc = self._tsc[self._vcpu(vcpu)]
        if index == MSR_IA32_TSC:
            return tsc.read(self._host_tsc())
        if index == MSR_IA32_TSC_ADJUST and self._has_adjust(index):
            return tsc.adjust
        return self._interface.read_msr(vcpu, index)

    def write_msr(self, vcpu: int, index: int, value: int) -> None:
        """WRMSR by vCPU's guest: `value` of 64 bits; MsrFault is #GP, with nothing changed."""
        self._vcpu(vcpu)
        if not 0 <= value <= U64_MASK:
            raise RangeError(f"WRMSR {index:#x} := {value:#x}; an MSR has 64 bits")
        with self._changing():
            if index == MSR_IA32_TSC:
                self._guest_write_tsc(vcpu, value)
            elif index == MSR_IA32_TSC_ADJUST and self._has_adjust(index, value):
                if self.offer_tsc_adjust:  # Linux ignores the write else
                    self._guest_write_adjust(vcpu, value)
            else:
                self._interface.write_msr(vcpu, index, value)

    def tick(self) -> Steering | None:
        """See DisciplinedTimeline; guests are told what was stolen from their vCPUs since the last tick, too."""
        found = super().tick()
        provider = self._provider
        if not isinstance(provider, KvmProvider) or KvmFeature.STEAL_TIME not in provider.features:
            return found
        with self._lock:
            for vcpu in range(self.vcpus):
                delay_ns = self.backend.run_delay_ns(vcpu)
                if delay_ns is not None and delay_ns > self._run_delays_ns[vcpu]:
                    provider.add_steal_time(vcpu, delay_ns - self._run_delays_ns[vcpu])
                    self._run_delays_ns[vcpu] = delay_ns
        return found

    def hypercall(self, vcpu: int, registers: HypercallRegisters) -> HypercallResult:
        """VMCALL or VMMCALL by vCPU's guest; see GuestInterface.hypercall(), and its execute() and handle_ud().

        The VMM's services are called without the clock's lock.
        """
        return self._interface.hypercall(vcpu, registers)

    def cpuid(self, leaf: int, subleaf: int = 0) -> CpuidLeaf | None:
        """The clock's own hypervisor leaf, or None where CPUID `leaf` is not the clock's to answer."""
        return self._interface.cpuid_leaves.get(leaf)

    @property
    def cpuid_leaves(self) -> dict[int, CpuidLeaf]:
        """All hypervisor leaves of the clock, by number."""
        return dict(self._interface.cpuid_leaves)

    def patch_cpuid(self, leaf: int, subleaf: int, registers: CpuidLeaf) -> CpuidLeaf:
        """The VMM's answer to an ordinary CPUID leaf with the bits in it that are the clock's business."""
        if leaf == 1:
            return registers._replace(ecx=_with_bit(registers.ecx, 31, bool(self._interface.cpuid_leaves)))
        if (leaf, subleaf) == (7, 0):
            return registers._replace(ebx=_with_bit(registers.ebx, 1, self.offer_tsc_adjust))
        if leaf == 0x80000007 and not self.offer_invariant_tsc:
            return registers._replace(edx=_with_bit(registers.edx, 8, False))
        return registers

    # The VMM's side

    def refresh(self, vcpu: int | None = None) -> None:
        """See PublishedTimeline; by profile "virtualbox" pages stay as they are, but for a slew that must end."""
        if self._provider.refreshes_pages or self._timeline.is_slewing:
            super().refresh(vcpu)

    def resume(self, policy: Policy | str | None = None, *, guest_stopped: bool = True) -> catchup.Settlement:
        """See ControlledTimeline; by profile "virtualbox" guests are not told that they were stopped."""
        return super().resume(policy, guest_stopped=guest_stopped and self._provider.tells_of_pauses)

    def save(self) -> ClockState:
        """The clock as it is now, or since it was paused: for restore(), on this host or another."""
        with self._lock:
            stamps = self._stopped_at or self.backend.stamps()
            timeline = self._timeline
            skew_ns, slew_policy = timeline.skew_at(stamps.tsc), timeline.slew_policy
            return ClockState(
                version=VERSION,
                provider=self._provider_state(),
                policy=catchup.describe(self.policy),
                timeline=TimelineState(timeline.at(stamps.tsc), timeline.tempo.dilation, self.is_paused),
                slew=None if slew_policy is None else SlewState(skew_ns, catchup.describe(slew_policy)),
                host=HostState(stamps.tsc, self.backend.tsc_hz, stamps.raw_ns, stamps.real_ns, stamps.boot_id),
                wall_clock_gpa=self._wall_clock_gpa,
                offers=OfferState(self.offer_tsc_adjust, self.offer_invariant_tsc),
                vcpus=tuple(self._vcpu_state(vcpu, stamps.tsc) for vcpu in range(self.vcpus)),
            )

    @classmethod
    def restore(
        cls,
        state: ClockState,
        memory: GuestMemory,
        *,
        backend: Backend,
        policy: Policy | str | None = None,
        engine: Engine | str = Engine.LIBRARY,
        vmm: VmmServices | None = None,
    ) -> Self:
        """The clock that was saved, paused: resume() settles by `policy`, or the state's own, what was missed since.

        memory: the VM's, as it was saved, too.  engine, vmm: GuestClock's; others than before, if need be.  Time
        missed is told by the raw clock within one boot of one host, and by UTC beyond it.  StateFileError if the state
        is unsound, or asks for what there is not here.
        """
        sound = clockstate.checked(state)
        clockstate.check_provider(sound)
        chosen = _policy_named("policy", sound.policy) if policy is None else catchup.as_policy(policy)
        slew = None if sound.slew is None else _policy_named("slew.policy", sound.slew.policy)
        _check_dilation(sound.timeline.dilation, backend.tsc_hz)
        try:
            clock = cls(
                memory,
                len(sound.vcpus),
                combined(sound.provider.name, sound.provider.config),
                backend=backend,
                engine=engine,
                vmm=vmm,
                offer_tsc_adjust=sound.offers.tsc_adjust,
                offer_invariant_tsc=sound.offers.invariant_tsc,
            )
            clock._provider.load(sound.provider.msrs)  # one of this class
            clock._take(sound, chosen, slew)  # one of this class
        except (ConfigError, RangeError) as error:
            raise StateFileError("provider", str(error), "what this host and this version can serve") from None
        return clock

    def reset(self) -> None:
        """The VM is reset: MSRs are as at its start, IA32_TSC_ADJUST and TSC_AUX too, and no page is kept.

        Guest time and TSCs go on; host_write_msr() sets a TSC.  For vCPUs that are out of the guest, paused or not.
        """
        with self._changing(), self.backend.quiesce(None):
            self._interface.reset()
            for tsc in self._tsc:
                tsc.host_write_adjust(0)
                tsc.aux = 0
            self._saved_vcpus = self._saved_vcpus and tuple(
                vcpu._replace(tsc_adjust=0, tsc_aux=0) for vcpu in self._saved_vcpus
            )
            self._wall_clock_gpa = None
            self._tell(EventKind.RESET, "reset()")

    def heed(self, watch: HostWatch, *, on_schedule: bool = True) -> list[Trouble]:
        """Look at the host, as often as `watch` was told: each trouble is an event, and takes STABLE if it must.

        on_schedule=False after a pause: the time since the last look is no stall then.
        """
        troubles = watch.look(on_schedule=on_schedule)
        self.note(troubles, host_trusted=watch.tsc_stable)
        return troubles

    def note(self, troubles: list[Trouble], *, host_trusted: bool) -> None:
        """As heed(), of what a look that serves several clocks has found."""
        with self._changing():
            for trouble in troubles:
                self._tell(EventKind(trouble.kind), trouble.why)
            self._tsc_failed |= any(each.unstable and each.kind is not TroubleKind.CLOCKSOURCE for each in troubles)
            trusted = host_trusted and not self._tsc_failed
            if self._host_trusted != trusted:
                self._host_trusted = trusted
                self._republish(None)

    # What the provider asks for (ClockServices)

    @property
    def tsc_hz(self) -> int:
        """The guest's TSC frequency: its host's."""
        return self.backend.tsc_hz

    def pairing(self, vcpu: int) -> Pairing | None:
        """One host instant as UTC and as vCPU's TSC; None where the host's TSC is not to be trusted."""
        if not (self._host_trusted and self.backend.tsc_stable):
            return None
        now = self.backend.sample(Reference.REALTIME)
        return Pairing(now.ns, self.guest_tsc(vcpu, now.tsc))

    def utc_ns(self) -> int:
        """UTC at this instant, in ns since 1970."""
        return self.backend.sample(Reference.REALTIME).ns

    def tell(self, kind: EventKind, why: str) -> None:
        """Record an event that leaves guest time alone, as of now."""
        self._tell(kind, why)

    @property
    def kernel_features(self) -> int:
        """KVM feature bits that the host kernel serves beside this engine."""
        return self.backend.kernel_features

    def place_time_page(self, vcpu: int, gpa: Gpa | None) -> None:
        """See ClockServices; the first PAGES_TOLD placements are events."""
        super().place_time_page(vcpu, gpa)
        if gpa is None or not self._pages_to_tell:
            return
        self._pages_to_tell -= 1
        page = self.page(vcpu)
        if page is None:
            self._tell(EventKind.REFUSED, f"vCPU {vcpu}: there is no memory for its clock's page at {gpa:#x}")
        elif page.tsc_to_system_mul:  # else it is published at resume()
            self._tell(EventKind.PAGE, f"vCPU {vcpu}: page at {gpa:#x}, {page.described()}")

    def write_wall_clock(self, gpa: Gpa) -> None:
        """Write the time of day of guest time 0 into the wall-clock record at `gpa`, once; ignored if not in memory."""
        self._wall_clock_gpa = gpa
        now = self.backend.sample(Reference.REALTIME)
        publish_wall_clock(self.memory, gpa, now.ns - self._timeline.at(now.tsc).__floor__())

    # Inside

    def _has_adjust(self, index: int, value: int | None = None) -> bool:
        """Is IA32_TSC_ADJUST there?  Hardware faults an access if CPUID says no, and so does profile "document"."""
        if not self.offer_tsc_adjust and self._interface.profile == "document":
            raise MsrFault(index, value)
        return True

    def _provider_state(self) -> ProviderState:
        provider = self._provider
        return ProviderState(provider.name, provider.version, self._interface.config, provider.save())

    def _vcpu_state(self, vcpu: int, host_tsc: HostTsc) -> VcpuState:
        tsc, gpa = self._tsc[vcpu], self._pages.registered(vcpu)
        if self._saved_vcpus is not None:
            return self._saved_vcpus[vcpu]._replace(time_page_gpa=gpa)
        return VcpuState(tsc.offset, tsc.adjust, tsc.aux, tsc.read(host_tsc), gpa)

    def _take(self, state: ClockState, policy: Policy, slew: Policy | None) -> None:
        """Become the paused clock of `state`, which is sound."""
        host, tsc = state.host, self._host_tsc()
        tempo = Tempo(state.timeline.dilation)
        self._timeline = Timeline(tsc, self.backend.tsc_hz, state.timeline.guest_ns, tempo)
        self._timeline.stop(tsc)
        if state.slew is not None and isinstance(slew, Slew | CatchUpTable):
            self._timeline.slew(tsc, state.slew.remaining_ns, slew)
        self._take_segment()
        boot_id = None if host.raw_ns is None else host.boot_id
        self._stopped_at = HostStamps(HostTsc(host.tsc), RefNs(host.raw_ns or 0), host.real_ns, boot_id)
        self._came_from_elsewhere = True
        self._policy, self._saved_vcpus = policy, state.vcpus
        self._wall_clock_gpa = None if state.wall_clock_gpa is None else Gpa(state.wall_clock_gpa)
        for vcpu, saved in enumerate(state.vcpus):
            self._pages.register(vcpu, saved.time_page_gpa)
        self._record(EventKind.RESTORE, f"saved on boot {host.boot_id}", tsc, self._moment(tsc))

    def _prepare_to_resume(self, tsc: HostTsc, gain_ns: Fraction) -> None:
        """Let restored guests' TSCs go on from where they were, by as much as their clock gains."""
        saved, self._saved_vcpus = self._saved_vcpus, None
        gain_ticks = int(gain_ns / self.dilation * self.backend.tsc_hz / NS_PER_S)
        for vcpu, state in enumerate(saved or ()):
            core = VcpuTsc(adjust=state.tsc_adjust, aux=state.tsc_aux)
            core.host_write_tsc((state.guest_tsc + gain_ticks) & U64_MASK, tsc)
            self._apply_guest_tsc(vcpu, core)

    @property
    def _offers_stable(self) -> bool:
        return self._offsets_agree and self._host_trusted and self._provider.allows_stable


def _check_dilation(dilation: Fraction, tsc_hz: int) -> None:
    try:
        Timeline(HostTsc(0), tsc_hz).check(dilation)
    except RangeError as error:
        raise StateFileError(
            "timeline.dilation", str(dilation), f"what a page can show at {tsc_hz} Hz: {error}"
        ) from None


def _engine_named(engine: Engine | str) -> Engine:
    if engine not in list(Engine):
        raise ConfigError(f"engine {engine!r}; choose from {', '.join(map(repr, map(str, Engine)))}")
    return Engine(engine)


def _policy_named(field: str, name: str) -> Policy:
    try:
        return catchup.parse(name)
    except (ConfigError, RangeError) as error:
        raise StateFileError(field, repr(name), str(error)) from None


def _with_bit(register: int, bit: int, is_set: bool) -> int:
    return register | 1 << bit if is_set else register & ~(1 << bit)
