"""KVM's paravirtual interface, as Linux serves it: CPUID leaves, MSRs, hypercalls, and the records in guest memory."""

from pvclock.providers.kvm.features import KvmFeature, KvmHint, kernel_clock_features, kvm_cpuid_leaves
from pvclock.providers.kvm.profiles import PROFILES
from pvclock.providers.kvm.provider import KvmProvider

__all__ = ["PROFILES", "KvmFeature", "KvmHint", "KvmProvider", "kernel_clock_features", "kvm_cpuid_leaves"]
