"""One VM's clock: its timeline and pages, its vCPUs' TSCs and the provider that its guest talks to, wired together.

This is what a VMM embeds.  It hands in guest memory and a backend, routes the guest's MSR accesses and CPUID leaves
here, and calls tick() every second or so.  Each part owns its state and is in `pvclock.clock`; this is their face.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import cache
from typing import Literal, Self

from pvclock._core import GUEST_STOPPED, TSC_STABLE_BIT
from pvclock._memory import GuestMemory
from pvclock._scale import ClockScale
from pvclock._transaction import attempt
from pvclock.arguments import flag, instance, instances, serving, whole
from pvclock.clock import capture
from pvclock.clock.capture import ClockParts
from pvclock.clock.event_log import EventLog
from pvclock.clock.follower import OFF, Follower, source_of
from pvclock.clock.guest_side import GuestSide
from pvclock.clock.host_trust import HostTrust
from pvclock.clock.live_clock import Succession
from pvclock.clock.operations import Operations
from pvclock.clock.pause_resume import PauseResume
from pvclock.clock.timekeeper import MAX_AGE_S, Timekeeper, checked_vcpus
from pvclock.clock.vcpu_tscs import VcpuTscs
from pvclock.clock.wall_clock import WallClock, WallClockBase
from pvclock.errors import ConfigError, RangeError, StateFileError, TscOffsetNotHonoured, WrongType
from pvclock.host.backend import Backend
from pvclock.host.watch import HostWatch, Trouble
from pvclock.msr_ranges import MsrRange
from pvclock.providers.configuration import checked, combined
from pvclock.providers.guest_interface import GuestInterface
from pvclock.providers.interface import (
    CpuidLeaf,
    Engine,
    HypercallRegisters,
    HypercallResult,
    Pairing,
    VmmServices,
)
from pvclock.quantities import U64_MASK, GuestNs, GuestTsc, HostTsc, quoted
from pvclock.readings import ClockLine, Reading, Reference, RunReport, TimeInfo
from pvclock.state import clock_state
from pvclock.state.clock_state import ClockState, OfferState
from pvclock.timekeeping.catchup import CatchUp, Policy, as_policy
from pvclock.timekeeping.discipline import MAX_PPM, Steering
from pvclock.timekeeping.events import EventCause, EventKind
from pvclock.timekeeping.sampling import SampleSource
from pvclock.tsc.agreement import OffsetWrite
from pvclock.tsc.vcpu_tsc import VcpuTsc

__all__ = ["GUEST_STOPPED", "MAX_AGE_S", "TSC_STABLE_BIT", "GuestClock"]


class GuestClock:
    """The clock of one VM; guest time 0 is now.

    memory, vcpus: the VM's; at most 4096.  provider: "KVM", "Minimal" or "None", or a configuration of GuestInterface
    with more keys; further ones as keywords (`profile`, `features`, ...).  engine: who runs the guest, "library" for a
    VMM that serves all that it traps, "kvm" for /dev/kvm.  vmm: what that VMM does for hypercalls.
    reference: see follow().  tsc_offset: ticks added to the host's TSC on every vCPU; None leaves the offsets that they
    have.  offer_tsc_adjust,
    offer_invariant_tsc: what patch_cpuid() shows; a guest with an invariant TSC prefers its TSC to this clock.
    tsc_hz: the TSC frequency that the guest is told, if it is told any; the host's by default.
    ConfigError where the backend knows its vCPUs, or who runs them, and the clock is given others.

    A memory has one live clock: a new one takes over, and operations of the one before are StateErrors from then on.

    Thread-safety: all methods may be called from any thread, vCPU threads included; a vCPU's own `write_msr` must come
    while that vCPU is out of the guest, as it is after the exit.  Callbacks (the memory's on_dirty, subscribers) are
    called when an operation is whole and recorded; what on_dirty raises comes out of it then.
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
        tsc_offset: int | None = 0,
        offer_tsc_adjust: bool = True,
        offer_invariant_tsc: bool = False,
        tsc_hz: int | None = None,
        **provider_options: object,
    ) -> None:
        self.memory = instance("memory", memory, GuestMemory)
        self.vcpus = checked_vcpus(vcpus)
        self.backend = _checked_backend(backend)
        self.engine = _engine_named(engine)
        self.vmm = None if vmm is None else _checked_vmm(vmm)
        self.tsc_hz = backend.tsc_hz if tsc_hz is None else whole("tsc_hz", tsc_hz, 1, U64_MASK)
        """The TSC frequency that the guest was told: that of the host on which it began."""

        _check_agreement(backend, self.vcpus, self.engine)
        config = combined(provider, provider_options)
        chosen = checked(config, _own_keywords() if provider_options else "")
        offers = _checked_offers(offer_tsc_adjust, offer_invariant_tsc)
        self._keeper = Timekeeper(
            memory,
            self.vcpus,
            backend,
            chosen.provider,
            stable=self._is_stable,
            tsc_is_good=self._tsc_is_good,
        )
        self._parts = _parts_of(self._keeper, tsc_offset)
        self._tscs, self._host, self._operations = self._parts.tscs, self._parts.host, self._parts.operations
        self._pause_resume, self._follower = self._parts.pause_resume, self._parts.follower
        self._wall_clock = self._parts.wall_clock
        self._follower.follow(reference)

        # The compiled method itself, in place of the Python one around it, which would cost as much again.
        self.read = self._keeper.pages.read  # type: ignore[method-assign]  # it is the same call
        self._guest = GuestSide(self._parts, chosen, engine=self.engine, vmm=vmm, tsc_hz=self.tsc_hz, offers=offers)
        if tsc_offset is not None:
            self._tscs.begin()
        self._keeper.take_over()

    # What time it is

    def now(self) -> GuestNs:
        """Guest time at this instant by the timeline itself, page or no page."""
        return self._keeper.now()

    def at(self, host_tsc: HostTsc) -> Fraction:
        """Guest time in ns at `host_tsc`, exactly: by the present segment, or the one of that time.

        RangeError before the oldest of the last 256 segments, and for what no TSC can be: 0 to 2^64 - 1.
        """
        return self._keeper.at(HostTsc(whole("host_tsc", host_tsc, 0, U64_MASK)))

    def read(self, vcpu: int) -> GuestNs:
        """What vCPU's guest would compute at this instant, or at that of the pause, in ns; it takes no lock.

        StateError before the guest registered a page; RangeError for a vCPU that is not there.
        """
        return self._keeper.pages.read(vcpu)

    def reading(self, vcpu: int) -> Reading:
        """As `read`, with the guest TSC, the page's version and its flags."""
        return self._keeper.pages.reading(vcpu)

    def shown_at(self, host_tsc: HostTsc) -> GuestNs:
        """What a guest computes at `host_tsc` from the pages as published last, in ns."""
        return self._keeper.shown_at(host_tsc)

    def page(self, vcpu: int) -> TimeInfo | None:
        """vCPU's page as it lies in guest memory; None if it has none there."""
        return self._keeper.page(vcpu)

    @property
    def events(self) -> EventLog:
        """What happened to this VM's time."""
        return self._keeper.events

    @property
    def line(self) -> ClockLine:
        """The timeline's present segment."""
        return self._keeper.state.line

    @property
    def scale(self) -> ClockScale:
        """The (mul, shift) that pages show."""
        return self._keeper.state.scale

    @property
    def dilation(self) -> Fraction:
        """Guest seconds in a host second, without any slew."""
        return self._keeper.timeline.terms.dilation

    @property
    def rate(self) -> Fraction:
        """The same with what a slew and a discipline add or take now; in effect unless paused."""
        return self._keeper.timeline.rate

    @property
    def is_paused(self) -> bool:
        """Does guest time stand still?"""
        return self._keeper.is_paused

    @property
    def skew_ns(self) -> Fraction:
        """What a slew still has to add to guest time, in ns; negative for a clock that is ahead."""
        return self._keeper.timeline.skew_at(self._keeper.host_tsc())

    # What a VMM does to time

    def tick(self) -> Steering | None:
        """Look at the host and the reference, correct the rate if need be, and republish; call it every second.

        Call it every second or so, at least every MAX_AGE_S of guest time, as refresh(), which it includes.  Guests are
        told what was stolen from their vCPUs since the last tick.  Returns what was found, None without a reference.
        What an injected source raises comes out; the clock has kept its rate then, and is republished.  While another
        thread's tick takes its sample, this one publishes without one.
        """
        try:
            return self._follower.tick(self._host.examine, self.refresh)
        finally:
            if self._guest.at_tick is not None:
                self._guest.at_tick()

    def refresh(self, vcpu: int | None = None) -> None:
        """Re-anchor and publish all pages; the clock goes on by 0 or +1 ns at the break, and a slew by its plan.

        vcpu: a vCPU that is out of the guest, the caller's own, whose flags can be written too.  Nothing while paused,
        or from a CPU whose TSC is behind the others'.  By profile "virtualbox" pages stay as they are.
        """
        self._guest.refresh(vcpu)

    def follow(
        self, reference: Reference | str | SampleSource, *, max_ppm: float = MAX_PPM, panic_ns: int | None = None
    ) -> None:
        """From now on let guest time keep step with a reference, as far as tick() is called; "off" ends that.

        A guest second is then a second of the reference, times the dilation.  Guest time is taken as right at the first
        tick, and is never stepped: a reference that is set is slewed after, its own rate included within max_ppm of
        nominal.  panic_ns: unless it is further off than this; then the rate is kept, and it is an event.  A callable
        gives samples of the caller's, whose TSCs rise.  ConfigError for any other reference, or where time passes only
        while the guest executes; RangeError for max_ppm and panic_ns.
        """
        with self._keeper.changing:
            self._host.require("follow")
            self._follower.follow(reference, max_ppm=max_ppm, panic_ns=panic_ns)

    @property
    def reference(self) -> str:
        """What is followed: "off", a Reference or "injected"."""
        return self._follower.reference

    @property
    def steering(self) -> Steering | None:
        """What the last tick found and did; None before the first, and while nothing is followed."""
        return self._follower.steering

    @property
    def policy(self) -> Policy:
        """What becomes of missed time where resume() is not told; settable, by name too.  Saved with the clock."""
        return self._pause_resume.policy

    @policy.setter
    def policy(self, policy: Policy | str) -> None:
        self._pause_resume.policy = policy

    @property
    def sleep_policy(self) -> Policy:
        """What becomes of a host's sleep that the VM runs through; freeze at first; settable, by name too.

        Where the TSC counts on in a sleep guests have that time, whatever this says.
        """
        return self._host.sleep_policy

    @sleep_policy.setter
    def sleep_policy(self, policy: Policy | str) -> None:
        self._host.sleep_policy = as_policy(policy)

    @property
    def wall_clock(self) -> WallClockBase:
        """What the guest's time of day is made of; settable, from the guest's next question on."""
        return self._wall_clock.base

    @wall_clock.setter
    def wall_clock(self, base: WallClockBase) -> None:
        self._wall_clock.base = base

    def dilate(self, numerator: int, denominator: int = 1) -> None:
        """Let guest time run at numerator/denominator of host time from now on, without a step.

        RangeError if no page can show that rate, or what a slew may make of it, or for terms beyond 64 bits.
        """
        self._operations.dilate(numerator, denominator)

    def slew(self, target_ns: int, max_ppm: int = 500) -> None:
        """Give guest time `target_ns` more than it would have (less, if negative), by running max_ppm off its rate.

        Adds to what is still being slewed; call refresh() at least every 2 s of host time until it is done.
        RangeError if all of it is 2^64 ns or more.
        """
        self._operations.slew(target_ns, max_ppm)

    def skip(self, ns: int) -> None:
        """Put guest time forward by `ns` at once."""
        self._operations.skip(ns)

    def offset(self, ns: int) -> None:
        """Add `ns` to guest time at once; a negative one only while nobody saw it: before any page, not once restored.

        RangeError if it would take back what a guest may have read, or make guest time negative.
        """
        self._operations.offset(ns)

    def pause(self) -> None:
        """Stop guest time at this instant.  For a VM whose vCPUs have left the guest and stay out until resume().

        StateError if it is paused, or if the backend's vCPUs run.
        """
        self._pause_resume.pause()

    def resume(self, policy: Policy | str | None = None, *, guest_stopped: bool = True) -> CatchUp:
        """Let guest time go on; `policy` says what becomes of the time missed, the clock's own if it is not given.

        Pages are published before this returns, so let vCPUs in afterwards.  guest_stopped: tell guests that they were
        stopped, which keeps their watchdogs quiet, but not by profile "virtualbox".  StateError if it is not paused.
        """
        told = flag("guest_stopped", guest_stopped) and self._guest.tells_of_pauses
        return self._pause_resume.resume(policy, guest_stopped=told)

    def run_for(self, ns: int, policy: Policy | str | None = None) -> RunReport:
        """Let a paused VM run for `ns` of guest time, and pause it: at that time or later.

        policy: as for resume(), of the time missed before; what it gains at once is not part of `ns`.  The overshoot
        stays in guest time and is reported; on a simulated backend it is below a tick.  RangeError beyond 2^62 ticks of
        the host; meanwhile pause(), resume() and another run_for() are StateErrors.
        """
        return self._pause_resume.run_for(ns, policy)

    def reset(self) -> None:
        """The VM is reset: MSRs are as at its start, IA32_TSC_ADJUST and TSC_AUX too, and no page is kept.

        Guest time and TSCs go on; host_write_msr() sets a TSC.  For vCPUs that are out of the guest, paused or not:
        StateError if the backend's run.
        """
        with self._keeper.changing:
            self._keeper.with_vcpus_out(None, self._guest.reset)

    # The vCPUs' TSCs

    def tsc(self, vcpu: int) -> VcpuTsc:
        """A copy of vCPU's TSC state; of a restored clock, until it is resumed, what reads as it was saved now."""
        return self._tscs.at(vcpu, self._keeper.host_tsc())

    def guest_tsc(self, vcpu: int, host_tsc: HostTsc) -> GuestTsc:
        """What vCPU's RDTSC returns at `host_tsc`; that of a restored clock stands until it is resumed."""
        return self._tscs.read(vcpu, HostTsc(whole("host_tsc", host_tsc)))

    @property
    def refused_offset(self) -> TscOffsetNotHonoured | None:
        """The last TSC offset that this host could not give."""
        return self._tscs.refused_offset

    def host_write_msr(self, vcpu: int, index: int, value: int) -> None:
        """Restore IA32_TSC, IA32_TSC_ADJUST or TSC_AUX, each without touching another, as KVM_SET_MSRS does.

        A restored clock that is not resumed yet takes the TSC as the one to go on from.  TscOffsetNotHonoured if the
        host cannot; RangeError for any other MSR; StateError on a CPU whose TSC is behind the others'.
        """
        with self._keeper.changing:
            self._host.require("host_write_msr")
            self._tscs.write(vcpu, index, value, EventCause.VMM)

    def repair_tsc(self, *, target: int | None = None, adjust: Literal["keep", "carry"] = "keep") -> list[OffsetWrite]:
        """Put all vCPUs' TSCs on one offset, and give STABLE back; returns what was written.

        target: that offset, the one furthest ahead by default, so that no guest's TSC goes back.  adjust: see
        tsc.agreement.repair_plan(), whose errors come out, as TscOffsetNotHonoured does; nothing has changed then.
        """
        with self._keeper.changing:
            self._host.require("repair_tsc")
            return self._tscs.repair(target=target, adjust=adjust)

    # The guest's side

    @property
    def interface(self) -> GuestInterface:
        """The clock interface that this guest sees: provider, statistics, debug channel, VirtualBox's saved unit."""
        return self._guest.interface

    def read_msr(self, vcpu: int, index: int) -> int:
        """RDMSR by vCPU's guest: 64 bits, or MsrFault for #GP."""
        return self._guest.read_msr(vcpu, index)

    def write_msr(self, vcpu: int, index: int, value: int) -> None:
        """WRMSR by vCPU's guest: `value` of 64 bits; MsrFault is #GP, with nothing changed."""
        self._guest.write_msr(vcpu, index, value)

    def hypercall(self, vcpu: int, registers: HypercallRegisters) -> HypercallResult:
        """VMCALL or VMMCALL by vCPU's guest; see GuestInterface.hypercall(), and its execute() and handle_ud().

        The VMM's services are called without the clock's lock.
        """
        return self.interface.hypercall(vcpu, registers)

    @property
    def msr_ranges(self) -> tuple[MsrRange, ...]:
        """The MSR accesses to route to read_msr() and write_msr() where vCPUs run on /dev/kvm: see kvm.exit_on_msrs().

        Those of interfaces that this guest has not, too: the kernel would serve them.
        """
        return self._guest.msr_ranges

    def cpuid(self, leaf: int, subleaf: int = 0) -> CpuidLeaf | None:
        """The clock's own hypervisor leaf, or None where CPUID `leaf` is not the clock's to answer."""
        return self._guest.cpuid(leaf, subleaf)

    @property
    def cpuid_leaves(self) -> dict[int, CpuidLeaf]:
        """All hypervisor leaves of the clock, by number."""
        return dict(self.interface.cpuid_leaves)

    def patch_cpuid(self, leaf: int, subleaf: int, registers: CpuidLeaf) -> CpuidLeaf:
        """The VMM's answer to an ordinary CPUID leaf with the bits in it that are the clock's business."""
        return self._guest.patched_cpuid(leaf, subleaf, registers)

    # Saved and restored

    def save(self) -> ClockState:
        """The clock as it is now, or since it was paused: for restore(), on this host or another."""
        with self._keeper.changing:
            if not self.is_paused:
                self._host.require("save")
            return capture.capture(self._parts, self._guest.saved(), self._guest.offers, self.tsc_hz)

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
        reference: Reference | str | SampleSource | None = None,
        any_tsc_hz: bool = False,
    ) -> Self:
        """The clock that was saved, paused: resume() settles by `policy`, or the state's own, what was missed since.

        memory: the VM's, as it was saved, too; a clock that it has is taken over from.  engine, vmm: GuestClock's;
        others than before, if need be.  reference: what to follow; what was followed by default, and where that cannot
        be it is an event.  any_tsc_hz: take a host whose TSC is more than 250 ppm off the frequency that a guest was
        told that lives by it.  Time missed is told by the raw clock and the time asleep within one boot of one host,
        and by UTC beyond it.  StateFileError if the state is unsound, or asks for what there is not here.
        """
        _check_restore(memory, backend, engine, reference, any_tsc_hz=any_tsc_hz)
        sound = clock_state.checked(state)
        clock_state.check_provider(sound)
        _check_agreement(backend, len(sound.vcpus), _engine_named(engine))
        chosen = sound.policy.known("policy") if policy is None else as_policy(policy)
        capture.check_dilation(sound, backend.tsc_hz)
        succession = Succession(memory, backend)

        def make(_: Callable[[], None]) -> Self:  # type: ignore[type-var]  # that of the method around it
            clock = cls(
                memory,
                len(sound.vcpus),
                combined(sound.provider.name, sound.provider.config),
                backend=backend,
                engine=engine,
                vmm=vmm,
                tsc_offset=None,  # resume() sets them; until then another clock's may be in use
                offer_tsc_adjust=sound.offers.tsc_adjust,
                offer_invariant_tsc=sound.offers.invariant_tsc,
                tsc_hz=sound.guest_tsc_hz or sound.host.tsc_hz,
            )
            clock._become(sound, chosen, reference, any_tsc_hz=any_tsc_hz)  # one of this class
            succession.accept(clock._keeper.live)
            return clock

        try:
            return attempt(succession.begin, succession.undo, make)
        except (ConfigError, RangeError) as error:
            raise StateFileError("provider", str(error), "what this host and this version can serve") from None

    # Host trouble

    def check_host(self, watch: HostWatch, *, on_schedule: bool = True) -> list[Trouble]:
        """Look at the host, as often as `watch` was told: each trouble is an event, and takes STABLE if it must.

        on_schedule=False after a pause: the time since the last look is no stall then.
        """
        instance("watch", watch, HostWatch)
        troubles = watch.check(on_schedule=on_schedule)
        self.apply_host_findings(troubles, host_trusted=watch.tsc_stable)
        return troubles

    def apply_host_findings(self, troubles: list[Trouble], *, host_trusted: bool) -> None:
        """Apply what a look at the host has found that serves several clocks; see check_host()."""
        instances("troubles", troubles, Trouble)
        with self._keeper.changing:
            self._host.apply_host_findings(troubles, clocksource_trusted=flag("host_trusted", host_trusted))

    def pairing(self, vcpu: int) -> Pairing | None:
        """One instant as the guest's time of day and as vCPU's TSC; None where the host's TSC is not to be trusted."""
        return self._guest.pairing(vcpu)

    # Inside

    def _is_stable(self) -> bool:
        return self._tscs.agree and self._host.is_trusted and self._guest.allows_stable

    def _tsc_is_good(self, vcpu: int | None) -> bool:
        return self._host.check(vcpu)

    def _become(
        self,
        state: ClockState,
        policy: Policy,
        reference: Reference | str | SampleSource | None,
        *,
        any_tsc_hz: bool,
    ) -> None:
        """Be the paused clock that was saved as `state`, which is sound."""
        with self._keeper.changing:
            told = ""
            if self._guest.lives_by_tsc:
                told = capture.check_tsc_hz(state, self.backend.tsc_hz, any_tsc_hz=any_tsc_hz)
            self._guest.load(state.provider)
            capture.take(self._parts, state, policy, self._guest.own_page)
            if told:
                self._keeper.tell(EventKind.TSC_RATE, told)
            if reference is not None:
                self.follow(reference)
            else:
                capture.follow_again(self._parts, state)


def _parts_of(keeper: Timekeeper, tsc_offset: int | None) -> ClockParts:
    tscs, follower = VcpuTscs(keeper, tsc_offset), Follower(keeper)
    host = HostTrust(keeper, tscs, follower)
    return ClockParts(
        keeper,
        tscs,
        host,
        Operations(keeper, host),
        PauseResume(keeper, host, tscs, follower),
        follower,
        WallClock(keeper),
    )


def _engine_named(engine: Engine | str) -> Engine:
    words = ", ".join(map(repr, map(str, Engine)))
    if not isinstance(engine, str):
        raise WrongType("engine", engine, words)
    if engine not in list(Engine):
        raise ConfigError(f"engine {quoted(engine)}; choose from {words}")
    return Engine(engine)


def _checked_offers(tsc_adjust: bool, invariant_tsc: bool) -> OfferState:  # as they are checked
    return OfferState(flag("offer_tsc_adjust", tsc_adjust), flag("offer_invariant_tsc", invariant_tsc))


def _check_restore(
    memory: GuestMemory,
    backend: Backend,
    engine: Engine | str,
    reference: Reference | str | SampleSource | None,
    *,
    any_tsc_hz: bool,
) -> None:
    """What the caller says wrong is no fault of the state."""
    instance("memory", memory, GuestMemory)
    _checked_backend(backend)
    _engine_named(engine)
    flag("any_tsc_hz", any_tsc_hz)
    if reference is not None:
        source_of(reference, backend)


def _check_agreement(backend: Backend, vcpus: int, engine: Engine) -> None:
    """ConfigError where a backend that knows its vCPUs, and who runs them, has others than the clock."""
    has = getattr(backend, "vcpu_count", None)
    if has is not None and has != vcpus:
        raise ConfigError(f"a clock of {vcpus} vCPUs on a backend of {has}, which its Runner runs; both are the VM's")
    runs = getattr(backend, "guest_engine", None)
    if runs is not None and runs != engine:
        raise ConfigError(f"engine {str(engine)!r} on a backend whose vCPUs run on {runs!r}; give engine={runs!r}")


@cache
def _own_keywords() -> str:
    """GuestClock's own keywords, for the error about a mistyped one."""
    own = [name for name in GuestClock.__init__.__annotations__ if name not in ("provider_options", "return")]
    restores = [name for name in GuestClock.restore.__annotations__ if name not in (*own, "state", "return")]
    return f"; GuestClock itself takes {', '.join(own)}, and a saved clock's restore() {' and '.join(restores)}"


def _checked_backend(backend: Backend) -> Backend:
    wanted = "a Backend: SimulatedBackend(), HostBackend(), KvmBackend() or one of the VMM's"
    return serving("backend", backend, "sample", "stamps", "set_tsc_offset", "quiesce", wanted=wanted)


def _checked_vmm(vmm: VmmServices) -> VmmServices:
    return serving(
        "vmm", vmm, "kick", "yield_to", "send_ipi", wanted="an object with kick(), yield_to() and send_ipi()"
    )
