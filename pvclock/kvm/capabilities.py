"""Which capabilities must a host's KVM have, and which may it have?

The tables are the one place that says what needs which capability; `open_kvm` checks them once.
"""

from __future__ import annotations

import errno
from typing import Final, NamedTuple

from pvclock import arguments
from pvclock.errors import KvmError, KvmUnavailable, MissingCapability
from pvclock.kvm._system import Kvm
from pvclock.kvm.access import advice
from pvclock.kvm.loaded import FoundOnce

__all__ = ["OPTIONAL", "REQUIRED", "Capability", "kernel_features", "open_kvm"]

API_VERSION: Final = 12
CPUID_KVM_FEATURES: Final = 0x40000001


class Capability(NamedTuple):
    """A KVM capability and what pvclock uses it for."""

    name: str
    purpose: str


REQUIRED: Final = (
    Capability("KVM_CAP_USER_MEMORY", "for guest memory"),
    Capability("KVM_CAP_SET_TSS_ADDR", "to start guests in real mode"),
    Capability("KVM_CAP_IRQCHIP", "to start a guest's other vCPUs"),
    Capability("KVM_CAP_GET_TSC_KHZ", "for the TSC's frequency"),
    Capability("KVM_CAP_IMMEDIATE_EXIT", "to pause vCPUs without a race (Linux 4.12)"),
    Capability("KVM_CAP_X86_USER_SPACE_MSR", "to serve the clock's MSRs (Linux 5.10)"),
    Capability("KVM_CAP_X86_MSR_FILTER", "to take the clock's MSRs from the kernel (Linux 5.10)"),
    Capability("KVM_CAP_VCPU_ATTRIBUTES", "to set and know the guest's TSC offset (Linux 5.16)"),
)

OPTIONAL: Final = (
    Capability("KVM_CAP_ADJUST_CLOCK", "to read the kernel's kvmclock and host TSC at one instant"),
    Capability("KVM_CAP_ENFORCE_PV_FEATURE_CPUID", "to make the kernel's MSRs obey CPUID"),
    Capability("KVM_CAP_KVMCLOCK_CTRL", "to tell a guest on the kernel's clock that it was stopped"),
    Capability("KVM_CAP_STEAL_TIME", "to compare steal time"),
    Capability("KVM_CAP_TSC_CONTROL", "to run a guest at another TSC frequency"),
    Capability("KVM_CAP_VM_TSC_CONTROL", "to set that frequency for a whole VM"),
    Capability("KVM_CAP_TSC_DEADLINE_TIMER", "for the guest's deadline timer"),
    Capability("KVM_CAP_HYPERV_TIME", "to compare the Hyper-V clock"),
    Capability("KVM_CAP_HYPERV_SYNIC", "to compare Hyper-V's interrupts and timers"),
    Capability("KVM_CAP_HYPERV_ENFORCE_CPUID", "to make the kernel's Hyper-V MSRs obey CPUID (Linux 5.14)"),
    Capability("KVM_CAP_SYS_HYPERV_CPUID", "to know which Hyper-V leaves the kernel serves (Linux 5.11)"),
    Capability("KVM_CAP_COALESCED_MMIO", "to take a guest's MMIO writes without an exit each"),
    Capability("KVM_CAP_COALESCED_PIO", "to take a guest's console output without an exit each (Linux 4.20)"),
    Capability("KVM_CAP_SIGNAL_MSI", "to raise interrupts for the guest's clock interface (Linux 3.5)"),
    Capability("KVM_CAP_MAX_VCPUS", "to know how many vCPUs a VM may have"),
)


def open_kvm(path: str = "/dev/kvm") -> Kvm:
    """Open /dev/kvm and check that it has all that is REQUIRED.

    KvmUnavailable says what to do where it cannot be opened; MissingCapability names what this host's KVM lacks.
    """
    path = arguments.path("path", path)
    try:
        kvm = Kvm(path)
    except KvmError as error:
        reason = int(error.errno or 0)
        raise KvmUnavailable(f"open {path}", reason, advice(path, reason)) from None
    try:
        _check(kvm, path)
    except BaseException:
        kvm.close()
        raise
    return kvm


def kernel_features(kvm: Kvm) -> int:
    """The KVM features that this host's kernel can offer a guest by itself: EAX of CPUID leaf 0x40000001."""
    return _FEATURES.get(lambda: _supported_features(kvm))


_FEATURES: Final = FoundOnce[int]()


def _supported_features(kvm: Kvm) -> int:
    return next((entry["eax"] for entry in kvm.get_supported_cpuid() if entry["function"] == CPUID_KVM_FEATURES), 0)


def _check(kvm: Kvm, path: str) -> None:
    try:
        version = kvm.get_api_version()
    except KvmError as error:
        raise KvmUnavailable(f"open {path}", int(error.errno or 0), "it is not KVM's device") from None
    if version != API_VERSION:
        raise KvmUnavailable(f"open {path}", errno.EPROTO, f"KVM API {version}; pvclock speaks {API_VERSION}")
    for capability in REQUIRED:
        if kvm.check_extension(capability.name) == 0:
            raise MissingCapability(capability.name, capability.purpose)
