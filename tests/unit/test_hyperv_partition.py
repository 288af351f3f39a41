"""Hyper-V's OS id, hypercall page, VP index and reset: who may write what, and what a bad address does."""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock.providers.hyperv import HyperVProvider
from pvclock.providers.interface import HypercallRegisters, Status, VcpuHost
from pvclock.timekeeping.events import EventKind
from tests.unit.hyperv_provider import EVERY_PROFILE, OS_ID, KickingVmm, a_provider, is_refused, written_pages
from tests.unit.stub_clock import GUARD, SIZE, NotedVmm

GUEST_OS_ID, HYPERCALL, VP_INDEX, RESET = 0x40000000, 0x40000001, 0x40000002, 0x40000003
VP_RUNTIME, TIME_REF_COUNT, REFERENCE_TSC = 0x40000010, 0x40000020, 0x40000021
SINT0, STIMER0_COUNT = 0x40000090, 0x400000B1
WITH_TIMERS: Final = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 9 | 1 << 11 | 1 << 13
PLAIN: Final = 1 << 5 | 1 << 6
U64 = st.integers(0, 2**64 - 1)
NO_MEMORY: Final = SIZE


# OS id


@pytest.mark.row("H-30")
@EVERY_PROFILE
@given(values=st.lists(U64, min_size=1, max_size=4))
def test_the_os_id_reads_back_on_every_vcpu(profile: str, values: list[int]) -> None:
    """The last write of any vCPU is what all read; hypercalls are enabled by no value but 0, at most."""
    provider, _ = a_provider(profile=profile)
    for vcpu, value in enumerate(values):
        provider.write_msr(vcpu % 2, GUEST_OS_ID, value)
        assert {provider.read_msr(each, GUEST_OS_ID) for each in range(2)} == {value}
        assert not (provider.are_hypercalls_enabled and not value)


@pytest.mark.row("H-30")
@EVERY_PROFILE
def test_os_id_0_disables_hypercalls(profile: str) -> None:
    """When the guest takes its OS id back the hypercall page is disabled, whose address stays, and calls are #UD."""
    provider, _ = a_provider(profile=profile)
    provider.write_msr(0, GUEST_OS_ID, OS_ID)
    provider.write_msr(0, HYPERCALL, 0x3001)
    enabled = [provider.are_hypercalls_enabled]
    assert provider.hypercall(0, HypercallRegisters(rax=1)).status is not Status.NOT_ENABLED
    provider.write_msr(1, GUEST_OS_ID, 0)
    assert provider.read_msr(0, HYPERCALL) == 0x3000
    assert [*enabled, provider.are_hypercalls_enabled] == [True, False]
    assert provider.hypercall(0, HypercallRegisters(rax=1)).status is Status.NOT_ENABLED


@pytest.mark.row("H-30")
@pytest.mark.parametrize(("profile", "told"), [("linux", 0), ("document", 0), ("virtualbox", 20)])
def test_virtualbox_tells_which_system_the_guest_is(profile: str, told: int) -> None:
    """Under "virtualbox" the fields of an OS id are an event, of the first 20 of them, and 0 is none."""
    provider, clock = a_provider(profile=profile)
    provider.write_msr(0, GUEST_OS_ID, 0)
    provider.write_msr(0, GUEST_OS_ID, 0x8123_45AB_CD12_3456)
    for _ in range(30):
        provider.write_msr(0, GUEST_OS_ID, 0x0001_0406_0100_1DB0)
    assert len(clock.told) == told
    if told:
        kinds, lines = zip(*clock.told, strict=True)
        assert set(kinds) == {EventKind.GUEST_OS}
        assert lines[0] == (
            "guest OS id 0x812345abcd123456: open source, vendor 0x123, system 0x45, version 171.205, "
            "service pack 18, build 13398"
        )
        assert lines[1] == (
            "guest OS id 0x1040601001db0: proprietary, vendor 0x1, system 0x4, version 6.1, service pack 0, build 7600"
        )


# Hypercall page


@pytest.mark.row("H-31")
@pytest.mark.parametrize(
    ("cpu_vendor", "code"),
    [
        ("GenuineIntel", "0f01c1c3"),
        ("AuthenticAMD", "0f01d9c3"),
        ("HygonGenuine", "0f01d9c3"),
        ("CentaurHauls", "0f01c1c3"),
    ],
)
def test_the_page_has_the_cpus_own_instruction(cpu_vendor: str, code: str) -> None:
    """Enabling writes VMCALL or VMMCALL, by the CPU's vendor, and RET at the beginning of the page, and no more."""
    provider, clock = a_provider(cpu_vendor=cpu_vendor)
    provider.write_msr(0, GUEST_OS_ID, OS_ID)
    provider.write_msr(0, HYPERCALL, 0x5001)
    assert clock.memory.read(0x5000, 5).hex() == code + f"{GUARD:02x}"
    assert set(clock.memory.read(0x5004, 0xFFC)) == {GUARD}
    assert written_pages(clock.memory) == [0x5000]
    assert provider.hypercall_opcodes == (bytes.fromhex(code)[:3],)
    assert provider.hypercall_port is None


@pytest.mark.row("H-31")
def test_the_page_on_kvm_writes_to_a_port() -> None:
    """On /dev/kvm, where VMCALL does not exit, the page has an OUT to the provider's port, and RET."""
    provider, clock = a_provider(vcpu_host=VcpuHost.KVM)
    provider.write_msr(0, GUEST_OS_ID, OS_ID)
    provider.write_msr(0, HYPERCALL, 0x5001)
    assert provider.hypercall_port == 0xE4
    assert clock.memory.read(0x5000, 4) == bytes((0xE6, 0xE4, 0xC3, GUARD))


@pytest.mark.row("H-31", "H-72")
@pytest.mark.parametrize(("here", "there"), [(VcpuHost.KVM, VcpuHost.EMULATOR), (VcpuHost.EMULATOR, VcpuHost.KVM)])
def test_a_restored_page_calls_its_new_host(here: VcpuHost, there: VcpuHost) -> None:
    """From /dev/kvm to an emulator and back, an enabled page has the instruction that exits there."""
    provider, _ = a_provider(vcpu_host=here, privileges=PLAIN)
    provider.write_msr(0, GUEST_OS_ID, OS_ID)
    provider.write_msr(0, HYPERCALL, 0x5001)
    saved = provider.save()
    restored, clock = a_provider(vcpu_host=there, privileges=PLAIN)
    restored.load(saved)
    code = bytes.fromhex("e6e4c3") if there is VcpuHost.KVM else bytes.fromhex("0f01c1c3")
    assert clock.memory.read(0x5000, 5) == (code + bytes([GUARD, GUARD]))[:5]
    assert written_pages(clock.memory) == [0x5000]
    for hypercall in (0x5000, 0xFFFF_0000_0001):
        restored, clock = a_provider(vcpu_host=there, privileges=PLAIN)
        restored.load({**saved, "hypercall": hypercall})
        assert restored.read_msr(0, HYPERCALL) == hypercall
        assert written_pages(clock.memory) == []


@pytest.mark.row("H-31")
@EVERY_PROFILE
@given(value=U64)
def test_without_an_os_id_there_is_no_page(profile: str, value: int) -> None:
    """Until the guest says which system it is, enabling is accepted and does nothing; VirtualBox keeps the address."""
    provider, clock = a_provider(profile=profile)
    provider.write_msr(0, HYPERCALL, value)
    assert provider.read_msr(1, HYPERCALL) == (value & ~1 if profile == "virtualbox" else 0)
    assert not provider.are_hypercalls_enabled
    assert written_pages(clock.memory) == []
    provider.write_msr(0, GUEST_OS_ID, OS_ID)
    assert not provider.read_msr(1, HYPERCALL) & 1


@pytest.mark.row("H-31")
@EVERY_PROFILE
@given(value=U64 | st.integers(0, SIZE))
def test_any_value_of_the_hypercall_msr(profile: str, value: int) -> None:
    """A value reads back whole; if it enables, the page is there or it was #GP, with nothing outside that page."""
    provider, clock = a_provider(profile=profile)
    provider.write_msr(0, GUEST_OS_ID, OS_ID)
    page = value >> 12 << 12
    if value & 1 and page >= SIZE:
        assert is_refused(provider, HYPERCALL, value)
        assert provider.read_msr(0, HYPERCALL) == (value & ~1 if profile == "virtualbox" else 0)
        assert written_pages(clock.memory) == []
    else:
        provider.write_msr(1, HYPERCALL, value)
        assert provider.read_msr(0, HYPERCALL) == value
        assert written_pages(clock.memory) == ([page] if value & 1 else [])
        assert not value & 1 or clock.memory.read(page, 5) == b"\x0f\x01\xc1\xc3\xa5"


@pytest.mark.row("H-31")
@pytest.mark.parametrize(("profile", "kept"), [("linux", 0x5001), ("document", 0x5001), ("virtualbox", NO_MEMORY)])
def test_a_page_that_is_not_in_memory(profile: str, kept: int) -> None:
    """#GP; on Linux the page that was there stays enabled, VirtualBox keeps the new address, disabled."""
    provider, _ = a_provider(profile=profile)
    provider.write_msr(0, GUEST_OS_ID, OS_ID)
    provider.write_msr(0, HYPERCALL, 0x5001)
    assert is_refused(provider, HYPERCALL, NO_MEMORY | 1)
    assert provider.read_msr(0, HYPERCALL) == kept


@pytest.mark.row("H-31", "H-30")
@pytest.mark.parametrize(
    ("profile", "enabled"),
    [
        ("linux", [False, True, True, True]),
        ("document", [False, False, True, False]),
        ("virtualbox", [False] + [True] * 3),
    ],
)
def test_when_hypercalls_are_enabled(profile: str, enabled: list[bool]) -> None:
    """For KVM and VirtualBox an OS id is enough; by the TLFS the page must be enabled, too; disabling clears."""
    provider, _ = a_provider(profile=profile)
    found = [provider.are_hypercalls_enabled]
    for index, value in ((GUEST_OS_ID, OS_ID), (HYPERCALL, 0x5001), (HYPERCALL, 0x5000)):
        provider.write_msr(0, index, value)
        found.append(provider.are_hypercalls_enabled)
    assert found == enabled
    assert provider.read_msr(0, HYPERCALL) == 0x5000


# VP index, run time, reset


@pytest.mark.row("H-32")
@EVERY_PROFILE
@given(vcpus=st.integers(1, 300), value=U64)
def test_the_vp_index_is_the_vcpus_number(profile: str, vcpus: int, value: int) -> None:
    """Each vCPU reads its own number, and cannot write it."""
    provider, _ = a_provider(vcpus=vcpus, profile=profile)
    assert [provider.read_msr(vcpu, VP_INDEX) for vcpu in range(vcpus)] == list(range(vcpus))
    assert is_refused(provider, VP_INDEX, value, vcpu=vcpus - 1)
    assert provider.read_msr(vcpus - 1, VP_INDEX) == vcpus - 1


@pytest.mark.row("H-34")
@EVERY_PROFILE
@pytest.mark.parametrize("enforce_cpuid", [True, False])
def test_there_is_no_vp_run_time(profile: str, enforce_cpuid: bool) -> None:
    """The VP runtime MSR is #GP both ways, its privilege not being offered."""
    provider, _ = a_provider(profile=profile, enforce_cpuid=enforce_cpuid)
    assert not provider.cpuid_leaves[0x40000003].eax & 1
    assert is_refused(provider, VP_RUNTIME)
    assert is_refused(provider, VP_RUNTIME, 0)


@pytest.mark.row("H-33")
@EVERY_PROFILE
@given(value=U64 | st.integers(0, 4))
def test_a_reset_is_asked_for(profile: str, value: int) -> None:
    """The reset MSR reads 0; Linux' KVM resets for the value 1, VirtualBox for any value with bit 0."""
    vmm = NotedVmm()
    provider, _ = a_provider(profile=profile, vmm=vmm)
    provider.write_msr(1, RESET, value)
    asked = value % 2 == 1 if profile == "virtualbox" else value == 1
    assert vmm.notes == [("request_reset",)] * asked
    assert provider.read_msr(0, RESET) == 0


@pytest.mark.row("H-33", "H-20")
@EVERY_PROFILE
def test_no_reset_without_a_vmm_that_resets(profile: str) -> None:
    """Where the VMM has no reset the privilege is not offered, and the MSR is #GP."""
    provider, _ = a_provider(profile=profile, vmm=KickingVmm())
    assert is_refused(provider, RESET)
    assert is_refused(provider, RESET, 1)


def served(provider: HyperVProvider) -> dict[int, int]:
    """What vCPU 0 reads of each MSR of the interface that is not #GP, but for the time."""
    indices = (index for each in provider.msr_ranges for index in range(each.base, each.base + each.length))
    return {
        index: provider.read_msr(0, index)
        for index in indices
        if index != 0x40000020 and not is_refused(provider, index)
    }


@pytest.mark.row("H-74")
@EVERY_PROFILE
@given(
    writes=st.lists(st.tuples(st.sampled_from(range(0x40000000, 0x40000200)), U64 | st.integers(0, SIZE)), max_size=8)
)
def test_a_reset_forgets_every_write(profile: str, writes: list[tuple[int, int]]) -> None:
    """Whatever the guest wrote, after a reset each MSR reads as a new VM's, is saved so, and pages are taken back."""
    fresh, _ = a_provider(profile=profile, privileges=WITH_TIMERS)
    provider, clock = a_provider(profile=profile, privileges=WITH_TIMERS)
    provider.write_msr(0, GUEST_OS_ID, OS_ID)
    provider.write_msr(0, HYPERCALL, 0x5001)
    provider.write_msr(0, REFERENCE_TSC, 0x6001)
    provider.write_msr(0, SINT0, 0x30)
    provider.write_msr(0, STIMER0_COUNT, 5)
    for index, value in writes:
        is_refused(provider, index, value)
    provider.reset()
    assert served(provider) == served(fresh)
    assert provider.save() == fresh.save()
    assert clock.reference_page is None
    assert not provider.are_hypercalls_enabled
    assert not provider.is_paravirt_tsc_enabled
    assert provider.hooks.next_due_ns is not None
    assert provider.hooks.next_due_ns() is None
