"""Saved states for the tests: one to change, the ones that are kept as files, and any that there can be."""

from __future__ import annotations

import string
from fractions import Fraction
from typing import Any, Final

from hypothesis import strategies as st

from pvclock.state.clock_state import (
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

U64_MAX: Final = 2**64 - 1
PRINTABLE: Final = "".join(map(chr, range(0x20, 0x7F)))
GREATEST_TERM: Final = 2**2048 - 1

TYPICAL: Final = ClockState(
    version=3,
    provider=ProviderState(
        name="KVM",
        version=1,
        config={"enforce_cpuid": True, "features": 0x100108B},
        msrs={"boot_vcpu_runs_old_kvmclock": False, "system_time": (0x2001, 0x3001), "wall_clock": 0x1000},
    ),
    policy=SavedPolicy.named("advance:max_ns=3600000000000"),
    sleep_policy=SavedPolicy.named("slew:max_ppm=200"),
    timeline=TimelineState(
        Fraction(86_400_000_000_001, 3), Fraction(1, 10), paused=True, paused_dilation=Fraction(1, 3)
    ),
    slew=SlewState(Fraction(-5_000_000_000, 7), SavedPolicy.named("slew:max_ppm=500")),
    host=HostState(
        tsc=987_654_321_012_345,
        tsc_hz=2_596_132_000,
        raw_ns=380_433_000_000_123,
        real_ns=1_790_000_000_123_456_789,
        boot_id="0b5c9a6e-2f1d-4a7b-9e53-64c0a1f2d3e4",
        asleep_ns=28_800_000_000_001,
    ),
    guest_tsc_hz=2_596_000_000,
    reference=ReferenceState("monotonic", Fraction(1001, 2), 1_000_000_000_000),
    wall_clock=WallClockState(7_200_000_000_000, None),
    wall_clock_gpa=0x1000,
    offers=OfferState(tsc_adjust=True, invariant_tsc=False),
    vcpus=(
        VcpuState(2**64 - 987_000_000_000_000, 5_000, 0, 654_321_012_345, 0x2000),
        VcpuState(2**64 - 987_000_000_000_000, 0, 1, 654_321_012_345, None),
    ),
)
"""Two vCPUs with the KVM clock, paused, dilated, and ahead of what they should show."""

MASKED: Final = 1 << 16
HYPERV: Final = TYPICAL._replace(
    provider=ProviderState(
        name="HyperV",
        version=1,
        config={
            "vendor_id": "Microsoft Hv",
            "privileges": 0x10_0010_0000_2AEE,
            "features": 0x8_0500,
            "recommendations": 0x220,
            "hardware": 0,
            "enforce_cpuid": True,
            "profile": "linux",
            "apic_bus_hz": 10**9,
            "cpu_vendor": "GenuineIntel",
            "vs_interface": False,
            "hypercall_debug": False,
        },
        msrs={
            "guest_os_id": 0x8100_0005_0A00_0000,
            "hypercall": 0x4001,
            "reference_tsc": 0x5001,
            "reference_units": 288_000_000_001,
            "reference_sequence": 7,
            "crash_parameters": (7, 0, 0, 0, 2**64 - 1),
            "scontrol": (1, 0),
            "siefp": (0x7001, 0),
            "simp": (0x6001, 0),
            "sint": (MASKED, MASKED, 0x20, *(MASKED,) * 29),
            "stimer_config": (2 << 16, 2 << 16 | 1, 0x30 << 4 | 0x1003, 0, 0, 0, 0, 0),
            "stimer_count": (10, 287_999_999_999, 10_000, 0, 0, 0, 0, 0),
            "stimer_due": (0, 287_999_999_999, 288_000_000_500, 0, 0, 0, 0, 0),
            "stimer_waiting": (1,),
            "reenlightenment_control": 0x1_00F1,
            "tsc_emulation_control": 0,
            "tsc_emulation_status": 1,
            "told_tsc_hz": 2_596_132_000,
        },
    ),
    wall_clock_gpa=None,
    vcpus=tuple(vcpu._replace(guest_tsc=2**50, time_page_gpa=None) for vcpu in TYPICAL.vcpus),
)
"""Hyper-V's interface: a reference TSC page, a message that waits for its slot, and a periodic timer in direct mode."""

BESIDE_KVM: Final = HYPERV._replace(
    provider=ProviderState(
        name="HyperV+KVM",
        version=2,
        config={
            **{name: value for name, value in HYPERV.provider.config.items() if name != "features"},
            "hyperv_features": HYPERV.provider.config["features"],
            "kvm_features": 0x100002B,
            "hints": 0,
        },
        msrs={
            **{f"HyperV-{name}": value for name, value in HYPERV.provider.msrs.items()},
            "KVM-system_time": (0x2001, 0),
            "KVM-wall_clock": 0x1000,
            "KVM-boot_vcpu_runs_old_kvmclock": False,
            "KVM-steal_time": (0x3001, 0),
            "KVM-pv_eoi": (0, 0),
            "KVM-pv_eoi_offered": (0, 0),
            "KVM-async_pf": (0, 0),
            "KVM-async_pf_interrupt": (0, 0),
            "KVM-async_pf_unacknowledged": (0, 0),
            "KVM-poll_control": (1, 1),
            "KVM-migration_control": 1,
        },
    ),
    wall_clock_gpa=TYPICAL.wall_clock_gpa,
    vcpus=tuple(vcpu._replace(time_page_gpa=gpa) for vcpu, gpa in zip(HYPERV.vcpus, (0x2000, None), strict=True)),
)
"""The same beside KVM's, whose pvclock page vCPU 0 has."""

LEAST: Final = ClockState(
    version=3,
    provider=ProviderState("None", 1, {}, {}),
    policy=SavedPolicy.named("freeze"),
    sleep_policy=SavedPolicy.named("freeze"),
    timeline=TimelineState(Fraction(0), Fraction(1), paused=False, paused_dilation=None),
    slew=None,
    host=HostState(tsc=0, tsc_hz=1, raw_ns=None, real_ns=0, boot_id=None, asleep_ns=None),
    guest_tsc_hz=None,
    reference=None,
    wall_clock=WallClockState(0, None),
    wall_clock_gpa=None,
    offers=OfferState(tsc_adjust=False, invariant_tsc=False),
    vcpus=(VcpuState(0, 0, 0, 0, None),),
)
"""One vCPU without a paravirtual clock, and nothing that could be missing."""

EXTREME: Final = ClockState(
    version=3,
    provider=ProviderState(
        "P" * 256, 2**32 - 1, {"n" * 64: U64_MAX, "text": PRINTABLE}, {"-": (), "0x40000021": None, "x": (0, U64_MAX)}
    ),
    policy=SavedPolicy("~" * 256, None),
    sleep_policy=SavedPolicy(" " * 256, None),
    timeline=TimelineState(
        Fraction(GREATEST_TERM, 2**1984),
        U64_MAX + Fraction(1, 2),
        paused=True,
        paused_dilation=U64_MAX + Fraction(1, 3),
    ),
    slew=SlewState(Fraction(1 - 2**2048, GREATEST_TERM - 1), SavedPolicy.named("virtualbox")),
    host=HostState(U64_MAX, U64_MAX, 2**63 - 1, -(2**63), "b" * 256, 2**63 - 1),
    guest_tsc_hz=U64_MAX,
    reference=ReferenceState("r" * 256, Fraction(GREATEST_TERM, 2**2032), U64_MAX),
    wall_clock=WallClockState(-(2**63), 2**63 - 1),
    wall_clock_gpa=U64_MAX,
    offers=OfferState(tsc_adjust=True, invariant_tsc=True),
    vcpus=(VcpuState(U64_MAX, U64_MAX, 2**32 - 1, U64_MAX, U64_MAX),) * 3,
)
"""Numbers and text at their limits."""


def of_version_2(state: ClockState) -> ClockState:
    """What is left of a state in version 2, as it is read back."""
    return state._replace(version=2, timeline=state.timeline._replace(paused_dilation=None))


def of_version_1(state: ClockState) -> ClockState:
    """What is left of a state in version 1, as it is read back."""
    return of_version_2(state)._replace(
        version=1,
        sleep_policy=SavedPolicy.named("freeze"),
        reference=None,
        host=state.host._replace(asleep_ns=None),
        guest_tsc_hz=None,
        wall_clock=WallClockState(0, None),
    )


KEPT: Final = {
    "v1-typical.json": of_version_1(TYPICAL),
    "v1-least.json": of_version_1(LEAST),
    "v1-extreme.json": of_version_1(EXTREME),
    "v1-by-hand.json": of_version_1(TYPICAL),
    "v2-typical.json": of_version_2(TYPICAL),
    "v2-least.json": of_version_2(LEAST),
    "v2-extreme.json": of_version_2(EXTREME),
    "v3-typical.json": TYPICAL,
    "v3-least.json": LEAST,
    "v3-extreme.json": EXTREME,
    "v3-hyperv.json": HYPERV,
    "v3-hyperv-kvm.json": BESIDE_KVM,
}
"""What each file in tests/states holds.  Files are added there, and never changed."""

# Any state that there can be

U64: Final = st.one_of(st.integers(0, U64_MAX), st.sampled_from([0, 1, 2**53, 2**63, U64_MAX]))
S64: Final = st.integers(-(2**63), 2**63 - 1)
TEXT: Final = st.text(PRINTABLE, min_size=1, max_size=256)
NAMES: Final = st.text(string.ascii_letters + string.digits + "_-", min_size=1, max_size=64)
DENOMINATORS: Final = st.one_of(st.integers(1, 10**9), st.integers(1, 2**1900))
SETTINGS: Final = st.one_of(st.booleans(), U64, TEXT)
MSRS: Final = st.one_of(SETTINGS, st.none(), st.lists(U64, max_size=3).map(tuple))


def fractions(least: int, most: int) -> st.SearchStrategy[Fraction]:
    """Fractions from `least` to below `most`."""
    return st.builds(
        lambda whole, part, den: whole + Fraction(part % den, den),
        *(st.integers(least, most - 1), st.integers(0, 2**1900), DENOMINATORS),
    )


POLICIES: Final = TEXT.map(SavedPolicy.named)
DILATIONS: Final = fractions(0, 2**64).filter(bool)


def states() -> st.SearchStrategy[ClockState]:
    """Any state that can be saved."""
    parts: dict[str, st.SearchStrategy[Any]] = {
        "provider": st.builds(
            ProviderState,
            TEXT,
            st.integers(1, 2**32 - 1),
            st.dictionaries(NAMES, SETTINGS),
            st.dictionaries(NAMES, MSRS),
        ),
        "policy": POLICIES,
        "sleep_policy": POLICIES,
        "timeline": st.builds(TimelineState, fractions(0, 2**64), DILATIONS, st.booleans(), st.none() | DILATIONS),
        "slew": st.none() | st.builds(SlewState, fractions(1 - 2**64, 2**64), POLICIES),
        "reference": st.none()
        | st.builds(ReferenceState, TEXT, st.integers(1, 10**8).map(lambda ppb: Fraction(ppb, 1000)), st.none() | U64),
        "host": st.builds(
            HostState, U64, st.integers(1, U64_MAX), st.none() | S64, S64, st.none() | TEXT, st.none() | S64
        ),
        "guest_tsc_hz": st.none() | st.integers(1, U64_MAX),
        "wall_clock": st.builds(WallClockState, S64, st.none() | S64),
        "wall_clock_gpa": st.none() | U64,
        "offers": st.builds(OfferState, st.booleans(), st.booleans()),
        "vcpus": st.lists(
            st.builds(VcpuState, U64, U64, st.integers(0, 2**32 - 1), U64, st.none() | U64), min_size=1, max_size=4
        ).map(tuple),
    }
    of_version_3 = st.builds(ClockState, version=st.just(3), **parts)
    return of_version_3 | of_version_3.map(of_version_2) | of_version_3.map(of_version_1)
