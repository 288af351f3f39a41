"""What a guest is told of its clocks: hypervisors, features and frequencies, from CPUID and the pvclock records."""

from __future__ import annotations

from fractions import Fraction

import pytest

from pvclock.meter.inside import Promises, promises
from pvclock.meter.inside.promises import FrequencyClaim
from tests.unit.inside_records import (
    HYPERVISOR,
    INVARIANT,
    KVM_LEAVES,
    PAGE,
    a_clock,
    a_record,
    leaf,
    record_of,
    signature_leaf,
    text_words,
)

pytestmark = pytest.mark.row("E18")

HYPERV = [HYPERVISOR, signature_leaf("Microsoft Hv", last=0x4000000C), leaf(0x40000001, text_words("Hv#1", 1)[0])]


def told_by(*leaves: list[int], pages: list[object] | None = None) -> Promises:
    """Return what those leaves and pages promise."""
    return promises(record_of(a_record([a_clock()], leaves=leaves, pages=pages or [])))


@pytest.mark.parametrize(
    ("signature", "name"),
    [
        ("KVMKVMKVM", "KVM"),
        ("TCGTCGTCGTCG", "QEMU's TCG"),
        ("Microsoft Hv", "Hyper-V"),
        ("VMwareVMware", "VMware"),
        ("XenVMMXenVMM", "Xen"),
        ("VBoxVBoxVBox", "VirtualBox"),
        ("bhyve bhyve ", "bhyve"),
        ("Apple VZ", "Apple's Hypervisor.framework (HVF)"),
        ("Some\x1bthing", 'unknown ("Some.thing")'),
    ],
)
def test_who_the_hypervisor_is(signature: str, name: str) -> None:
    """By its signature; one that is not known is quoted."""
    assert told_by(HYPERVISOR, signature_leaf(signature)).hypervisor == name


def test_no_hypervisor() -> None:
    """Without the bit that says so nothing in its leaves counts: bare metal answers them with another leaf's words."""
    assert told_by(leaf(1), signature_leaf("KVMKVMKVM")).hypervisor == "none"
    assert told_by(HYPERVISOR).hypervisor == "unknown"


def test_kvm_behind_hyperv() -> None:
    """KVM with Hyper-V's enlightenments shows both, and its features are at its own base."""
    told = told_by(
        *HYPERV,
        signature_leaf("KVMKVMKVM", 0x40000100),
        leaf(0x40000101, 1 << 24 | 1 << 3),
        leaf(0x40000003, 1 << 9 | 2),
    )
    assert told.hypervisor == "KVM"
    assert [each.name for each in told.hypervisors] == ["Hyper-V", "KVM"]
    assert told.kvm_features == ("CLOCKSOURCE2", "CLOCKSOURCE_STABLE")
    assert told.hyperv_features == ("TIME_REF_COUNT", "REFERENCE_TSC")
    assert told.clocks == ("kvmclock, STABLE", "Hyper-V's reference counter, reference TSC page")


def test_hyperv_privileges_need_its_interface() -> None:
    """Leaf 0x40000003 means Hyper-V's privileges only where 0x40000001 says "Hv#1"."""
    assert not told_by(HYPERVISOR, signature_leaf("XenVMMXenVMM"), leaf(0x40000003, 2)).hyperv_features


def test_bits_without_a_name() -> None:
    """They are told as a number."""
    assert told_by(HYPERVISOR, signature_leaf("KVMKVMKVM"), leaf(0x40000001, 1 << 30)).kvm_features == ("0x40000000",)


def test_the_cpus_own_bits() -> None:
    """Invariant and constant TSC, the deadline timer, TSC_ADJUST."""
    told = told_by(leaf(0), leaf(1, ecx=1 << 24), leaf(7, ebx=1 << 1), INVARIANT)
    assert (told.invariant_tsc, told.constant_tsc, told.tsc_deadline, told.tsc_adjust) == (True, True, True, True)
    bare = told_by(leaf(0), leaf(1))
    assert (bare.invariant_tsc, bare.constant_tsc, bare.tsc_deadline, bare.tsc_adjust) == (False, False, False, False)


def test_a_constant_tsc_by_intels_model() -> None:
    """Linux takes Intel's family 6 from model 14 on to have one, without the invariant bit."""
    ebx, edx, ecx = text_words("GenuineIntel")
    assert told_by([0, 0, 22, ebx, ecx, edx], leaf(1, 0x306A9)).constant_tsc
    assert not told_by([0, 0, 22, ebx, ecx, edx], leaf(1, 0x6D0)).constant_tsc


def test_the_timing_leaf() -> None:
    """In kHz, if the first hypervisor's leaves reach it; Hyper-V's leaf of that number means something else."""
    timing = leaf(0x40000010, 2_900_000, 1_000_000)
    (claim,) = told_by(HYPERVISOR, signature_leaf("KVMKVMKVM", last=0x40000010), timing).frequencies
    assert claim == FrequencyClaim("CPUID 0x40000010", Fraction(2_900_000_000), Fraction(1000))
    assert not told_by(HYPERVISOR, signature_leaf("KVMKVMKVM"), timing).frequencies
    assert not told_by(HYPERVISOR, signature_leaf("Microsoft Hv", last=0x40000010), timing).frequencies


def test_the_cpus_frequency_leaves() -> None:
    """0x15 is a ratio of the crystal, exactly; without the crystal it says nothing.  0x16 is a name, in MHz."""
    ratio, base = told_by(leaf(0x15, 2, 250, 24_000_000), leaf(0x16, 2904)).frequencies
    assert ratio == FrequencyClaim("CPUID 0x15", Fraction(3_000_000_000), Fraction(0))
    assert base == FrequencyClaim("CPUID 0x16", Fraction(2_904_000_000), Fraction(10**6), is_nominal=True)
    assert not told_by(leaf(0x15, 2, 250, 0)).frequencies


def test_the_frequency_of_a_page() -> None:
    """A scale's TSC frequency: 10^9 * 2^32 / (mul * 2^shift), to what a unit of mul is."""
    (claim,) = told_by(
        pages=[{**PAGE, "mul": 1 << 31, "shift": 0}, {**PAGE, "cpu": 1, "mul": 1 << 31, "shift": 0}]
    ).frequencies
    assert claim == FrequencyClaim("the pvclock page of CPU 0", Fraction(2 * 10**9), Fraction(2 * 10**9, 1 << 31))
    (halved,) = told_by(pages=[{**PAGE, "mul": 1 << 31, "shift": -1}]).frequencies
    assert halved.hz == 4 * 10**9


def test_stable_pages() -> None:
    """Every page's flag has to be set; without a page nothing is known."""
    assert told_by(pages=[PAGE, {**PAGE, "cpu": 1}]).has_stable_pages is True
    assert told_by(pages=[PAGE, {**PAGE, "cpu": 1, "flags": 0}]).has_stable_pages is False
    assert told_by(*KVM_LEAVES).has_stable_pages is None
    assert told_by(*KVM_LEAVES).kvm_stable
