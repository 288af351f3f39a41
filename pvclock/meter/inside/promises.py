"""What a guest is told about its clocks: the hypervisor by its signature, features by their names, and frequencies.

Sources: Documentation/virt/kvm/x86/cpuid.rst; Hypervisor Top Level Functional Specification, 2.4; Intel SDM, CPUID;
https://lwn.net/Articles/301888/ for leaf 0x40000010.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntFlag
from fractions import Fraction
from typing import Final, NamedTuple

from pvclock._core import TSC_STABLE_BIT
from pvclock.meter.inside.record import PageRecord, ProbeRecord
from pvclock.providers.hyperv.features import Privilege
from pvclock.providers.kvm.features import KvmFeature
from pvclock.providers.timing import CPUID_TIMING

__all__ = ["FrequencyClaim", "Hypervisor", "Promises", "page_hz", "promises"]


HYPERVISOR_PRESENT: Final = 1 << 31
TSC_DEADLINE: Final = 1 << 24
TSC_ADJUST: Final = 1 << 1
INVARIANT_TSC: Final = 1 << 8

KVM_SIGNATURE: Final = "KVMKVMKVM"
HYPERV_SIGNATURE: Final = "Microsoft Hv"
TIMING_LEAF_OF: Final = {"VMwareVMware", KVM_SIGNATURE, "HVFHVFHVFHVF", "VBoxVBoxVBox", "bhyve bhyve", "TCGTCGTCGTCG"}
"""Whose leaf 0x40000010, if they have one, is VMware's timing leaf; Hyper-V's and Xen's leaves there mean others."""

NAMES: Final = {
    KVM_SIGNATURE: "KVM",
    "TCGTCGTCGTCG": "QEMU's TCG",
    HYPERV_SIGNATURE: "Hyper-V",
    "VMwareVMware": "VMware",
    "XenVMMXenVMM": "Xen",
    "VBoxVBoxVBox": "VirtualBox",
    "bhyve bhyve": "bhyve",
    "Linux KVM Hv": "KVM",
    "HVFHVFHVFHVF": "Apple's Hypervisor.framework (HVF)",
    "Apple VZ": "Apple's Hypervisor.framework (HVF)",
    "ACRNACRNACRN": "ACRN",
    "QNXQVMBSQG": "QNX",
    "NVMMNVMMNVMM": "NVMM",
    "OpenBSDVMM58": "OpenBSD's vmm",
    "Jailhouse": "Jailhouse",
    "prl hyperv": "Parallels",
    "lrpepyh vr": "Parallels",
}
"""By signature, without trailing zeros and blanks.

Parallels writes its own with the bytes of each word reversed.
"""


class Hypervisor(NamedTuple):
    """One signature: the leaf it stands at, its text, and whose it is, in words."""

    leaf: int
    signature: str
    name: str


class FrequencyClaim(NamedTuple):
    """A frequency of the TSC as `source` (such as "CPUID 0x40000010") tells it: hz, within `grain_hz` either way.

    is_nominal: by its definition it is what the CPU is sold as, not what its TSC does.
    """

    source: str
    hz: Fraction
    grain_hz: Fraction
    is_nominal: bool = False


class Promises(NamedTuple):
    """What CPUID and the pvclock records promise.

    hypervisor: the most telling name, "none" without one.  hypervisors: every signature.  clocks: those offered, in
    words.  kvm_features, hyperv_features: as KVM and the TLFS name them.  kvm_stable: the feature CLOCKSOURCE_STABLE.
    has_stable_pages: every pvclock record seen has its STABLE flag (None: none was seen).
    """

    hypervisor: str
    hypervisors: tuple[Hypervisor, ...]
    clocks: tuple[str, ...]
    kvm_features: tuple[str, ...]
    hyperv_features: tuple[str, ...]
    invariant_tsc: bool
    constant_tsc: bool
    tsc_deadline: bool
    tsc_adjust: bool
    kvm_stable: bool
    has_stable_pages: bool | None
    frequencies: tuple[FrequencyClaim, ...]


class _Leaves(NamedTuple):
    """CPUID by leaf (subleaf 0), zeros where none was read: EAX, EBX, ECX, EDX."""

    by_leaf: Mapping[int, tuple[int, int, int, int]]

    def at(self, leaf: int) -> tuple[int, int, int, int]:
        return self.by_leaf.get(leaf, (0, 0, 0, 0))


def promises(record: ProbeRecord) -> Promises:
    """Read what the guest was told from a record's CPUID leaves and pages."""
    leaves = _Leaves({each.leaf: each[2:] for each in record.cpuid if each.subleaf == 0})
    found = _hypervisors(leaves)
    kvm = _kvm_features(leaves, found)
    hyperv = _privileges(leaves, found)
    pages = [page for page in record.pages if page.mul]
    return Promises(
        hypervisor=_most_telling(leaves, found),
        hypervisors=found,
        clocks=_clocks(kvm, hyperv, leaves, found),
        kvm_features=_names(kvm, KvmFeature),
        hyperv_features=_names(hyperv, Privilege),
        invariant_tsc=bool(leaves.at(0x80000007)[3] & INVARIANT_TSC),
        constant_tsc=_is_constant(leaves),
        tsc_deadline=bool(leaves.at(1)[2] & TSC_DEADLINE),
        tsc_adjust=bool(leaves.at(7)[1] & TSC_ADJUST),
        kvm_stable=bool(kvm & KvmFeature.CLOCKSOURCE_STABLE),
        has_stable_pages=all(page.flags & TSC_STABLE_BIT for page in pages) if pages else None,
        frequencies=(*_leaf_frequencies(leaves, found), *_page_frequencies(pages)),
    )


def page_hz(page: PageRecord) -> Fraction:
    """The TSC frequency at which that page's nanoseconds are seconds: 10^9 * 2^32 / (mul * 2^shift)."""
    shifted = Fraction(1 << page.shift) if page.shift >= 0 else Fraction(1, 1 << -page.shift)
    return Fraction(10**9 << 32, page.mul) / shifted


# Inside


def _hypervisors(leaves: _Leaves) -> tuple[Hypervisor, ...]:
    """Every signature from leaf 0x40000000 in steps of 0x100."""
    if not leaves.at(1)[2] & HYPERVISOR_PRESENT:
        return ()
    found = []
    for leaf in range(0x40000000, 0x40010000, 0x100):
        if leaf in leaves.by_leaf and any(words := leaves.at(leaf)[1:]):
            signature = b"".join(word.to_bytes(4, "little") for word in words).rstrip(b"\0 ").decode("latin-1")
            signature = "".join(each if each.isascii() and each.isprintable() else "." for each in signature)
            found.append(Hypervisor(leaf, signature, NAMES.get(signature.strip(" ."), f'unknown ("{signature}")')))
    return tuple(found)


def _most_telling(leaves: _Leaves, found: tuple[Hypervisor, ...]) -> str:
    """KVM, VirtualBox and Xen may show Hyper-V's signature first and their own after it."""
    if not found:
        return "unknown" if leaves.at(1)[2] & HYPERVISOR_PRESENT else "none"
    return next((each.name for each in found if each.signature != HYPERV_SIGNATURE), found[0].name)


def _base_of(signature: str, found: tuple[Hypervisor, ...]) -> int | None:
    return next((each.leaf for each in found if each.signature == signature), None)


def _kvm_features(leaves: _Leaves, found: tuple[Hypervisor, ...]) -> int:
    base = _base_of(KVM_SIGNATURE, found)
    return 0 if base is None else leaves.at(base + 1)[0]


def _privileges(leaves: _Leaves, found: tuple[Hypervisor, ...]) -> int:
    """Leaf 0x40000003's EAX and EBX, if 0x40000001 answers with "Hv#1", whatever the signature is."""
    if not found or leaves.at(0x40000001)[0] != int.from_bytes(b"Hv#1", "little"):
        return 0
    eax, ebx, _, _ = leaves.at(0x40000003)
    return ebx << 32 | eax


def _names(bits: int, kind: type[IntFlag]) -> tuple[str, ...]:
    named = [each for each in kind if each & bits]
    rest = bits & ~sum(named)
    return (*(each.name or "" for each in named), *([f"{rest:#x}"] if rest else []))


def _clocks(kvm: int, hyperv: int, leaves: _Leaves, found: tuple[Hypervisor, ...]) -> tuple[str, ...]:
    clocks = []
    if kvm & (KvmFeature.CLOCKSOURCE | KvmFeature.CLOCKSOURCE2):
        clocks.append("kvmclock, STABLE" if kvm & KvmFeature.CLOCKSOURCE_STABLE else "kvmclock, not STABLE")
    if hyperv & Privilege.TIME_REF_COUNT:
        page = "reference TSC page" if hyperv & Privilege.REFERENCE_TSC else "without a reference TSC page"
        clocks.append(f"Hyper-V's reference counter, {page}")
    if _base_of("XenVMMXenVMM", found) is not None:
        clocks.append("Xen's pvclock")
    if leaves.at(0x80000007)[3] & INVARIANT_TSC:
        clocks.append("invariant TSC")
    return tuple(clocks)


def _is_constant(leaves: _Leaves) -> bool:
    """As Linux takes constant_tsc: from the invariant bit, and of Intel's CPUs since Prescott and Core."""
    _, ebx, ecx, edx = leaves.at(0)
    vendor = b"".join(word.to_bytes(4, "little") for word in (ebx, edx, ecx))
    signature = leaves.at(1)[0]
    family, model = signature >> 8 & 15, (signature >> 16 & 15) << 4 | signature >> 4 & 15
    by_model = vendor == b"GenuineIntel" and ((family == 15 and model >= 3) or (family == 6 and model >= 14))
    return by_model or bool(leaves.at(0x80000007)[3] & INVARIANT_TSC)


# Frequencies


def _leaf_frequencies(leaves: _Leaves, found: tuple[Hypervisor, ...]) -> list[FrequencyClaim]:
    claims = []
    last, khz = leaves.at(0x40000000)[0], leaves.at(CPUID_TIMING)[0]
    if khz and last >= CPUID_TIMING and found and found[0].leaf == 0x40000000 and found[0].signature in TIMING_LEAF_OF:
        claims.append(FrequencyClaim("CPUID 0x40000010", Fraction(khz * 1000), Fraction(1000)))
    denominator, numerator, crystal_hz, _ = leaves.at(0x15)
    base_mhz = leaves.at(0x16)[0] & 0xFFFF
    if denominator and numerator and crystal_hz:
        claims.append(FrequencyClaim("CPUID 0x15", Fraction(crystal_hz * numerator, denominator), Fraction(0)))
    if base_mhz:
        claims.append(FrequencyClaim("CPUID 0x16", Fraction(base_mhz * 10**6), Fraction(10**6), is_nominal=True))
    return claims


def _page_frequencies(pages: list[PageRecord]) -> list[FrequencyClaim]:
    """Each distinct scale of the pvclock records; mul is rounded to a whole number."""
    distinct = {(page.mul, page.shift): page for page in reversed(pages)}
    claims = []
    for page in reversed(distinct.values()):
        hz = page_hz(page)
        claims.append(FrequencyClaim(f"the pvclock page of CPU {page.cpu}", hz, hz / page.mul))
    return claims
