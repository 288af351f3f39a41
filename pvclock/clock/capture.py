"""Saves a clock's parts as a ClockState, and restores them from one.

The state of a paused clock is as of the pause; that of a restored clock not yet resumed is what it was restored from.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Final, NamedTuple

from pvclock.clock.follower import OFF, Follower
from pvclock.clock.host_trust import HostTrust
from pvclock.clock.operations import Operations
from pvclock.clock.pause_resume import PauseResume
from pvclock.clock.timekeeper import PausePoint, Timekeeper, TimeState
from pvclock.clock.vcpu_tscs import VcpuTscs
from pvclock.clock.wall_clock import WallClock, WallClockBase
from pvclock.errors import RangeError, StateFileError
from pvclock.host.backend import stamps_anew
from pvclock.providers.interface import OwnPage
from pvclock.quantities import U64_MASK, Gpa, HostTsc, RefNs
from pvclock.readings import HostStamps, Reference
from pvclock.state.clock_state import (
    VERSION,
    ClockState,
    HostState,
    OfferState,
    ProviderState,
    ReferenceState,
    SavedPolicy,
    SlewState,
    TimelineState,
    VcpuState,
    WallClockState,
)
from pvclock.timekeeping.catchup import Policy, SlewPolicy
from pvclock.timekeeping.events import EventKind
from pvclock.timekeeping.timeline import RateTerms, Timeline

__all__ = ["ClockParts", "capture", "check_dilation", "check_tsc_hz", "restore", "restore_reference"]

TSC_TOLERANCE_PPM: Final = 250
"""How far a host TSC may be off the frequency that the guest was told: KVM's tsc_tolerance_ppm."""


class ClockParts(NamedTuple):
    """The parts of a clock that are saved."""

    keeper: Timekeeper
    tscs: VcpuTscs
    host: HostTrust
    operations: Operations
    pause_resume: PauseResume
    follower: Follower
    wall_clock: WallClock


def capture(parts: ClockParts, provider: ProviderState, offers: OfferState, guest_tsc_hz: int) -> ClockState:
    """The clock as of now, or of its pause; call inside `with changing`."""
    keeper, follower = parts.keeper, parts.follower
    timeline, paused_at = keeper.timeline, keeper.state.paused_at
    dilation = timeline.terms.dilation
    at = paused_at or PausePoint(stamps_anew(keeper.backend), keeper.backend.tsc_hz, dilation)
    tsc = at.stamps.tsc
    slew = timeline.slew_policy
    reference = None
    if follower.reference != OFF:
        reference = ReferenceState(str(follower.reference), Fraction(follower.max_ppm), follower.panic_ns)
    return ClockState(
        version=VERSION,
        provider=provider,
        policy=SavedPolicy.of(parts.pause_resume.policy),
        timeline=TimelineState(
            timeline.at(tsc) % (U64_MASK + 1),
            dilation,
            keeper.is_paused,
            None if at.dilation == dilation else at.dilation,
        ),
        slew=None if slew is None else SlewState(timeline.skew_at(tsc), SavedPolicy.of(slew)),
        host=_host_state(at),
        wall_clock_gpa=parts.wall_clock.gpa,
        offers=offers,
        vcpus=tuple(_vcpu_state(parts, vcpu, tsc) for vcpu in range(keeper.vcpus)),
        sleep_policy=SavedPolicy.of(parts.host.sleep_policy),
        guest_tsc_hz=guest_tsc_hz,
        reference=reference,
        wall_clock=WallClockState(*parts.wall_clock.base),
    )


def restore(
    parts: ClockParts,
    state: ClockState,
    policy: Policy,
    own_page: Callable[[int], OwnPage | None],
) -> None:
    """Set new parts to the paused clock saved as `state`, which is checked.

    own_page: the provider's.
    """
    keeper, host = parts.keeper, state.host
    now = stamps_anew(keeper.backend)
    timeline = Timeline(now.tsc, keeper.backend.tsc_hz, state.timeline.guest_ns, RateTerms(state.timeline.dilation))
    timeline.stop(now.tsc)
    slew = None if state.slew is None else state.slew.policy.known("slew.policy")
    if state.slew is not None and isinstance(slew, SlewPolicy):
        timeline.slew(now.tsc, state.slew.remaining_ns, slew)
    boot_id = None if host.raw_ns is None else host.boot_id
    same_boot = boot_id is not None and boot_id == now.boot_id
    asleep_ns = now.asleep_ns if host.asleep_ns is None else host.asleep_ns
    then = HostStamps(HostTsc(host.tsc), RefNs(host.raw_ns or 0), host.real_ns, boot_id, asleep_ns)
    missed_at = state.timeline.paused_dilation or state.timeline.dilation
    restored = TimeState.of(timeline, PausePoint(then, host.tsc_hz, missed_at, elsewhere=True))
    event = keeper.event(EventKind.RESTORE, _describe_origin(state, same_boot=same_boot), now, before=restored)
    keeper.restore_paused(restored, (event,))
    parts.pause_resume.policy = policy
    parts.host.sleep_policy = state.sleep_policy.known("sleep_policy")
    parts.wall_clock.gpa = None if state.wall_clock_gpa is None else Gpa(state.wall_clock_gpa)
    parts.wall_clock.base = WallClockBase(*state.wall_clock)
    parts.tscs.restore_stopped([(vcpu.guest_tsc, vcpu.tsc_adjust, vcpu.tsc_aux) for vcpu in state.vcpus], now.tsc)
    for number, vcpu in enumerate(state.vcpus):
        keeper.pages.register(number, vcpu.time_page_gpa, own_page(number))


def restore_reference(parts: ClockParts, state: ClockState) -> None:
    """Follow the saved clock's reference, or record that this host does not have it."""
    if state.reference is None:
        return
    if state.reference.name in list(Reference) and parts.keeper.backend.counter_follows_host:
        panic_ns = state.reference.panic_ns
        parts.follower.follow(state.reference.name, max_ppm=float(state.reference.max_ppm), panic_ns=panic_ns)
    else:
        why = f"the saved clock followed {state.reference.name}, which is not to be had here; follow() another"
        parts.keeper.tell(EventKind.REFUSED, why)


def check_tsc_hz(state: ClockState, tsc_hz: int, *, any_tsc_hz: bool) -> str:
    """Compare the host's TSC frequency with the one that a guest which lives by its TSC was told.

    Returns the text of an event if they differ, else "".  StateFileError beyond 250 ppm, unless any_tsc_hz.
    """
    told_hz = state.guest_tsc_hz or state.host.tsc_hz
    if told_hz == tsc_hz:
        return ""
    off_ppm = Fraction(abs(tsc_hz - told_hz) * 10**6, told_hz)
    if off_ppm > TSC_TOLERANCE_PPM and not any_tsc_hz:
        raise StateFileError(
            "guest_tsc_hz",
            f"{told_hz} Hz, which the guest lives by",
            f"within {TSC_TOLERANCE_PPM} ppm of this host's {tsc_hz} Hz, or restore(any_tsc_hz=True)",
        )
    return f"the guest was told a TSC of {told_hz} Hz, and it is {tsc_hz} Hz here, {float(off_ppm):.3g} ppm off"


def check_dilation(state: ClockState, tsc_hz: int) -> None:
    """StateFileError if no page can show the state's dilation on a TSC of that frequency."""
    dilation = state.timeline.dilation
    try:
        Timeline(HostTsc(0), tsc_hz).check(dilation)
    except RangeError as error:
        supported = f"what a page can show at {tsc_hz} Hz: {error}"
        raise StateFileError("timeline.dilation", str(dilation), supported) from None


def _describe_origin(state: ClockState, *, same_boot: bool) -> str:
    unknown = []
    if state.host.asleep_ns is None and same_boot:
        unknown.append("whether the host slept since")
    if state.version == 1:
        unknown.append("what the clock followed")
    gaps = f"; a state of version {state.version} does not say {' nor '.join(unknown)}" if unknown else ""
    return f"saved on boot {state.host.boot_id}{gaps}"


def _host_state(at: PausePoint) -> HostState:
    stamps = at.stamps
    return HostState(stamps.tsc, at.tsc_hz, stamps.raw_ns, stamps.real_ns, stamps.boot_id, stamps.asleep_ns)


def _vcpu_state(parts: ClockParts, vcpu: int, tsc: HostTsc) -> VcpuState:
    found = parts.tscs.at(vcpu, tsc)
    gpa = parts.keeper.pages.registered(vcpu)
    return VcpuState(found.offset, found.adjust, found.aux, found.read(tsc), gpa)
