"""What CPUID offers a Hyper-V guest: privileges, features and recommendations.

Source: TLFS "Feature and Interface Discovery"; Linux include/hyperv/hvgdk.h.
"""

from __future__ import annotations

from enum import IntFlag

__all__ = ["Feature", "Privilege", "Recommendation"]


class Privilege(IntFlag):
    """The low half of the partition's privileges, leaf 0x40000003 EAX: which MSRs it may access."""

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
