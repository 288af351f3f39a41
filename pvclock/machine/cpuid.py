"""The CPUID of a guest's vCPU: what the host's KVM supports, with this VM's own facts in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from pvclock.kvm import Kvm
from pvclock.kvm.capabilities import value_of
from pvclock.providers.interface import CpuidLeaf

__all__ = ["CpuidPatch", "supported_cpuid", "vcpu_cpuid"]

CpuidPatch: TypeAlias = Callable[[int, int, CpuidLeaf], CpuidLeaf]
CpuidEntry: TypeAlias = dict[str, int]

HYPERVISOR_LEAVES = range(0x40000000, 0x50000000)
TOPOLOGY_LEAVES = (0xB, 0x1F)
TSC_DEADLINE = 1 << 24
"""CPUID.1:ECX: the LAPIC timer has a TSC-deadline mode."""


def supported_cpuid(kvm: Kvm) -> list[CpuidEntry]:
    """Kvm.get_supported_cpuid() for a VM whose LAPICs are in the kernel.

    Older kernels (Linux 6.1) leave TSC_DEADLINE out there, because it depends on that, and have a capability for it.
    """
    entries = kvm.get_supported_cpuid()
    if not value_of(kvm, "KVM_CAP_TSC_DEADLINE_TIMER"):
        return entries
    return [{**entry, "ecx": entry["ecx"] | TSC_DEADLINE} if entry["function"] == 1 else entry for entry in entries]


def vcpu_cpuid(
    supported: list[CpuidEntry], apic_id: int, hypervisor: Mapping[int, CpuidLeaf], patch: CpuidPatch
) -> list[CpuidEntry]:
    """Entries for KVM_SET_CPUID2.

    supported: of supported_cpuid(); its hypervisor leaves are replaced by `hypervisor`.  patch(leaf, subleaf,
    registers) has the last word on every other leaf.
    """
    entries = [
        _with_registers(entry, patch(entry["function"], entry["index"], _own_apic_id(entry, apic_id)))
        for entry in supported
        if entry["function"] not in HYPERVISOR_LEAVES
    ]
    for leaf, registers in hypervisor.items():
        entries.append({"function": leaf, "index": 0, "flags": 0, **registers._asdict()})
    return entries


def _own_apic_id(entry: CpuidEntry, apic_id: int) -> CpuidLeaf:
    registers = CpuidLeaf(entry["eax"], entry["ebx"], entry["ecx"], entry["edx"])
    if entry["function"] == 1:
        return registers._replace(ebx=registers.ebx & 0x00FFFFFF | (apic_id & 0xFF) << 24)
    if entry["function"] in TOPOLOGY_LEAVES:
        return registers._replace(edx=apic_id)
    return registers


def _with_registers(entry: CpuidEntry, registers: CpuidLeaf) -> CpuidEntry:
    return {**entry, **registers._asdict()}
