"""What CPUID tells a Hyper-V guest: vendor, version, what is offered, and what can be, by profile and VMM."""

from __future__ import annotations

from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock import ConfigError, CpuidLeaf
from pvclock.providers.hyperv import Feature, HyperVProvider, Privilege, Recommendation
from pvclock.providers.interface import VcpuHost
from tests.unit.hyperv_provider import EVERY_PROFILE, LEAF, OS_ID, KickingVmm, a_provider, full_vmm, is_refused
from tests.unit.stub_clock import StubClock

CORE: Final = 1 << 1 | 1 << 5 | 1 << 6 | 1 << 9 | 1 << 11
"""Counter, hypercalls, VP index, reference TSC, frequencies: what any clock serves."""

SYNIC, TIMERS, APIC, RESET, REENLIGHTENMENT, TSC_INVARIANT = 1 << 2, 1 << 3, 1 << 4, 1 << 7, 1 << 13, 1 << 15
FREQUENCY, CRASH, DIRECT_TIMERS = 1 << 8, 1 << 10, 1 << 19
CALLS = 1 << 4 | 1 << 20
"""Messages and extended hypercalls."""
MANDATORY: Final = 1 << 5 | 1 << 6


def leaf(provider: HyperVProvider, number: int) -> CpuidLeaf:
    """The leaf of that number, counted from 0x40000000."""
    return provider.cpuid_leaves[LEAF + number]


def vendor(found: CpuidLeaf) -> bytes:
    """EBX, ECX, EDX as text."""
    return b"".join(register.to_bytes(4, "little") for register in found[1:])


# Vendor, interface, version


@pytest.mark.row("H-01", "H-10")
@pytest.mark.parametrize(
    ("profile", "name", "last"),
    [
        ("linux", b"Microsoft Hv", 0x4000000A),
        ("document", b"Microsoft Hv", 0x4000000A),
        ("virtualbox", b"VBoxVBoxVBox", 0x40000006),
    ],
)
def test_the_signature_leaf(profile: str, name: bytes, last: int) -> None:
    """Leaf 0x40000000 has the vendor's 12 letters and the number of the last leaf; there is no gap before that."""
    provider, _ = a_provider(profile=profile)
    assert vendor(leaf(provider, 0)) == name
    assert leaf(provider, 0).eax == last
    assert sorted(provider.cpuid_leaves) == list(range(LEAF, last + 1))


@pytest.mark.row("H-01", "E13")
@EVERY_PROFILE
@given(name=st.text(st.characters(codec="ascii"), min_size=12, max_size=12))
def test_any_twelve_characters_are_a_vendor(profile: str, name: str) -> None:
    """A VMM's own vendor id is what the guest reads, whatever its 12 characters are, and is kept in the options."""
    provider, _ = a_provider(profile=profile, vendor_id=name)
    assert vendor(leaf(provider, 0)) == name.encode()
    assert provider.config["vendor_id"] == name


@pytest.mark.row("H-01", "E13")
@pytest.mark.parametrize("name", ["", "Microsoft H", "Microsoft Hv ", "Microsöft Hv", "M" * 13])
def test_another_vendor_id_is_refused(name: str) -> None:
    """11 and 13 characters, and letters that are no ASCII, are a ConfigError that says how many there must be."""
    with pytest.raises(ConfigError, match=r"vendor_id .*; it is exactly 12 ASCII characters"):
        a_provider(vendor_id=name)


@pytest.mark.row("H-11")
@EVERY_PROFILE
def test_the_interface_leaf(profile: str) -> None:
    """Leaf 0x40000001 EAX spells "Hv#1", by which Linux's KVM and every guest know the interface."""
    assert leaf(a_provider(profile=profile)[0], 1) == CpuidLeaf(eax=0x31237648)


@pytest.mark.row("H-12", "H-30")
def test_the_version_leaf() -> None:
    """KVM's version is always there; VirtualBox's from the first OS id on, and no more once the guest writes 0."""
    version = CpuidLeaf(eax=0x3839, ebx=0x000A0000, ecx=0)
    provider, _ = a_provider()
    assert leaf(provider, 2) == version
    provider, _ = a_provider(profile="virtualbox")
    shown, others = [leaf(provider, 2)], [{**provider.cpuid_leaves, LEAF + 2: version}]
    for os_id in (OS_ID, 1, 0, OS_ID):
        provider.write_msr(1, 0x40000000, os_id)
        shown.append(leaf(provider, 2))
        others.append({**provider.cpuid_leaves, LEAF + 2: version})
    assert others == [provider.cpuid_leaves] * 5
    assert shown == [CpuidLeaf(), version, version, CpuidLeaf(), version]
    provider.reset()
    assert leaf(provider, 2) == CpuidLeaf()


# What is offered by default


@pytest.mark.row("H-13", "H-20", "H-21", "H-23")
def test_privileges_are_what_can_be_served() -> None:
    """By default a guest may use what this clock and its VMM serve: without interrupts or resets, fewer."""
    by_interrupts = SYNIC | TIMERS | REENLIGHTENMENT
    provider, _ = a_provider(vmm=full_vmm())
    every = CpuidLeaf(CORE | RESET | by_interrupts | APIC, CALLS, 0, FREQUENCY | CRASH | DIRECT_TIMERS)
    assert leaf(provider, 3) == every
    provider, _ = a_provider()
    assert leaf(provider, 3) == every._replace(eax=CORE | RESET | by_interrupts)
    provider, _ = a_provider(vmm=KickingVmm())
    assert leaf(provider, 3) == CpuidLeaf(CORE, CALLS, 0, FREQUENCY | CRASH)
    provider = HyperVProvider(StubClock(2), 2)
    assert leaf(provider, 3) == CpuidLeaf(CORE, CALLS, 0, FREQUENCY | CRASH)


@pytest.mark.row("H-13", "H-20", "H-21", "H-23")
def test_what_virtualbox_offers() -> None:
    """VirtualBox offers no re-enlightenment, nor VP run time, SynIC, timers, statistics, idling and debug by bit 12."""
    provider, _ = a_provider(profile="virtualbox", vmm=full_vmm())
    found = leaf(provider, 3)
    assert found == CpuidLeaf(CORE | RESET | APIC, 1 << 20, 0, FREQUENCY | CRASH)
    assert not any(found.eax >> bit & 1 for bit in (0, 2, 3, 8, 10, 12))


@pytest.mark.row("H-01", "H-21", "H-23")
def test_virtualbox_lets_microsofts_guests_be_debugged() -> None:
    """With the vendor id "Microsoft Hv", VirtualBox also offers its debug interface, by MSRs and by privilege."""
    provider, _ = a_provider(profile="virtualbox", vmm=full_vmm(), vendor_id="Microsoft Hv")
    debug, debug_msrs, debugging = 1 << 1, 1 << 11, 1 << 11
    offered = CpuidLeaf(CORE | RESET | APIC, 1 << 20 | debugging, 0, FREQUENCY | CRASH | debug | debug_msrs)
    assert leaf(provider, 3) == offered
    assert not is_refused(provider, 0x400000F2)
    assert is_refused(a_provider(profile="virtualbox")[0], 0x400000F2)


@pytest.mark.row("H-14", "H-22")
@pytest.mark.parametrize(
    ("profile", "hints"),
    [
        ("linux", 1 << 3 | 1 << 5 | 1 << 9),
        ("document", 1 << 3 | 1 << 5 | 1 << 9),
        ("virtualbox", 1 << 4 | 1 << 5 | 1 << 8),
    ],
)
def test_recommendations(profile: str, hints: int) -> None:
    """Relaxed timing, and the APIC by MSR without auto-EOI; VirtualBox's reset and x2APIC; no call for spin waits."""
    assert leaf(a_provider(profile=profile, vmm=full_vmm())[0], 4) == CpuidLeaf(eax=hints, ebx=0xFFFFFFFF)


@pytest.mark.row("H-22")
def test_a_reset_that_cannot_be_is_not_recommended() -> None:
    """Without a VMM that resets, or has APICs, what would need their MSRs, which are #GP, is not recommended."""
    provider, _ = a_provider(vmm=KickingVmm())
    assert leaf(provider, 4).eax == 1 << 5
    provider, _ = a_provider(profile="virtualbox", vmm=KickingVmm())
    assert leaf(provider, 4).eax == 1 << 5 | 1 << 8
    with pytest.raises(ConfigError, match=r"recommendations RESET_BY_MSR cannot be served here; choose from RELAXED"):
        a_provider(recommendations=1 << 4, vmm=KickingVmm())


@pytest.mark.row("H-15")
@pytest.mark.parametrize("vcpus", [1, 2, 64, 65, 255, 256, 4095, 4096])
def test_the_limits_leaf(vcpus: int) -> None:
    """Leaf 0x40000005 has the VM's number of vCPUs, and KVM's 64 logical processors; VirtualBox's is zero."""
    for profile in ("linux", "document"):
        assert leaf(a_provider(vcpus=vcpus, profile=profile)[0], 5) == CpuidLeaf(vcpus, 64)
    assert leaf(a_provider(vcpus=vcpus, profile="virtualbox")[0], 5) == CpuidLeaf()


@pytest.mark.row("H-16")
def test_the_hardware_leaf() -> None:
    """Leaf 0x40000006 says nested paging and MSR bitmaps in VirtualBox, nothing in KVM, and what a VMM says it uses."""
    assert leaf(a_provider(profile="virtualbox")[0], 6) == CpuidLeaf(eax=1 << 3 | 1 << 1)
    assert leaf(a_provider()[0], 6) == CpuidLeaf()
    for hardware in (0, 1 << 0, 1 << 1 | 1 << 3):
        provider, _ = a_provider(profile="virtualbox", hardware=hardware)
        assert leaf(provider, 6) == CpuidLeaf(eax=hardware)
    with pytest.raises(ConfigError, match=r"hardware 0x4 cannot be served here; choose from APIC_OVERLAY\|MSR_BITMAPS"):
        a_provider(hardware=1 << 2)


@pytest.mark.row("H-17", "H-10")
@EVERY_PROFILE
def test_the_debug_interfaces_leaves(profile: str) -> None:
    """With vs_interface leaves 0x40000080 to 0x40000082 are there, the last of all, and kernel debugging is allowed."""
    provider, _ = a_provider(profile=profile, vs_interface=True)
    assert leaf(provider, 0).eax == 0x40000082
    assert leaf(provider, 0x80).eax == 0x40000082
    assert vendor(leaf(provider, 0x80)) == b"Microsoft VS"
    assert leaf(provider, 0x81) == CpuidLeaf(eax=0x31235356)
    assert leaf(provider, 0x82) == CpuidLeaf(eax=2)
    assert vendor(leaf(provider, 0)) in (b"Microsoft Hv", b"VBoxVBoxVBox")


@pytest.mark.row("H-21", "H-23")
@pytest.mark.parametrize(
    ("feature", "privilege", "profile"),
    [(FREQUENCY, 1 << 11, "linux"), (DIRECT_TIMERS, TIMERS, "linux"), (1 << 1, 1 << 43, "virtualbox")],
)
def test_features_come_with_their_privilege(feature: int, privilege: int, profile: str) -> None:
    """Frequencies, direct timers and the debugger: by default with their privilege alone, and refused without it."""
    how: dict[str, Any] = {"profile": profile, "vmm": full_vmm(), "vendor_id": "Microsoft Hv"}
    assert not leaf(a_provider(privileges=MANDATORY, **how)[0], 3).edx & feature
    assert leaf(a_provider(privileges=MANDATORY | privilege, **how)[0], 3).edx & feature
    assert leaf(a_provider(privileges=MANDATORY | privilege, features=feature, **how)[0], 3).edx == feature
    with pytest.raises(ConfigError, match=f"features {Feature(feature).name} cannot be served here"):
        a_provider(privileges=MANDATORY, features=feature, **how)


# What a VMM asks for


@pytest.mark.row("H-13", "H-20", "H-21", "E13")
@EVERY_PROFILE
@given(data=st.data())
def test_what_can_be_served_is_offered_as_asked(profile: str, data: st.DataObject) -> None:
    """Any choice among what is served that has the two mandatory privileges is what CPUID shows, and is kept."""
    bits = [1, 7, 9, 11, 13, 15]
    privileges = MANDATORY | sum(1 << bit for bit in data.draw(st.sets(st.sampled_from(bits))))
    features = sum(1 << bit for bit in data.draw(st.sets(st.sampled_from([8, 10]))))
    if not privileges & 1 << 11:
        features &= ~FREQUENCY
    provider, _ = a_provider(profile=profile, privileges=privileges, features=features)
    assert leaf(provider, 3) == CpuidLeaf(privileges, 0, 0, features)
    assert (provider.config["privileges"], provider.config["features"]) == (privileges, features)


@pytest.mark.row("H-18", "E13")
@EVERY_PROFILE
@pytest.mark.parametrize("lacking", ["HYPERCALL", "VP_INDEX", "HYPERCALL|VP_INDEX"])
def test_two_privileges_are_mandatory(profile: str, lacking: str) -> None:
    """The hypercall MSRs and the VP index cannot be left out, as the TLFS's minimal interface requires."""
    given_up = sum(Privilege[name] for name in lacking.split("|"))
    with pytest.raises(ConfigError, match=rf"privileges .* lack {lacking.replace('|', '.')}, which every guest needs"):
        a_provider(profile=profile, privileges=(CORE & ~given_up))


@pytest.mark.row("H-18", "E13")
@EVERY_PROFILE
@pytest.mark.parametrize("bit", [0, 8, 10, 14, *range(16, 36), 38, 39, 40, 44, 63])
def test_privileges_that_no_guest_can_have(profile: str, bit: int) -> None:
    """Partitions, ports, memory pools, statistics and unknown bits are refused, and what can be offered is named."""
    names = {each: each.name for each in Privilege}
    name = names.get(Privilege(1 << bit), f"{1 << bit:#x}")
    with pytest.raises(ConfigError, match=rf"privileges {name} cannot be served here; choose from .*TIME_REF_COUNT"):
        a_provider(profile=profile, privileges=MANDATORY | 1 << bit)


@pytest.mark.row("H-21", "H-22", "E13")
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"features": 1 << 2}, "features 0x4 cannot be served here; choose from FREQUENCY.CRASH"),
        ({"features": 1 << 10 | 1 << 63}, "features 0x8000000000000000 cannot"),
        (
            {"recommendations": 1 << 2 | 1 << 12},
            "recommendations 0x1004 cannot be served here; choose from RESET",
        ),
        ({"recommendations": 1 << 3, "privileges": MANDATORY}, "recommendations APIC_BY_MSR cannot"),
        ({"recommendations": 1 << 9, "privileges": MANDATORY}, "recommendations DEPRECATE_AUTO_EOI cannot"),
        ({"profile": "Linux"}, "profile 'Linux' is unknown; choose from 'linux', 'document', 'virtualbox'"),
        ({"cpu_vendor": "Intel"}, "CPU vendor 'Intel' has no hypercall"),
    ],
)
def test_what_cannot_be_offered(options: dict[str, Any], complaint: str) -> None:
    """Features, and recommendations that the guest lacks privileges for, are refused, and what can be is named."""
    with pytest.raises(ConfigError, match=complaint):
        a_provider(**options)


@pytest.mark.row("H-20")
@EVERY_PROFILE
def test_what_kvm_vcpus_are_offered(profile: str) -> None:
    """On /dev/kvm there is neither a TSC-invariant control, for CPUID cannot change there, nor the LAPIC's MSRs."""
    provider, _ = a_provider(profile=profile, vcpu_host=VcpuHost.KVM)
    assert leaf(provider, 3).eax & CORE == CORE
    assert not leaf(provider, 3).eax & 1 << 4
    with pytest.raises(ConfigError, match="privileges TSC_INVARIANT cannot be served here"):
        a_provider(profile=profile, vcpu_host=VcpuHost.KVM, privileges=MANDATORY | TSC_INVARIANT)


@pytest.mark.row("style")
def test_bits_are_those_of_the_specification() -> None:
    """The enumerations have the TLFS's numbers, which Linux's header repeats."""
    assert (Privilege.TIME_REF_COUNT, Privilege.REFERENCE_TSC, Privilege.TSC_INVARIANT) == (1 << 1, 1 << 9, 1 << 15)
    assert (Privilege.CREATE_PARTITIONS, Privilege.EXTENDED_HYPERCALLS) == (1 << 32, 1 << 52)
    assert (Feature.FREQUENCY, Feature.CRASH, Feature.DIRECT_TIMERS) == (1 << 8, 1 << 10, 1 << 19)
    assert (Recommendation.APIC_BY_MSR, Recommendation.DEPRECATE_AUTO_EOI) == (1 << 3, 1 << 9)
