"""What CPUID offers a Hyper-V guest: privileges, features and recommendations, and the leaves that hold them.

Source: TLFS "Feature and Interface Discovery"; Linux include/hyperv/hvgdk.h, KVM_GET_SUPPORTED_HV_CPUID; QEMU.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntFlag
from typing import Final, NamedTuple

from pvclock.providers.interface import CPUID_BASE, CpuidLeaf
from pvclock.quantities import U32_MASK

__all__ = [
    "CPUID_VERSION",
    "HYPERVISOR_VERSION",
    "MICROSOFT",
    "Feature",
    "Hardware",
    "Limits",
    "Offer",
    "Privilege",
    "Recommendation",
    "hyperv_cpuid_leaves",
    "names_of",
    "with_debug_leaves",
]

MICROSOFT: Final = "Microsoft Hv"
"""Hyper-V's own vendor id, the only one that some guests accept."""

CPUID_VERSION: Final = CPUID_BASE + 2
CPUID_DEBUG: Final = CPUID_BASE + 0x80

INTERFACE: Final = int.from_bytes(b"Hv#1", "little")
DEBUG_INTERFACE: Final = int.from_bytes(b"VS#1", "little")
DEBUG_VENDOR: Final = "Microsoft VS"
ALLOW_KERNEL_DEBUGGING: Final = 1 << 1

HYPERVISOR_VERSION: Final = CpuidLeaf(eax=0x3839, ebx=10 << 16 | 0)
"""Build, major and minor version, service pack 0: Windows Server 2016, as KVM has it."""

NEVER_NOTIFY: Final = U32_MASK
"""Spins before the guest tells of a long wait, which would change nothing here.  QEMU's and VirtualBox's default."""


class Privilege(IntFlag):
    """The partition's privileges, leaf 0x40000003 EAX (low half: its MSRs) and EBX (high half: its hypercalls)."""

    VP_RUNTIME = 1 << 0
    TIME_REF_COUNT = 1 << 1
    SYNIC = 1 << 2
    SYNTHETIC_TIMERS = 1 << 3
    APIC = 1 << 4
    HYPERCALL = 1 << 5
    VP_INDEX = 1 << 6
    RESET = 1 << 7
    STATISTICS = 1 << 8
    REFERENCE_TSC = 1 << 9
    GUEST_IDLE = 1 << 10
    FREQUENCY = 1 << 11
    DEBUG = 1 << 12
    REENLIGHTENMENT = 1 << 13
    TSC_INVARIANT = 1 << 15

    CREATE_PARTITIONS = 1 << 32
    PARTITION_ID = 1 << 33
    MEMORY_POOL = 1 << 34
    ADJUST_MESSAGE_BUFFERS = 1 << 35
    POST_MESSAGES = 1 << 36
    SIGNAL_EVENTS = 1 << 37
    CREATE_PORT = 1 << 38
    CONNECT_PORT = 1 << 39
    DEBUGGING = 1 << 43
    CPU_MANAGEMENT = 1 << 44
    ACCESS_VP_REGISTERS = 1 << 49
    EXTENDED_HYPERCALLS = 1 << 52


class Feature(IntFlag):
    """What else is there, leaf 0x40000003 EDX."""

    DEBUG = 1 << 1
    XMM_INPUT = 1 << 4
    FREQUENCY = 1 << 8
    CRASH = 1 << 10
    DEBUG_MSRS = 1 << 11
    XMM_OUTPUT = 1 << 15
    DIRECT_TIMERS = 1 << 19


class Recommendation(IntFlag):
    """What the guest should do, leaf 0x40000004 EAX."""

    APIC_BY_MSR = 1 << 3
    RESET_BY_MSR = 1 << 4
    RELAXED_TIMING = 1 << 5
    X2APIC_BY_MSR = 1 << 8
    DEPRECATE_AUTO_EOI = 1 << 9
    CLUSTER_IPI = 1 << 10
    EX_PROCESSOR_MASKS = 1 << 11


class Hardware(IntFlag):
    """What of the processor the hypervisor uses, leaf 0x40000006 EAX."""

    APIC_OVERLAY = 1 << 0
    MSR_BITMAPS = 1 << 1
    NESTED_PAGING = 1 << 3


class Limits(NamedTuple):
    """Leaf 0x40000005: the most virtual and logical processors."""

    virtual: int = 0
    logical: int = 0


class Offer(NamedTuple):
    """What a guest is told in CPUID."""

    vendor_id: str
    privileges: Privilege
    features: Feature
    recommendations: Recommendation
    hardware: Hardware


def names_of(kind: type[IntFlag], bits: int) -> str:
    """The names of those bits, joined by |; bits without a name in hexadecimal."""
    named = [each for each in kind if each & bits]
    unnamed = bits & ~sum(named)
    return "|".join([each.name or "" for each in named] + ([f"{unnamed:#x}"] if unnamed or not named else []))


def hyperv_cpuid_leaves(offer: Offer, limits: Limits, last: int) -> dict[int, CpuidLeaf]:
    """The leaves from CPUID_BASE to `last`, which is 0x40000006 or more; those without contents are zero."""
    leaves, privileges = {leaf: CpuidLeaf() for leaf in range(CPUID_BASE, last + 1)}, int(offer.privileges)
    return leaves | {
        CPUID_BASE: _signature(last, offer.vendor_id),
        CPUID_BASE + 1: CpuidLeaf(eax=INTERFACE),
        CPUID_VERSION: HYPERVISOR_VERSION,
        CPUID_BASE + 3: CpuidLeaf(privileges & U32_MASK, privileges >> 32, edx=int(offer.features)),
        CPUID_BASE + 4: CpuidLeaf(eax=int(offer.recommendations), ebx=NEVER_NOTIFY),
        CPUID_BASE + 5: CpuidLeaf(*limits),
        CPUID_BASE + 6: CpuidLeaf(eax=int(offer.hardware)),
    }


def with_debug_leaves(leaves: Mapping[int, CpuidLeaf]) -> dict[int, CpuidLeaf]:
    """`leaves` and those of the debug interface, "VS#1"; EAX of leaf CPUID_BASE becomes the number of the last one."""
    return {
        **leaves,
        CPUID_BASE: leaves[CPUID_BASE]._replace(eax=CPUID_DEBUG + 2),
        CPUID_DEBUG: _signature(CPUID_DEBUG + 2, DEBUG_VENDOR),
        CPUID_DEBUG + 1: CpuidLeaf(eax=DEBUG_INTERFACE),
        CPUID_DEBUG + 2: CpuidLeaf(eax=ALLOW_KERNEL_DEBUGGING),
    }


def _signature(last: int, vendor_id: str) -> CpuidLeaf:
    text = vendor_id.encode("ascii")
    return CpuidLeaf(last, *(int.from_bytes(text[at : at + 4], "little") for at in (0, 4, 8)))
