"""What KVM's CPUID leaves offer, which MSRs and hypercalls that opens, and what each engine can serve of it.

Source: Documentation/virt/kvm/x86/cpuid.rst, guest_pv_has() and its callers.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntFlag
from typing import Final

from pvclock.msr_ranges import MsrRange
from pvclock.providers.interface import ClockServices, CpuidLeaf, Engine

__all__ = [
    "CPUID_FEATURES",
    "CPUID_SIGNATURE",
    "FEATURE_OF_MSR",
    "MSR_RANGES",
    "SERVED_BY_KERNEL",
    "SERVED_HERE",
    "KvmFeature",
    "KvmHint",
    "default_features",
    "kvm_cpuid_leaves",
    "names_of",
    "servable_features",
]

CPUID_SIGNATURE: Final = 0x40000000
CPUID_FEATURES: Final = 0x40000001

MSR_KVM_WALL_CLOCK: Final = 0x11
MSR_KVM_SYSTEM_TIME: Final = 0x12
MSR_KVM_WALL_CLOCK_NEW: Final = 0x4B564D00
MSR_KVM_SYSTEM_TIME_NEW: Final = 0x4B564D01
MSR_KVM_ASYNC_PF_EN: Final = 0x4B564D02
MSR_KVM_STEAL_TIME: Final = 0x4B564D03
MSR_KVM_PV_EOI_EN: Final = 0x4B564D04
MSR_KVM_POLL_CONTROL: Final = 0x4B564D05
MSR_KVM_ASYNC_PF_INT: Final = 0x4B564D06
MSR_KVM_ASYNC_PF_ACK: Final = 0x4B564D07
MSR_KVM_MIGRATION_CONTROL: Final = 0x4B564D08


class KvmFeature(IntFlag):
    """Bits of CPUID 0x40000001 EAX (KVM_FEATURE_* of Linux)."""

    CLOCKSOURCE = 1 << 0
    NOP_IO_DELAY = 1 << 1
    MMU_OP = 1 << 2
    CLOCKSOURCE2 = 1 << 3
    ASYNC_PF = 1 << 4
    STEAL_TIME = 1 << 5
    PV_EOI = 1 << 6
    PV_UNHALT = 1 << 7
    PV_TLB_FLUSH = 1 << 9
    ASYNC_PF_VMEXIT = 1 << 10
    PV_SEND_IPI = 1 << 11
    POLL_CONTROL = 1 << 12
    PV_SCHED_YIELD = 1 << 13
    ASYNC_PF_INT = 1 << 14
    MSI_EXT_DEST_ID = 1 << 15
    HC_MAP_GPA_RANGE = 1 << 16
    MIGRATION_CONTROL = 1 << 17
    CLOCKSOURCE_STABLE = 1 << 24


class KvmHint(IntFlag):
    """Bits of CPUID 0x40000001 EDX (KVM_HINTS_* of Linux)."""

    REALTIME = 1 << 0
    """vCPUs are never preempted for long, so spinning is better than paravirtual locks and flushes."""


SERVED_HERE: Final = (
    KvmFeature.CLOCKSOURCE | KvmFeature.NOP_IO_DELAY | KvmFeature.CLOCKSOURCE2 | KvmFeature.CLOCKSOURCE_STABLE
)
"""What every engine serves, whoever feeds it: the clock."""

SERVED_BY_KERNEL: Final = KvmFeature.PV_UNHALT | KvmFeature.POLL_CONTROL
"""What the kernel's irqchip serves to a guest whose clock is the engine's."""

# On KVM a user-space server cannot inject faults and flushes between two guest instructions, so all else stays out.
SERVED_BESIDE_KVM: Final = SERVED_HERE | KvmFeature.STEAL_TIME

# MMU_OP is dead, and what MSI_EXT_DEST_ID and HC_MAP_GPA_RANGE promise is not for a clock to keep.
SERVED_IN_LIBRARY: Final = (
    (SERVED_BESIDE_KVM | KvmFeature.PV_EOI | KvmFeature.PV_TLB_FLUSH)
    | (KvmFeature.ASYNC_PF | KvmFeature.ASYNC_PF_VMEXIT | KvmFeature.ASYNC_PF_INT)
    | (KvmFeature.POLL_CONTROL | KvmFeature.MIGRATION_CONTROL)
)
SERVED_BY_VMM: Final = KvmFeature.PV_UNHALT | KvmFeature.PV_SEND_IPI | KvmFeature.PV_SCHED_YIELD
"""Hypercalls that need `VmmServices`."""

FEATURE_OF_MSR: Final[Mapping[int, KvmFeature]] = {
    MSR_KVM_WALL_CLOCK: KvmFeature.CLOCKSOURCE,
    MSR_KVM_SYSTEM_TIME: KvmFeature.CLOCKSOURCE,
    MSR_KVM_WALL_CLOCK_NEW: KvmFeature.CLOCKSOURCE2,
    MSR_KVM_SYSTEM_TIME_NEW: KvmFeature.CLOCKSOURCE2,
    MSR_KVM_ASYNC_PF_EN: KvmFeature.ASYNC_PF,
    MSR_KVM_STEAL_TIME: KvmFeature.STEAL_TIME,
    MSR_KVM_PV_EOI_EN: KvmFeature.PV_EOI,
    MSR_KVM_POLL_CONTROL: KvmFeature.POLL_CONTROL,
    MSR_KVM_ASYNC_PF_INT: KvmFeature.ASYNC_PF_INT,
    MSR_KVM_ASYNC_PF_ACK: KvmFeature.ASYNC_PF_INT,
    MSR_KVM_MIGRATION_CONTROL: KvmFeature.MIGRATION_CONTROL,
}

MSR_RANGES: Final[tuple[MsrRange, ...]] = (
    MsrRange(MSR_KVM_WALL_CLOCK, 2, why="the old wall-clock and system-time MSRs"),
    MsrRange(
        MSR_KVM_WALL_CLOCK_NEW,
        0x100,
        kept=(MSR_KVM_PV_EOI_EN, MSR_KVM_POLL_CONTROL),
        why="KVM's own MSRs, but for PV EOI, which only the kernel's LAPIC can serve, and poll control",
    ),
)


def servable_features(clock: ClockServices) -> KvmFeature:
    """All that can be served to a guest of `clock`: by its engine, its VMM and the kernel beside them."""
    served = SERVED_BESIDE_KVM if clock.engine is Engine.KVM else SERVED_IN_LIBRARY
    if clock.engine is not Engine.KVM and clock.vmm is not None:
        served |= SERVED_BY_VMM
    return served | _served_by_kernel(clock)


def default_features(clock: ClockServices) -> KvmFeature:
    """What a guest of `clock` is offered unless its VMM says otherwise.

    On KVM steal time waits to be asked for: who offers it must feed it.
    """
    served = SERVED_HERE | _served_by_kernel(clock)
    return served if clock.engine is Engine.KVM else served | KvmFeature.STEAL_TIME


def kvm_cpuid_leaves(features: int, hints: int = 0) -> dict[int, CpuidLeaf]:
    """The hypervisor leaves of a KVM that offers `features` and gives `hints`."""
    return {
        CPUID_SIGNATURE: CpuidLeaf(CPUID_FEATURES, 0x4B4D564B, 0x564B4D56, 0x4D),
        CPUID_FEATURES: CpuidLeaf(eax=int(features), edx=int(hints)),
    }


def names_of(features: int) -> str:
    """The names of those bits, with | between; in hexadecimal what has none."""
    named = KvmFeature(features & sum(KvmFeature))
    unnamed = features & ~int(named)
    return "|".join([each.name for each in named if each.name] + ([f"{unnamed:#x}"] if unnamed or not named else []))


def _served_by_kernel(clock: ClockServices) -> KvmFeature:
    """Of what the host's kernel could offer by itself, what it goes on serving beside the engine."""
    return KvmFeature(clock.kernel_features & SERVED_BY_KERNEL)
