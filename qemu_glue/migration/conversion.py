"""A migration stream's clock as a clock's state, and what a stream cannot hold of one."""

from __future__ import annotations

from fractions import Fraction
from typing import Final

from pvclock import ConfigError, KvmFeature, StateFileError
from pvclock.commands.state_formats import Given
from pvclock.commands.state_units import in_seconds
from pvclock.state.clock_state import (
    VERSION,
    ClockState,
    HostState,
    OfferState,
    ProviderState,
    SavedPolicy,
    TimelineState,
    VcpuState,
    WallClockState,
)
from qemu_glue.migration.cpu_sections import VcpuRegisters
from qemu_glue.migration.saved_clock import QemuClock

__all__ = ["check_forward", "not_held", "to_clock_state"]

U64: Final = 1 << 64
ENABLED: Final = 1
FREEZE: Final = "freeze"
CLOCK_FEATURES: Final = KvmFeature.CLOCKSOURCE | KvmFeature.CLOCKSOURCE2 | KvmFeature.CLOCKSOURCE_STABLE
PROVIDER_VERSION: Final = 2
POLL_ON: Final = 1


def to_clock_state(clock: QemuClock, given: Given, modified_ns: int) -> tuple[ClockState, list[str]]:
    """The clock's state, and in words what was assumed.  ConfigError if something is neither there nor given.

    modified_ns: when the stream's file was written, in UTC since 1970.
    """
    if not clock.vcpus:
        raise ConfigError(f"the stream's vCPUs cannot be read: {clock.why_no_vcpus}; a clock's state needs their TSCs")
    if given.guest_tsc is not None:
        raise ConfigError("the stream holds each vCPU's TSC; leave out --guest-tsc")
    tsc_hz = _tsc_hz(clock, given)
    saved_ns = modified_ns if given.saved_ns is None else given.saved_ns
    features = _features(clock) if given.features is None else given.features
    first = clock.vcpus[0]
    freeze = SavedPolicy.named(FREEZE)
    state = ClockState(
        version=VERSION,
        provider=ProviderState("KVM", PROVIDER_VERSION, {"enforce_cpuid": False, "features": features}, _msrs(clock)),
        policy=freeze,
        sleep_policy=freeze,
        timeline=TimelineState(Fraction(clock.clock_ns), Fraction(1), paused=True, paused_dilation=None),
        slew=None,
        reference=None,
        host=HostState(first.tsc, tsc_hz, None, saved_ns, None, None),
        guest_tsc_hz=tsc_hz,
        wall_clock_gpa=first.wall_clock_msr or None,
        wall_clock=WallClockState(0, None),
        offers=OfferState(tsc_adjust=True, invariant_tsc=False),
        vcpus=tuple(_vcpu_state(vcpu, first.tsc, tsc_hz) for vcpu in clock.vcpus),
    )
    return state, _assumed(clock, given, features)


def check_forward(state: ClockState, clock: QemuClock) -> int:
    """The state's guest time in whole ns; StateFileError if that is before the stream's, which its guest has read."""
    ns = int(state.timeline.guest_ns)
    if ns < clock.clock_ns:
        back = in_seconds(clock.clock_ns - ns)
        supported = f"{clock.clock_ns} or more: the stream's guest would see its clock go back by {back}"
        raise StateFileError("timeline.guest_ns", f"{ns}", supported)
    if ns >= U64:
        raise StateFileError("timeline.guest_ns", f"{ns}", "below 2^64")
    return ns


def not_held(state: ClockState, clock: QemuClock) -> list[str]:
    """In words, what of the state does not get into the stream."""
    timeline = state.timeline
    parts = {
        f"its dilation of {timeline.dilation}: KVM's clock goes at the rate of real time": timeline.dilation != 1,
        "what remains to be slewed in": state.slew is not None,
        "the reference that it follows": state.reference is not None,
        f"its policy {state.policy}: QEMU adds nothing for the time until the stream is loaded": (
            str(state.policy) != FREEZE
        ),
        "the base of its time of day: KVM's is the host's UTC": state.wall_clock != WallClockState(0, None),
    }
    notes = [f"not in a stream: {part}" for part, is_lost in parts.items() if is_lost]
    if clock.vcpus and len(clock.vcpus) != len(state.vcpus):
        notes.append(f"the stream has {len(clock.vcpus)} vCPUs, the state {len(state.vcpus)}")
    return [*notes, "vCPUs, their TSCs and MSRs are the stream's own, as they were"]


def _tsc_hz(clock: QemuClock, given: Given) -> int:
    khz = clock.vcpus[0].tsc_khz
    if given.tsc_hz is not None:
        return given.tsc_hz
    if khz is None:
        raise ConfigError("the stream does not say the TSC's frequency (machine types up to 2.5): give --tsc-hz")
    if not 0 < khz < 1 << 54:
        raise StateFileError("cpu[0].tsc_khz", f"{khz}", "above 0, and below 2^54")
    return khz * 1000


def _features(clock: QemuClock) -> int:
    """The clock, and what the guest has used."""
    steals = any(vcpu.steal_time_msr & ENABLED for vcpu in clock.vcpus)
    return int(CLOCK_FEATURES | (KvmFeature.STEAL_TIME if steals else KvmFeature(0)))


def _msrs(clock: QemuClock) -> dict[str, int | bool | tuple[int, ...]]:
    """What the guest wrote, by the names of the provider; what an engine cannot serve is as after a reset."""
    off = (0,) * len(clock.vcpus)
    return {
        "async_pf": off,
        "async_pf_interrupt": off,
        "async_pf_unacknowledged": off,
        "boot_vcpu_runs_old_kvmclock": False,
        "migration_control": 1,
        "poll_control": (POLL_ON,) * len(clock.vcpus),
        "pv_eoi": off,
        "pv_eoi_offered": off,
        "steal_time": tuple(vcpu.steal_time_msr for vcpu in clock.vcpus),
        "system_time": tuple(vcpu.system_time_msr for vcpu in clock.vcpus),
        "wall_clock": clock.vcpus[0].wall_clock_msr,
    }


def _vcpu_state(vcpu: VcpuRegisters, first_tsc: int, tsc_hz: int) -> VcpuState:
    """The vCPU at vCPU 0's TSC.

    QEMU reads one vCPU's TSC after the other, so they differ by some us where the guest's agree.  When it writes them
    back, KVM takes those within a second of each other for the same: so does this.
    """
    offset = (vcpu.tsc - first_tsc) % U64
    own = 0 if min(offset, U64 - offset) < tsc_hz else offset
    page = vcpu.system_time_msr & ~ENABLED if vcpu.system_time_msr & ENABLED else None
    return VcpuState(own, vcpu.tsc_adjust, vcpu.tsc_aux, (first_tsc + own) % U64, page)


def _assumed(clock: QemuClock, given: Given, features: int) -> list[str]:
    notes = ["the stream does not tell its host's TSC: vCPU 0's stands for it"]
    if given.features is None:
        notes.append(f"assumed: features {features:#x}, for CPUID is not in a stream; --features says otherwise")
    if given.saved_ns is None:
        notes.append("assumed: saved when its file was last written; --saved-at says otherwise")
    if not clock.is_taken:
        notes.append("the guest may have read another time: QEMU would take it from vCPU 0's page in guest RAM")
    if any(vcpu.pv_eoi_msr & ENABLED or vcpu.async_pf_msr & ENABLED for vcpu in clock.vcpus):
        notes.append("left out: PV EOI and asynchronous page faults, which are not a clock's; the VMM sets their MSRs")
    return notes
