"""One VM's clock, the class that a VMM embeds: timeline, pages, the vCPUs' TSCs and the guest's clock interface.

The VMM passes guest memory and a backend, routes the guest's MSR accesses and CPUID leaves here, and calls tick() every
second.  The parts in `pvclock.clock` own the state; `GuestClock` is their facade.
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
from pvclock.clock.live_clock import Takeover
from pvclock.clock.loading import load
from pvclock.clock.operations import DilationLimit, Operations
from pvclock.clock.pause_resume import PauseResume
from pvclock.clock.reference_time import ReferenceTime
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
    HypercallRegisters,
    HypercallResult,
    Pairing,
    VcpuHost,
    VmmServices,
)
from pvclock.quantities import U64_MASK, GuestNs, GuestTsc, HostTsc, quoted, shown
from pvclock.readings import ClockLine, Reading, Reference, RunReport, TimeInfo
from pvclock.state import clock_state
from pvclock.state.clock_state import ClockState, OfferState
from pvclock.timekeeping.catchup import CatchUp, Policy, as_policy
from pvclock.timekeeping.discipline import MAX_PPM, Steering
from pvclock.timekeeping.events import EventCause
from pvclock.timekeeping.sampling import SampleSource
from pvclock.tsc.agreement import OffsetWrite
from pvclock.tsc.vcpu_tsc import VcpuTsc

__all__ = ["GUEST_STOPPED", "MAX_AGE_S", "TSC_STABLE_BIT", "GuestClock"]


class GuestClock:
    """The clock of one VM; guest time 0 is the instant of construction.

    memory: the VM's.  vcpus: their number, 1 to 4096.  vcpus_present: how many of them there are from the start, all
    by default; add_vcpu() brings the others.  provider: "KVM", "Minimal" or "None", or a GuestInterface
    configuration; further keys of that may be keywords (`profile`, `features`, ...).  vcpu_host: "emulator" for
    a VMM that emulates CPUs, "kvm" for /dev/kvm.  vmm: the VMM's services for hypercalls.
    reference: see follow().  tsc_offset: ticks added to the host's TSC on every vCPU; None keeps the offsets that the
    vCPUs have.  offer_tsc_adjust, offer_invariant_tsc: features that patch_cpuid() shows; a guest with an invariant TSC
    prefers its TSC to this clock.  tsc_hz: the TSC frequency told to the guest; by default the host's.
    ConfigError if the backend knows its number of vCPUs or its vCPU host, and they differ from the arguments.

    A memory has one live clock.  A new one takes over, and operations on the previous one are StateErrors from then on.

    Thread-safety: all methods may be called from any thread, vCPU threads included.  Call a vCPU's own `write_msr`
    while that vCPU is out of the guest, as it is after its exit.  An operation calls back (the memory's on_dirty,
    subscribers) after it has taken effect and is recorded; it raises what on_dirty raises.
    """

    def __init__(  # noqa: PLR0913  # all but three are keywords with defaults
        self,
        memory: GuestMemory,
        vcpus: int = 1,
        provider: str | Mapping[str, object] = "KVM",
        *,
        backend: Backend,
        vcpu_host: VcpuHost | str = VcpuHost.EMULATOR,
        vmm: VmmServices | None = None,
        reference: Reference | str | SampleSource = OFF,
        tsc_offset: int | None = 0,
        offer_tsc_adjust: bool = True,
        offer_invariant_tsc: bool = False,
        tsc_hz: int | None = None,
        vcpus_present: int | None = None,
        **provider_options: object,
    ) -> None:
        self.memory = instance("memory", memory, GuestMemory)
        self.vcpus = checked_vcpus(vcpus)
        self.backend = _checked_backend(backend)
        self.vcpu_host = _vcpu_host_named(vcpu_host)
        self.vmm = None if vmm is None else _checked_vmm(vmm)
        self.tsc_hz = backend.tsc_hz if tsc_hz is None else whole("tsc_hz", tsc_hz, 1, U64_MASK)
        """The TSC frequency that the guest was told, in Hz: that of the host on which it started."""

        present = _checked_present(vcpus_present, self.vcpus)
        _check_agreement(backend, present, self.vcpu_host)
        chosen = checked(combined(provider, provider_options), _own_keywords() if provider_options else "")
        offers = _checked_offers(offer_tsc_adjust, offer_invariant_tsc)
        self._keeper = Timekeeper(
            memory,
            self.vcpus,
            backend,
            chosen.provider,
            in_step=lambda: self._host.has_tscs_in_step,
            allows_stable=lambda: self._guest.allows_stable,
            tsc_is_good=lambda vcpu: self._host.check(vcpu),  # noqa: PLW0108  # there is no host yet
        )
        self._parts = _parts_of(self._keeper, tsc_offset, present)
        _, self._tscs, self._host, self._operations, self._pause_resume, self._follower, self._wall_clock = self._parts
        self._follower.follow(reference)

        # Bind the compiled method over the Python one, which would double the cost of a call.
        self.read = self._keeper.pages.read  # type: ignore[method-assign]  # it is the same call
        self._guest = GuestSide(
            self._parts, chosen, vcpu_host=self.vcpu_host, vmm=vmm, tsc_hz=self.tsc_hz, offers=offers
        )
        self.timers = self._guest.timers
        """The timers of the guest's interface: when the next one is due, and who is told that this changed."""

        if tsc_offset is not None:
            self._tscs.begin()
        self._keeper.take_over()

    # What time it is

    def now(self) -> GuestNs:
        """Guest time now, in ns, from the timeline rather than a page."""
        return self._keeper.now()

    def at(self, host_tsc: HostTsc) -> Fraction:
        """Guest time in ns at `host_tsc`, exact, from the segment in effect then.

        RangeError before the oldest of the last 256 segments, and outside 0 to 2^64 - 1.
        """
        return self._keeper.at(HostTsc(whole("host_tsc", host_tsc, 0, U64_MASK)))

    def read(self, vcpu: int) -> GuestNs:
        """The ns that vCPU's guest would compute now, or computed at the pause.  Takes no lock.

        StateError before the guest has registered a page; RangeError for a vCPU that does not exist.
        """
        return self._keeper.pages.read(vcpu)

    def reading(self, vcpu: int) -> Reading:
        """As read(), with the guest TSC and the page's version and flags."""
        return self._keeper.pages.reading(vcpu)

    def shown_at(self, host_tsc: HostTsc) -> GuestNs:
        """The ns that a guest computes at `host_tsc` from the pages last published."""
        return self._keeper.shown_at(host_tsc)

    def page(self, vcpu: int) -> TimeInfo | None:
        """vCPU's page as read from guest memory; None if there is none."""
        return self._keeper.page(vcpu)

    @property
    def reference_time(self) -> ReferenceTime:
        """Guest time in units of 100 ns, as the counter and the page of a guest of Hyper-V's kind show it."""
        return self._guest.reference_clock

    @property
    def events(self) -> EventLog:
        """The log of what happened to this VM's time."""
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
        """Guest seconds per host second as set by dilate(), without slew or discipline."""
        return self._keeper.timeline.terms.dilation

    @property
    def rate(self) -> Fraction:
        """Guest seconds per host second, with slew and discipline; takes effect while not paused."""
        return self._keeper.timeline.rate

    @property
    def is_paused(self) -> bool:
        """True while guest time is stopped."""
        return self._keeper.is_paused

    @property
    def skew_ns(self) -> Fraction:
        """The part of a slew still to be applied, in ns; negative if guest time is to lose it."""
        return self._keeper.timeline.skew_at(self._keeper.host_tsc())

    # What a VMM does to time

    def tick(self) -> Steering | None:
        """Check the host, sample the reference, correct the rate, refresh() the pages and report stolen time.

        Call it every second, and at least every MAX_AGE_S seconds of guest time.  Returns the discipline's result, None
        without a reference.  An error of an injected source is raised after the pages have been republished at the
        known rate.  While another thread's tick samples, this one publishes without a sample.
        """
        try:
            return self._follower.tick(self._host.examine, self.refresh)
        finally:
            if self._guest.at_tick is not None:
                self._guest.at_tick()

    def refresh(self, vcpu: int | None = None) -> None:
        """Re-anchor and publish all pages, and continue a slew.  Guest time moves by 0 or +1 ns at the break point.

        vcpu: the caller's own, which is out of the guest, so that its flags can be written too.  Does nothing while
        paused, or on a CPU whose TSC is behind the others'.  Profile "virtualbox" leaves pages as they are.
        """
        self._guest.refresh(vcpu)

    def follow(
        self, reference: Reference | str | SampleSource, *, max_ppm: float = MAX_PPM, panic_ns: int | None = None
    ) -> None:
        """Discipline guest time to a reference at each tick(); "off" ends that.

        A guest second becomes a second of the reference times the dilation.  The first tick takes guest time as right;
        it is never stepped.  If the reference is set, guest time slews after it, within max_ppm of the nominal rate in
        total.  panic_ns: beyond this error the clock keeps its rate instead, and records an event.  A callable is the
        caller's own source; its samples' TSCs must rise.  ConfigError for any other reference, and on an execution-time
        backend; RangeError for max_ppm and panic_ns.
        """
        with self._keeper.changing:
            self._host.require("follow")
            self._follower.follow(reference, max_ppm=max_ppm, panic_ns=panic_ns)

    @property
    def reference(self) -> str:
        """The reference followed: "off", a Reference or "injected"."""
        return self._follower.reference

    @property
    def steering(self) -> Steering | None:
        """The last tick's result; None before the first, and without a reference."""
        return self._follower.steering

    @property
    def policy(self) -> Policy:
        """The default catch-up policy of resume(); settable, also by name.  Saved with the clock."""
        return self._pause_resume.policy

    @policy.setter
    def policy(self, policy: Policy | str) -> None:
        self._pause_resume.policy = policy

    @property
    def sleep_policy(self) -> Policy:
        """The catch-up policy for a host sleep while the VM runs; initially freeze; settable, also by name.

        If the TSC counts through the sleep, guests get that time whatever the policy.
        """
        return self._host.sleep_policy

    @sleep_policy.setter
    def sleep_policy(self, policy: Policy | str) -> None:
        self._host.sleep_policy = as_policy(policy)

    @property
    def wall_clock(self) -> WallClockBase:
        """The source of the guest's time of day; settable, effective at the guest's next request."""
        return self._wall_clock.base

    @wall_clock.setter
    def wall_clock(self, base: WallClockBase) -> None:
        self._wall_clock.base = base

    def limit_dilation(self, limit: DilationLimit | None) -> None:
        """Let dilate() ask `limit` first, of what the VMM knows of its guest; None, as at the start: nobody."""
        self._operations.limit_dilation(limit)

    def dilate(self, numerator: int, denominator: int = 1, *, force: bool = False) -> None:
        """Run guest time at numerator/denominator of host time from now on, without a step.

        RangeError if a page cannot show that rate, with a slew on top, or if a term exceeds 64 bits; and, unless
        `force`, beyond what limit_dilation() has set.
        """
        self._operations.dilate(numerator, denominator, force=force)

    def slew(self, target_ns: int, max_ppm: int = 500) -> None:
        """Move guest time by `target_ns`, which may be negative, by running max_ppm off its rate.

        Adds to a pending slew.  Call refresh() at least every 2 s of host time until it is done.  RangeError if the
        total reaches 2^64 ns.
        """
        self._operations.slew(target_ns, max_ppm)

    def skip(self, ns: int) -> None:
        """Step guest time forward by `ns`; RangeError if negative or beyond 2^64 ns of guest time."""
        self._operations.skip(ns)

    def travel(self, ticks: int, why: str = "") -> None:
        """Let so many ticks of the TSC have passed at once: guest time and all vCPUs' TSCs move forward together.

        For a guest that waits: see timekeeping.travel, which also says what becomes of its timers.  The clock moves by
        what the ticks are at its rate, without a slew.  why: for the event, which is a skip's.  The vCPUs are out of
        the guest meanwhile.  TscOffsetNotHonoured with nothing changed; RangeError as for skip(), and from 2^63 ticks
        on; StateError while paused.
        """
        self._operations.travel(ticks, why)

    def offset(self, ns: int) -> None:
        """Step guest time by `ns`; by a negative one only before any page is published, and not in a restored clock.

        RangeError if it would go back below what a guest may have read, or below 0.
        """
        self._operations.offset(ns)

    def pause(self) -> None:
        """Stop guest time now.  The vCPUs must be out of the guest, and stay out until resume().

        StateError if already paused, or if the backend's vCPUs run.
        """
        self._pause_resume.pause()

    def resume(self, policy: Policy | str | None = None, *, guest_stopped: bool = True) -> CatchUp:
        """Start guest time again; `policy`, by default the clock's own, handles the time missed.

        Pages are published before this returns, so let vCPUs in afterwards.  guest_stopped: set GUEST_STOPPED, which
        keeps guests' watchdogs quiet; profile "virtualbox" never does.  StateError if not paused.
        """
        guest_stopped = flag("guest_stopped", guest_stopped) and self._guest.tells_of_pauses
        return self._pause_resume.resume(policy, guest_stopped=guest_stopped)

    def run_for(self, ns: int, policy: Policy | str | None = None) -> RunReport:
        """Let a paused VM run for at least `ns` of guest time, then pause it.

        policy: as for resume(), for the time missed before; its step is not part of `ns`.  The overshoot stays in guest
        time and is reported; on a simulated backend it is below a tick.  RangeError beyond 2^62 ticks of the host.
        While it runs, pause(), resume() and another run_for() are StateErrors.
        """
        return self._pause_resume.run_for(ns, policy)

    def reset(self) -> None:
        """Reset the clock's MSRs, IA32_TSC_ADJUST and TSC_AUX included, to their initial values; pages are dropped.

        Guest time and TSCs keep running; host_write_msr() sets a TSC.  The vCPUs must be out of the guest, paused or
        not: StateError if the backend's run.
        """
        with self._keeper.changing:
            self._keeper.with_vcpus_out(None, self._guest.reset)

    # The vCPUs' TSCs

    def tsc(self, vcpu: int) -> VcpuTsc:
        """A copy of vCPU's TSC state.  In a restored clock not yet resumed it reads, at this instant, as saved."""
        return self._tscs.at(vcpu, self._keeper.host_tsc())

    def guest_tsc(self, vcpu: int, host_tsc: HostTsc) -> GuestTsc:
        """What vCPU's RDTSC returns at `host_tsc`; in a restored clock not yet resumed, the saved value."""
        return self._tscs.read(vcpu, HostTsc(whole("host_tsc", host_tsc)))

    @property
    def refused_offset(self) -> TscOffsetNotHonoured | None:
        """The last TSC offset that this host did not honour."""
        return self._tscs.refused_offset

    def host_write_msr(self, vcpu: int, index: int, value: int) -> None:
        """Set IA32_TSC, IA32_TSC_ADJUST or TSC_AUX without touching the other two, as KVM_SET_MSRS does.

        In a restored clock not yet resumed, the TSC starts from that value at resume().  TscOffsetNotHonoured if the
        host does not honour the offset; RangeError for any other MSR; StateError on a CPU whose TSC is behind.
        """
        with self._keeper.changing:
            self._host.require("host_write_msr")
            self._tscs.write(vcpu, index, value, EventCause.VMM)

    def repair_tsc(self, *, target: int | None = None, adjust: Literal["keep", "carry"] = "keep") -> list[OffsetWrite]:
        """Set all vCPUs' TSCs to one offset, which restores STABLE; returns the offsets written.

        target: that offset; by default the one furthest ahead, so that no guest's TSC goes back.  adjust: see
        tsc.agreement.repair_plan().  Raises its errors and TscOffsetNotHonoured, with nothing changed.
        """
        with self._keeper.changing:
            self._host.require("repair_tsc")
            return self._tscs.repair(target=target, adjust=adjust)

    @property
    def vcpus_present(self) -> int:
        """How many vCPUs there are: up to `vcpus`."""
        return self._tscs.present

    def add_vcpu(self) -> int:
        """Let the next vCPU be there, which has not run yet; returns its number.

        Its TSC and IA32_TSC_ADJUST are vCPU 0's from now on, TSC_AUX is 0.  The backend has it already.  StateError if
        all `vcpus` are there, and on a CPU whose TSC is behind; TscOffsetNotHonoured with nothing changed.
        """
        with self._keeper.changing:
            self._host.require("add_vcpu")
            return self._keeper.with_vcpus_out(None, self._tscs.add)

    # The guest's side

    @property
    def interface(self) -> GuestInterface:
        """The guest's clock interface: provider, statistics, debug channel, VirtualBox's saved unit."""
        return self._guest.interface

    def read_msr(self, vcpu: int, index: int) -> int:
        """RDMSR by vCPU's guest: a 64-bit value, or MsrFault for #GP."""
        return self._guest.read_msr(vcpu, index)

    def write_msr(self, vcpu: int, index: int, value: int) -> None:
        """WRMSR of a 64-bit value by vCPU's guest; MsrFault for #GP, with nothing changed."""
        self._guest.write_msr(vcpu, index, value)

    @property
    def serve_tsc_write(self) -> Callable[[int, int, int], bool]:
        """What serves a guest's usual writes of IA32_TSC and IA32_TSC_ADJUST: for Runner.serve_writes().

        (vcpu, index, value) -> False, with nothing changed, if write_msr() is to do it.  It does not wait for a thread
        that changes this clock.
        """
        return self._guest.tsc_writes.serve

    def hypercall(self, vcpu: int, registers: HypercallRegisters) -> HypercallResult:
        """VMCALL or VMMCALL by vCPU's guest; see GuestInterface.hypercall(), execute() and handle_ud().

        Calls the VMM's services without the clock's lock.
        """
        return self.interface.hypercall(vcpu, registers)

    @property
    def msr_ranges(self) -> tuple[MsrRange, ...]:
        """The MSR accesses that must exit to read_msr() and write_msr() on /dev/kvm: see kvm.exit_on_msrs().

        Includes MSRs of interfaces that this guest is not offered, since the kernel would serve them.
        """
        return self._guest.msr_ranges

    def cpuid(self, leaf: int, subleaf: int = 0) -> CpuidLeaf | None:
        """The hypervisor leaf `leaf`, or None if the clock does not define it."""
        return self._guest.cpuid(leaf, subleaf)

    @property
    def cpuid_leaves(self) -> dict[int, CpuidLeaf]:
        """All hypervisor leaves that the clock defines, by number."""
        return dict(self.interface.cpuid_leaves)

    def patch_cpuid(self, leaf: int, subleaf: int, registers: CpuidLeaf) -> CpuidLeaf:
        """The VMM's `registers` for an ordinary CPUID leaf, with the clock's bits set or cleared."""
        return self._guest.patched_cpuid(leaf, subleaf, registers)

    def expire_timers(self) -> GuestNs | None:
        """Expire the interface's timers that are due now; returns the guest time in ns at which the next one is due.

        None if none is set, or while paused.  For VMMs that do without a TimerThread: call it when that time has come,
        and when timers.watch() says so.  Interrupts are raised by the VMM's services without the clock's lock, so call
        it without that, too; raises what they raise, with the timers expired.
        """
        return self.timers.expire()

    # Saved and restored

    def save(self) -> ClockState:
        """The clock's state now, or as of its pause, for restore() on this host or another."""
        with self._keeper.changing:
            if not self.is_paused:
                self._host.require("save")
            return capture.capture(self._parts, self._guest.saved(), self._guest.offers, self.tsc_hz)

    @classmethod
    def restore(  # noqa: PLR0913  # all but two are keywords, most with defaults
        cls,
        state: ClockState,
        memory: GuestMemory,
        *,
        backend: Backend,
        policy: Policy | str | None = None,
        vcpu_host: VcpuHost | str = VcpuHost.EMULATOR,
        vmm: VmmServices | None = None,
        reference: Reference | str | SampleSource | None = None,
        any_tsc_hz: bool = False,
        vcpus_present: int | None = None,
    ) -> Self:
        """Make a paused clock from a saved state; resume() applies `policy` (default: the state's) to the time missed.

        memory: the VM's, with its saved content; the new clock takes over from its live one.  vcpu_host, vmm: as for
        GuestClock, and may differ from before.  reference: by default the saved one; an event if this host lacks that.
        vcpus_present: as for GuestClock; how many of the state's are there is the VMM's to know, as its RAM.
        any_tsc_hz: accept a TSC more than 250 ppm off the frequency that a guest which lives by its TSC was told.
        Time missed is the raw clock plus time asleep within one boot of one host, else UTC.  StateFileError if the
        state is invalid, or needs what this host or version lacks.
        """
        _check_restore(memory, backend, vcpu_host, reference, any_tsc_hz=any_tsc_hz)
        sound = clock_state.checked(state)
        clock_state.check_provider(sound)
        _check_agreement(backend, _checked_present(vcpus_present, len(sound.vcpus)), _vcpu_host_named(vcpu_host))
        chosen = sound.policy.known("policy") if policy is None else as_policy(policy)
        capture.check_dilation(sound, backend.tsc_hz)
        takeover = Takeover(memory, backend)

        def make(_: Callable[[], None]) -> Self:  # type: ignore[type-var]  # the enclosing method's Self
            clock = cls(
                memory,
                len(sound.vcpus),
                combined(sound.provider.name, sound.provider.config),
                backend=backend,
                vcpu_host=vcpu_host,
                vmm=vmm,
                tsc_offset=None,  # resume() sets them; the live clock may still use its own
                offer_tsc_adjust=sound.offers.tsc_adjust,
                offer_invariant_tsc=sound.offers.invariant_tsc,
                tsc_hz=sound.guest_tsc_hz or sound.host.tsc_hz,
                vcpus_present=vcpus_present,
            )
            load(clock._parts, clock._guest, sound, chosen, reference, any_tsc_hz=any_tsc_hz)  # its own class
            takeover.accept(clock._keeper.live)
            return clock

        try:
            return attempt(takeover.begin, takeover.undo, make)
        except (ConfigError, RangeError) as error:
            raise StateFileError("provider", str(error), "what this host and this version can serve") from None

    # Host trouble

    def check_host(self, watch: HostWatch, *, on_schedule: bool = True) -> list[Trouble]:
        """Check the host with `watch` and apply the findings to this clock; returns the troubles.

        on_schedule: pass False after a pause, when the time since the last check is not a stall.
        """
        instance("watch", watch, HostWatch)
        troubles = watch.check(on_schedule=on_schedule)
        self.apply_host_findings(troubles, tsc_trusted=watch.tsc_trusted)
        return troubles

    def apply_host_findings(self, troubles: list[Trouble], *, tsc_trusted: bool) -> None:
        """Apply one host check to this clock: each trouble is an event, and drops STABLE if it must."""
        instances("troubles", troubles, Trouble)
        with self._keeper.changing:
            self._host.apply_host_findings(troubles, tsc_trusted=flag("tsc_trusted", tsc_trusted))

    def pairing(self, vcpu: int) -> Pairing | None:
        """One instant as the guest's time of day and as vCPU's TSC; None if the host's TSC is not trusted."""
        return self._guest.pairing(vcpu)


def _parts_of(keeper: Timekeeper, tsc_offset: int | None, present: int) -> ClockParts:
    tscs, follower = VcpuTscs(keeper, tsc_offset, present), Follower(keeper)
    host = HostTrust(keeper, tscs, follower)
    return ClockParts(
        keeper,
        tscs,
        host,
        Operations(keeper, host, tscs),
        PauseResume(keeper, host, tscs, follower),
        follower,
        WallClock(keeper),
    )


def _vcpu_host_named(vcpu_host: VcpuHost | str) -> VcpuHost:
    words = ", ".join(map(repr, map(str, VcpuHost)))
    if not isinstance(vcpu_host, str):
        raise WrongType("vcpu_host", vcpu_host, words)
    if vcpu_host not in list(VcpuHost):
        raise ConfigError(f"vcpu_host {quoted(vcpu_host)}; choose from {words}")
    return VcpuHost(vcpu_host)


def _checked_offers(tsc_adjust: bool, invariant_tsc: bool) -> OfferState:
    return OfferState(flag("offer_tsc_adjust", tsc_adjust), flag("offer_invariant_tsc", invariant_tsc))


def _check_restore(
    memory: GuestMemory,
    backend: Backend,
    vcpu_host: VcpuHost | str,
    reference: Reference | str | SampleSource | None,
    *,
    any_tsc_hz: bool,
) -> None:
    """Check restore()'s own arguments, so that their errors are not StateFileErrors."""
    instance("memory", memory, GuestMemory)
    _checked_backend(backend)
    _vcpu_host_named(vcpu_host)
    flag("any_tsc_hz", any_tsc_hz)
    if reference is not None:
        source_of(reference, backend)


def _checked_present(vcpus_present: int | None, vcpus: int) -> int:
    """How many vCPUs are there, all by default; ConfigError unless 1 to `vcpus`."""
    if vcpus_present is None:
        return vcpus
    if not 1 <= whole("vcpus_present", vcpus_present) <= vcpus:
        raise ConfigError(f"vcpus_present is {shown(vcpus_present)}; of {vcpus} vCPUs 1 to {vcpus} can be there")
    return vcpus_present


def _check_agreement(backend: Backend, vcpus: int, vcpu_host: VcpuHost) -> None:
    """ConfigError if the backend knows its number of vCPUs or its vCPU host, and the clock's differ."""
    has = getattr(backend, "vcpu_count", None)
    if has is not None and has != vcpus:
        raise ConfigError(f"a clock of {vcpus} vCPUs on a backend of {has}, which its Runner runs; both are the VM's")
    runs = getattr(backend, "vcpu_host", None)
    if runs is not None and runs != vcpu_host:
        raise ConfigError(
            f"vcpu_host {str(vcpu_host)!r} on a backend whose vCPUs run on {runs!r}; give vcpu_host={runs!r}"
        )


@cache
def _own_keywords() -> str:
    """A list of GuestClock's keywords, for the error about an unknown one."""
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
