"""What KVM's CPUID leaves offer, which MSRs and hypercalls each feature opens, and which features an engine can serve.

Source: Documentation/virt/kvm/x86/cpuid.rst, guest_pv_has() and its callers.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntFlag
from typing import Final

from pvclock.errors import ConfigError
from pvclock.msr_ranges import MsrRange
from pvclock.providers.interface import CPUID_BASE, ClockServices, CpuidLeaf, VcpuHost

__all__ = [
    "FEATURE_OF_MSR",
    "MSR_RANGES",
    "NAME",
    "KvmFeature",
    "KvmHint",
    "check_cpuid_base",
    "default_features",
    "kernel_clock_features",
    "kvm_cpuid_leaves",
    "names_of",
    "servable_features",
]

NAME: Final = "KVM"
"""The provider's."""

CPUID_BASES: Final = range(CPUID_BASE, CPUID_BASE + 0x10000, 0x100)
"""Where Linux's hypervisor_cpuid_base(), and the kernel's KVM itself, look for the signature."""

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
    """Bits of the feature leaf's EAX, CPUID 0x40000001 (KVM_FEATURE_* of Linux)."""

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
    """Bits of the feature leaf's EDX (KVM_HINTS_* of Linux)."""

    REALTIME = 1 << 0
    """vCPUs are never preempted for long, so spinning is better than paravirtual locks and flushes."""


SERVED_HERE: Final = (
    KvmFeature.CLOCKSOURCE | KvmFeature.NOP_IO_DELAY | KvmFeature.CLOCKSOURCE2 | KvmFeature.CLOCKSOURCE_STABLE
)
"""The clock, which every engine serves."""

SERVED_BY_KERNEL: Final = KvmFeature.PV_UNHALT | KvmFeature.POLL_CONTROL
"""What the kernel's irqchip goes on serving to a guest whose clock is the engine's."""

# On KVM user space cannot inject faults and flushes between two guest instructions, so everything else stays out.
SERVED_ON_KVM: Final = SERVED_HERE | KvmFeature.STEAL_TIME

# MMU_OP is dead; MSI_EXT_DEST_ID and HC_MAP_GPA_RANGE promise things that no clock implements.
SERVED_ON_EMULATORS: Final = (
    (SERVED_ON_KVM | KvmFeature.PV_EOI | KvmFeature.PV_TLB_FLUSH)
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
    """All features that `clock`'s engine, its VMM and the kernel beside them can serve."""
    served = SERVED_ON_KVM if clock.vcpu_host is VcpuHost.KVM else SERVED_ON_EMULATORS
    if clock.vcpu_host is not VcpuHost.KVM and clock.vmm is not None:
        served |= SERVED_BY_VMM
    return served | _served_by_kernel(clock)


def default_features(clock: ClockServices) -> KvmFeature:
    """What a guest of `clock` is offered unless its VMM says otherwise.

    On KVM steal time is opt-in: a VMM that offers it must feed it.
    """
    served = SERVED_HERE | _served_by_kernel(clock)
    return served if clock.vcpu_host is VcpuHost.KVM else served | KvmFeature.STEAL_TIME


def kernel_clock_features(kernel: int) -> KvmFeature:
    """What a guest of the kernel's own clock is offered by default, as beside the engine.

    kernel: all features that the kernel supports, EAX of KVM_GET_SUPPORTED_CPUID's leaf 0x40000001.
    """
    return SERVED_HERE | KvmFeature(kernel & SERVED_BY_KERNEL)


def check_cpuid_base(base: int) -> None:
    """ConfigError for a base at which no guest looks for KVM's leaves."""
    if base not in CPUID_BASES:
        raise ConfigError(
            f"cpuid_base {base:#x}; choose a multiple of 0x100 from {CPUID_BASES[0]:#x} to {CPUID_BASES[-1]:#x}"
        )


def kvm_cpuid_leaves(features: int, hints: int = 0, base: int = CPUID_BASE) -> dict[int, CpuidLeaf]:
    """The hypervisor leaves of a KVM that offers `features` and gives `hints`: signature at `base`, features after it.

    EAX of the signature leaf is the number of the last leaf, as QEMU sets it for either base.
    """
    return {
        base: CpuidLeaf(base + 1, 0x4B4D564B, 0x564B4D56, 0x4D),
        base + 1: CpuidLeaf(eax=int(features), edx=int(hints)),
    }


def names_of(features: int) -> str:
    """The names of those bits, joined by |; bits without a name in hexadecimal."""
    named = KvmFeature(features & sum(KvmFeature))
    unnamed = features & ~int(named)
    return "|".join([each.name for each in named if each.name] + ([f"{unnamed:#x}"] if unnamed or not named else []))


def _served_by_kernel(clock: ClockServices) -> KvmFeature:
    """What of its own features the host's kernel goes on serving beside the engine."""
    return KvmFeature(clock.kernel_features.get(NAME, 0) & SERVED_BY_KERNEL)
