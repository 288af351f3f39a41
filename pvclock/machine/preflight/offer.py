"""What a vCPU's CPUID offers its guest in clocks: hypervisor interfaces, TSC features, frequencies.

Source: Documentation/virt/kvm/x86/cpuid.rst; Hypervisor Top Level Functional Specification, 2.4; Intel SDM, CPUID.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from pvclock.kvm.cpuid_probe import TSC_ADJUST
from pvclock.machine.cpuid import HYPERVISOR, HYPERVISOR_LEAVES, INVARIANT_TSC, TSC_DEADLINE, CpuidEntry
from pvclock.providers.hyperv.features import Privilege
from pvclock.providers.interface import CPUID_BASE, CpuidLeaf
from pvclock.providers.kvm.features import FEATURE_OF_MSR, KvmFeature
from pvclock.providers.timing import CPUID_TIMING

__all__ = ["CLOCK_MSRS", "REFERENCE_TSC_MSR", "Offer", "read_offer"]

KVM_SIGNATURE: Final = "KVMKVMKVM"
HYPERV_INTERFACE: Final = int.from_bytes(b"Hv#1", "little")
"""EAX of leaf 0x40000001, whatever the signature."""
INTEL: Final = "GenuineIntel"

BASES: Final = range(CPUID_BASE, CPUID_BASE + 0x10000, 0x100)
"""Where a guest looks for signatures."""

REFERENCE_TSC_MSR: Final = 0x40000021
KVM_CLOCKS: Final = KvmFeature.CLOCKSOURCE | KvmFeature.CLOCKSOURCE2

CLOCK_MSRS: Final[Mapping[int, str]] = {
    **{msr: str(feature.name) for msr, feature in FEATURE_OF_MSR.items() if feature & KVM_CLOCKS},
    REFERENCE_TSC_MSR: str(Privilege.REFERENCE_TSC.name),
}
"""MSRs of clocks, and by which bit each is offered."""


class Offer(NamedTuple):
    """The clocks that one vCPU's CPUID offers.

    leaves: subleaf 0 of each.  bases: the interfaces' first leaves by their signatures.  kvm_features, privileges: of
    the interfaces whose signatures are there, whether or not the hypervisor bit lets a guest look for them.
    """

    leaves: Mapping[int, CpuidLeaf]
    bases: Mapping[str, int]
    kvm_features: KvmFeature
    privileges: Privilege

    def at(self, leaf: int) -> CpuidLeaf:
        """That leaf, or zeros."""
        return self.leaves.get(leaf, CpuidLeaf())

    @property
    def has_hypervisor_bit(self) -> bool:
        """Does a guest look for hypervisor leaves at all?"""
        return bool(self.at(1).ecx & HYPERVISOR)

    @property
    def has_hypervisor_leaves(self) -> bool:
        """Are there any?"""
        return any(leaf in HYPERVISOR_LEAVES and any(registers) for leaf, registers in self.leaves.items())

    @property
    def has_tsc_deadline(self) -> bool:
        """Has the LAPIC timer the TSC-deadline mode?"""
        return bool(self.at(1).ecx & TSC_DEADLINE)

    @property
    def has_tsc_adjust(self) -> bool:
        """Is there IA32_TSC_ADJUST?"""
        return bool(self.at(7).ebx & TSC_ADJUST)

    @property
    def has_invariant_tsc(self) -> bool:
        """Does the TSC tick at one rate in all power states?  Linux: constant_tsc and nonstop_tsc."""
        return bool(self.at(0x80000007).edx & INVARIANT_TSC)

    @property
    def is_intel(self) -> bool:
        """Is the vendor Intel?  Linux trusts TSCs of several CPUs without the invariant bit only there."""
        _, ebx, ecx, edx = self.at(0)
        return _text(ebx, edx, ecx) == INTEL

    @property
    def is_kvm(self) -> bool:
        """Does a guest find KVM's signature?  Linux prefers it to any that stands before it."""
        return self.has_hypervisor_bit and KVM_SIGNATURE in self.bases

    @property
    def has_kvmclock(self) -> bool:
        """Is KVM's clock offered, by the new MSRs or the old ones, to a guest that looks for it?"""
        return self.has_hypervisor_bit and bool(self.kvm_features & KVM_CLOCKS)

    @property
    def has_old_kvmclock_only(self) -> bool:
        """Are only MSRs 0x11 and 0x12 offered?  KVM gives a guest that uses them no master clock."""
        return self.kvm_features & KVM_CLOCKS == KvmFeature.CLOCKSOURCE

    @property
    def has_stable(self) -> bool:
        """May a guest believe a page's flag TSC_STABLE?"""
        return bool(self.kvm_features & KvmFeature.CLOCKSOURCE_STABLE)

    @property
    def has_reference_page(self) -> bool:
        """Is Hyper-V's reference TSC page offered to a guest that looks for it?"""
        return self.has_hypervisor_bit and bool(self.privileges & Privilege.REFERENCE_TSC)

    @property
    def has_reference_counter(self) -> bool:
        """Is Hyper-V's reference counter offered to a guest that looks for it?"""
        return self.has_hypervisor_bit and bool(self.privileges & Privilege.TIME_REF_COUNT)

    @property
    def has_tsc_invariant_control(self) -> bool:
        """May a guest of Hyper-V's kind take its TSC for its clock?"""
        return bool(self.privileges & Privilege.TSC_INVARIANT)

    @property
    def tells_frequency(self) -> bool:
        """Does a Linux without KVM's clock learn its TSC's frequency, by leaf 0x15 or 0x16 or Hyper-V's MSR?"""
        by_leaf = self.is_intel and bool(self.at(0x15).ebx or self.at(0x16).eax)
        return by_leaf or bool(self.has_hypervisor_bit and self.privileges & Privilege.FREQUENCY)

    @property
    def timing_khz(self) -> tuple[int, int]:
        """TSC and APIC bus in kHz by leaf 0x40000010, VMware's timing leaf; zeros without, or if it means another."""
        if self.privileges:
            return (0, 0)
        return self.at(CPUID_TIMING)[:2]

    def has_interface_of(self, index: int) -> bool:
        """Is the interface there that has that one of CLOCK_MSRS?"""
        return bool(self.privileges) if index == REFERENCE_TSC_MSR else KVM_SIGNATURE in self.bases

    def offers_msr(self, index: int) -> bool:
        """Is that one of CLOCK_MSRS offered?"""
        if index == REFERENCE_TSC_MSR:
            return bool(self.privileges & Privilege.REFERENCE_TSC)
        return bool(self.kvm_features & FEATURE_OF_MSR[index])


def read_offer(entries: Sequence[CpuidEntry]) -> Offer:
    """Read it from a vCPU's CPUID, as Vcpu.get_cpuid() gives that."""
    leaves = {
        entry["function"]: CpuidLeaf(entry["eax"], entry["ebx"], entry["ecx"], entry["edx"])
        for entry in entries
        if not entry["index"]
    }
    bases = {signature: leaf for leaf in sorted(leaves.keys() & set(BASES)) if (signature := _text(*leaves[leaf][1:]))}
    return Offer(leaves, bases, _kvm_features(leaves, bases), _privileges(leaves))


def _kvm_features(leaves: Mapping[int, CpuidLeaf], bases: Mapping[str, int]) -> KvmFeature:
    base = bases.get(KVM_SIGNATURE)
    return KvmFeature(0 if base is None else leaves.get(base + 1, CpuidLeaf()).eax)


def _privileges(leaves: Mapping[int, CpuidLeaf]) -> Privilege:
    if leaves.get(CPUID_BASE + 1, CpuidLeaf()).eax != HYPERV_INTERFACE:
        return Privilege(0)
    offered = leaves.get(CPUID_BASE + 3, CpuidLeaf())
    return Privilege(offered.ebx << 32 | offered.eax)


def _text(*words: int) -> str:
    return b"".join(word.to_bytes(4, "little") for word in words).rstrip(b"\0 ").decode("latin-1")
