"""The CPUID of a guest's vCPUs: what the host's KVM supports, changed to fit this VM."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeAlias

from pvclock.arguments import function, serving, whole
from pvclock.kvm import Kvm, Vcpu
from pvclock.kvm.arguments import vcpus_of
from pvclock.providers.interface import CpuidLeaf
from pvclock.providers.kvm import kvm_cpuid_leaves

__all__ = [
    "CpuidChange",
    "CpuidEntry",
    "CpuidSource",
    "GuestCpuid",
    "KernelClock",
    "guest_cpuid",
    "set_guest_cpuid",
    "supported_cpuid",
]

CpuidEntry: TypeAlias = dict[str, int]
"""An entry of KVM_SET_CPUID2: function, index, flags, eax, ebx, ecx, edx."""

CpuidChange: TypeAlias = Callable[[int, list[CpuidEntry]], list[CpuidEntry]]
"""change(vcpu, entries): what that vCPU gets instead.

Asked again before the vCPUs first run, if the clock's leaves have changed by then, as by a dilation.
"""

HYPERVISOR_LEAVES = range(0x40000000, 0x50000000)
TOPOLOGY_LEAVES = (0xB, 0x1F)
TSC_DEADLINE = 1 << 24
"""CPUID.1:ECX: the LAPIC timer has a TSC-deadline mode."""
HYPERVISOR = 1 << 31
"""CPUID.1:ECX: a hypervisor is present."""
KVM_SIGNATURE = int.from_bytes(b"KVMK", "little")
"""EBX of the first of KVM's leaves: "KVMKVMKVM" begins with it."""
INVARIANT_TSC = 1 << 8
"""CPUID.80000007:EDX."""


class CpuidSource(Protocol):
    """A clock's part in a guest's CPUID: a GuestClock's, or a KernelClock's."""

    @property
    def cpuid_leaves(self) -> Mapping[int, CpuidLeaf]:
        """The hypervisor leaves, all there are."""

    def patch_cpuid(self, leaf: int, subleaf: int, registers: CpuidLeaf) -> CpuidLeaf:
        """The registers of any other leaf, changed as this clock needs them."""


class KernelClock(NamedTuple):
    """The CPUID of a guest whose clock is the kernel's: KVM's leaves with those features, and no invariant TSC."""

    features: int

    @property
    def cpuid_leaves(self) -> Mapping[int, CpuidLeaf]:
        """See CpuidSource."""
        return kvm_cpuid_leaves(self.features)

    def patch_cpuid(self, leaf: int, _subleaf: int, registers: CpuidLeaf) -> CpuidLeaf:
        """See CpuidSource: the bits that GuestClock.patch_cpuid() sets by default, TSC_ADJUST apart."""
        if leaf == 1:
            return registers._replace(ecx=registers.ecx | HYPERVISOR)
        if leaf == 0x80000007:
            return registers._replace(edx=registers.edx & ~INVARIANT_TSC)
        return registers


class _Given(NamedTuple):
    """A clock's part in the CPUID of vCPUs that have it; see CpuidSource."""

    cpuid_leaves: Mapping[int, CpuidLeaf]
    patch_cpuid: Callable[[int, int, CpuidLeaf], CpuidLeaf]


class GuestCpuid:
    """The CPUID of a machine's vCPUs: given at once, and anew before they first run if the clock has another by then.

    change: see set_guest_cpuid().
    """

    def __init__(self, kvm: Kvm, vcpus: Sequence[Vcpu], clock: CpuidSource, change: CpuidChange | None = None) -> None:
        self.vcpus = vcpus
        self._has_run = False
        self._entries: list[CpuidEntry] = []
        self._kvm, self._clock, self._change = kvm, clock, change
        self._give()

    def update(self) -> None:
        """Give the vCPUs what the clock offers by now, unless they have run: after that KVM refuses another CPUID."""
        if not self._has_run and self._clock.cpuid_leaves != self._leaves:
            self._give()

    def settle(self) -> None:
        """The vCPUs are about to run."""
        self.update()
        self._has_run = True

    def add(self, vcpu: Vcpu) -> None:
        """Give a late vCPU what the others have, whatever the clock would offer by now."""
        set_guest_cpuid(self._kvm, [vcpu], _Given(self._leaves, self._clock.patch_cpuid), self._change)

    @property
    def offers_deadlines(self) -> bool:
        """Does it show the guest a clock of KVM's, and a LAPIC timer with TSC deadlines?"""
        return any(entry["function"] == 1 and entry["ecx"] & TSC_DEADLINE for entry in self._entries) and any(
            entry["function"] in HYPERVISOR_LEAVES and entry["ebx"] == KVM_SIGNATURE for entry in self._entries
        )

    def _give(self) -> None:
        self._leaves = dict(self._clock.cpuid_leaves)
        self._entries = set_guest_cpuid(self._kvm, self.vcpus, self._clock, self._change)


def set_guest_cpuid(
    kvm: Kvm, vcpus: Sequence[Vcpu], clock: CpuidSource, change: CpuidChange | None = None
) -> list[CpuidEntry]:
    """Give each vCPU its guest_cpuid(), and let what the kernel serves beside the clock go by it (Linux 5.10).

    change: the last word on it.  Returns what the last vCPU has.

    Call it before the vCPUs run: after that KVM refuses another CPUID.
    """
    enforce = "KVM_CAP_ENFORCE_PV_FEATURE_CPUID"
    can_enforce = _opened(kvm).check_extension(enforce)
    if change is not None:
        function("change", change)
    _check_clock(clock)
    supported = supported_cpuid(kvm)
    entries: list[CpuidEntry] = []
    for vcpu in vcpus_of(vcpus):
        entries = _guest_entries(supported, vcpu.vcpu_id, clock)
        if change is not None:
            entries = change(vcpu.vcpu_id, entries)
        vcpu.set_cpuid(entries)
        if can_enforce:
            vcpu.enable_cap(enforce, 1)
    return entries


def guest_cpuid(kvm: Kvm, apic_id: int, clock: CpuidSource) -> list[CpuidEntry]:
    """The entries for Vcpu.set_cpuid(), for a VMM that changes some of them first.

    What KVM supports for a VM whose LAPICs are in the kernel, this vCPU's APIC id, the clock's hypervisor leaves in
    place of KVM's, and the clock's bits in the others.
    """
    whole("apic_id", apic_id)
    _check_clock(clock)
    return _guest_entries(supported_cpuid(kvm), apic_id, clock)


def _guest_entries(supported: list[CpuidEntry], apic_id: int, clock: CpuidSource) -> list[CpuidEntry]:
    """guest_cpuid(), of what KVM was found to support."""
    entries = [
        {**entry, **clock.patch_cpuid(entry["function"], entry["index"], _own_apic_id(entry, apic_id))._asdict()}
        for entry in supported
        if entry["function"] not in HYPERVISOR_LEAVES
    ]
    for leaf, registers in clock.cpuid_leaves.items():
        entries.append({"function": leaf, "index": 0, "flags": 0, **registers._asdict()})
    return entries


def supported_cpuid(kvm: Kvm) -> list[CpuidEntry]:
    """Kvm.get_supported_cpuid() for a VM whose LAPICs are in the kernel.

    Older kernels (Linux 6.1) leave TSC_DEADLINE out there, because it depends on that, and have a capability for it.
    """
    entries = _opened(kvm).get_supported_cpuid()
    if not kvm.check_extension("KVM_CAP_TSC_DEADLINE_TIMER"):
        return entries
    return [{**entry, "ecx": entry["ecx"] | TSC_DEADLINE} if entry["function"] == 1 else entry for entry in entries]


def _check_clock(clock: CpuidSource) -> None:
    serving("clock", clock, "patch_cpuid", wanted="a GuestClock or a KernelClock")


def _opened(kvm: Kvm) -> Kvm:
    return serving("kvm", kvm, "get_supported_cpuid", "check_extension", wanted="what open_kvm() returns")


def _own_apic_id(entry: CpuidEntry, apic_id: int) -> CpuidLeaf:
    registers = CpuidLeaf(entry["eax"], entry["ebx"], entry["ecx"], entry["edx"])
    if entry["function"] == 1:
        return registers._replace(ebx=registers.ebx & 0x00FFFFFF | (apic_id & 0xFF) << 24)
    if entry["function"] in TOPOLOGY_LEAVES:
        return registers._replace(edx=apic_id)
    return registers
