"""KVM's paravirtual interface, as Linux serves it: CPUID leaves, MSRs, hypercalls, and the records in guest memory."""

from pvclock.providers.kvm.features import (
    CPUID_FEATURES,
    CPUID_SIGNATURE,
    SERVED_BY_KERNEL,
    SERVED_HERE,
    KvmFeature,
    KvmHint,
    kvm_cpuid_leaves,
)
from pvclock.providers.kvm.profiles import PROFILES
from pvclock.providers.kvm.provider import KvmProvider

__all__ = [
    "CPUID_FEATURES",
    "CPUID_SIGNATURE",
    "PROFILES",
    "SERVED_BY_KERNEL",
    "SERVED_HERE",
    "KvmFeature",
    "KvmHint",
    "KvmProvider",
    "kvm_cpuid_leaves",
]
