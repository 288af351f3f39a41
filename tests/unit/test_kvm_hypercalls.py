"""KVM's hypercalls: registers, privilege, what is served and what is not, in Linux's way and in VirtualBox's."""

from __future__ import annotations

from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock import GuestTsc, KvmFeature
from pvclock.providers.interface import HypercallRegisters, HypercallResult, Pairing, Status
from pvclock.providers.kvm import PROFILES, KvmProvider
from pvclock.providers.kvm.hypercalls import read_call
from tests import oracle
from tests.unit.stub_clock import NOW, SIZE, NotedVmm, StubClock, a_provider, written

POLL_IRQ, KICK, PAIRING, SEND_IPI, SCHED_YIELD, MAP_GPA_RANGE = 1, 5, 9, 10, 11, 12
BY_VMM = int(KvmFeature.PV_UNHALT | KvmFeature.PV_SEND_IPI | KvmFeature.PV_SCHED_YIELD)
U64 = st.integers(0, 2**64 - 1)


def with_vmm(
    features: int | None = BY_VMM, *, profile: str = "linux", enforce_cpuid: bool = True
) -> tuple[KvmProvider, NotedVmm]:
    """A provider of two vCPUs whose VMM takes notes."""
    vmm = NotedVmm()
    provider, _ = a_provider(clock=StubClock(vmm=vmm), features=features, profile=profile, enforce_cpuid=enforce_cpuid)
    return provider, vmm


def error(number: int, bits: int = 64) -> int:
    """-number in RAX."""
    return (1 << bits) - number


def call(provider: KvmProvider, number: int, *arguments: int, long_mode: bool = True) -> HypercallResult:
    """Linux's way: arguments in RBX, RCX, RDX and RSI."""
    rbx, rcx, rdx, rsi = (*arguments, 0, 0, 0, 0)[:4]
    return provider.hypercall(0, HypercallRegisters(number, rbx, rcx, rdx, rsi, long_mode=long_mode))


@pytest.mark.row("K-36", "V-31")
@pytest.mark.parametrize("profile", PROFILES)
def test_polling_for_an_interrupt_does_nothing(profile: str) -> None:
    """VAPIC_POLL_IRQ is 0, in every profile and with whatever features."""
    provider, vmm = with_vmm(features=0, profile=profile)
    assert call(provider, POLL_IRQ) == HypercallResult(Status.SUCCESS, 0)
    assert vmm.notes == []


@pytest.mark.row("K-36", "V-32")
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("number", [0, 2, 3, 4, 6, 7, 8, MAP_GPA_RANGE, 13, 1000, 2**32 + POLL_IRQ, 2**64 - 1])
def test_unknown_numbers(number: int, profile: str) -> None:
    """Dead, foreign and unknown ones are -1000, told apart for the VMM by their status."""
    provider, vmm = with_vmm(profile=profile, features=1 << 7)
    assert call(provider, number) == HypercallResult(Status.NOT_SUPPORTED, error(1000))
    assert vmm.notes == []


@pytest.mark.row("V-29", "K-36")
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("cpl", [1, 2, 3])
@pytest.mark.parametrize("number", [POLL_IRQ, KICK, PAIRING, 999])
def test_privilege_comes_first(number: int, cpl: int, profile: str) -> None:
    """Outside of ring 0 every number, unknown ones too, is -EPERM, and nothing is done."""
    vmm = NotedVmm()
    provider, clock = a_provider(clock=StubClock(vmm=vmm), features=1 << 7, profile=profile)
    registers = HypercallRegisters(number, rbx=0x2000, cpl=cpl)
    assert provider.hypercall(0, registers) == HypercallResult(Status.ACCESS_DENIED, error(1))
    assert provider.hypercall(0, registers._replace(long_mode=False)) == HypercallResult(
        Status.ACCESS_DENIED, error(1, 32)
    )
    assert (vmm.notes, written(clock.memory)) == ([], [])


@pytest.mark.row("V-28", "K-36")
@given(values=st.tuples(U64, U64, U64, U64, U64, U64), long_mode=st.booleans())
def test_arguments_are_in_each_profiles_registers(values: tuple[int, ...], long_mode: bool) -> None:
    """Linux has RBX, RCX, RDX, RSI, VirtualBox RDI in place of RDX (T21); outside 64-bit code the lower halves."""
    rax, rbx, rcx, rdx, rsi, rdi = values
    registers = HypercallRegisters(rax, rbx, rcx, rdx, rsi, rdi, long_mode=long_mode)
    bits = 64 if long_mode else 32
    for profile, expected in (("linux", (rax, rbx, rcx, rdx, rsi)), ("virtualbox", (rax, rbx, rcx, rdi, rsi))):
        assert read_call(3, registers, PROFILES[profile]) == (3, bits, *(value % 2**bits for value in expected))


@pytest.mark.row("K-36", "V-30")
def test_kick_wakes_a_vcpu() -> None:
    """The second argument is an APIC id of 32 bits; Linux does not mind one that nobody has."""
    provider, vmm = with_vmm()
    for apic_id in (1, 200, 2**32 - 1):
        assert call(provider, KICK, 0xDEAD, apic_id) == HypercallResult(Status.SUCCESS, 0)
    assert vmm.notes == [("kick", 1), ("kick", 200), ("kick", 2**32 - 1)]


@pytest.mark.row("V-30")
def test_virtualbox_fails_on_a_kick_beyond_its_vcpus() -> None:
    """There the VMM has to answer for an id that no vCPU has; the guest's RAX is not touched."""
    provider, vmm = with_vmm(features=None, profile="virtualbox")
    assert call(provider, KICK, 0xDEAD, 1) == HypercallResult(Status.SUCCESS, 0)
    for apic_id in (2, 2**32, 2**32 + 1, 2**64 - 1):
        assert call(provider, KICK, 0, apic_id) == HypercallResult(Status.OPERATION_FAILED, None)
    assert vmm.notes == [("kick", 1)]


@pytest.mark.row("V-30", "V-28")
@pytest.mark.parametrize("long_mode", [False, True])
def test_virtualboxs_kick_is_by_registers_alone(long_mode: bool) -> None:
    """RAX has the number and RCX the APIC id; outside 64-bit code upper halves do not count, within they do."""
    high = 0 if long_mode else 5 << 32
    provider, vmm = with_vmm(features=None, profile="virtualbox")
    for apic_id in range(2):
        registers = HypercallRegisters(high + KICK, 7, high + apic_id, 8, 9, 10, long_mode=long_mode)
        assert provider.hypercall(0, registers) == HypercallResult(Status.SUCCESS, 0)
    assert vmm.notes == [("kick", 0), ("kick", 1)]
    for wrong in (HypercallRegisters((5 << 32) + KICK, rcx=1), HypercallRegisters(KICK, rcx=(5 << 32) + 1)):
        assert provider.hypercall(0, wrong).status is not Status.SUCCESS
    assert len(vmm.notes) == 2


@pytest.mark.row("K-36")
@pytest.mark.parametrize(("number", "bit"), [(KICK, 7), (SEND_IPI, 11), (SCHED_YIELD, 13)])
def test_features_open_hypercalls(number: int, bit: int) -> None:
    """Not offered it is -1000, unless nothing is enforced; without a VMM to do it, it is -1000 in any case."""
    for features, enforced, status in (
        (1 << bit, True, Status.SUCCESS),
        (BY_VMM & ~(1 << bit), True, Status.NOT_SUPPORTED),
        (0, False, Status.SUCCESS),
    ):
        provider, vmm = with_vmm(features, enforce_cpuid=enforced)
        assert call(provider, number).status is status
        assert bool(vmm.notes) is (status is Status.SUCCESS)
    alone, _ = a_provider(enforce_cpuid=False)
    assert call(alone, number) == HypercallResult(Status.NOT_SUPPORTED, error(1000))


@pytest.mark.row("K-36")
@given(low=U64, high=U64, lowest=st.integers(0, 2**32 - 1) | U64, long_mode=st.booleans())
def test_ipis_go_to_the_bits_of_two_bitmaps(low: int, high: int, lowest: int, long_mode: bool) -> None:
    """64 APIC ids from the lowest on in each, 32 outside 64-bit code; the result is how many took it."""
    provider, vmm = with_vmm()
    result = call(provider, SEND_IPI, low, high, lowest, 0x4041, long_mode=long_mode)
    bits = 64 if long_mode else 32
    targets = oracle.ipi_targets(low % 2**bits, high % 2**bits, lowest, bits)
    assert result == HypercallResult(Status.SUCCESS, len(targets))
    assert vmm.notes == [("send_ipi", targets, 0x4041)]


@pytest.mark.row("K-36")
@pytest.mark.parametrize("icr", [0x800, 0x40000, 0x80000, 0xC0800])
def test_an_ipi_with_a_destination_of_its_own_is_invalid(icr: int) -> None:
    """The bitmaps say who is meant: destination mode and shorthand are -EINVAL."""
    provider, vmm = with_vmm()
    assert call(provider, SEND_IPI, 1, 0, 0, icr | 0x41) == HypercallResult(Status.SUCCESS, error(22))
    assert vmm.notes == []


@pytest.mark.row("K-36")
def test_yield_names_who_shall_run() -> None:
    """The first argument is an APIC id of 32 bits."""
    provider, vmm = with_vmm()
    assert call(provider, SCHED_YIELD, 2**32 + 3) == HypercallResult(Status.SUCCESS, 0)
    assert vmm.notes == [("yield_to", 3)]


@pytest.mark.row("K-37")
@pytest.mark.parametrize("gpa", [0x2000, 0x2FE1, SIZE - 64])
def test_clock_pairing_writes_one_instant(gpa: int) -> None:
    """UTC seconds and ns and the TSC of the same instant, then zeros: 64 bytes at any address, CPUID asked or not."""
    provider, clock = a_provider(features=0)
    assert call(provider, PAIRING, gpa, 0) == HypercallResult(Status.SUCCESS, 0)
    assert clock.memory.read(gpa, 64) == pack("<qqQ40x", NOW.real_ns // 10**9, NOW.real_ns % 10**9, NOW.guest_tsc)
    assert written(clock.memory) == [gpa]


@pytest.mark.row("K-37")
def test_clock_pairing_before_1970() -> None:
    """Seconds may be negative, ns never are."""
    provider, clock = a_provider(clock=StubClock(paired=Pairing(-1, GuestTsc(5))))
    assert call(provider, PAIRING, 0x2000) == HypercallResult(Status.SUCCESS, 0)
    assert clock.memory.read(0x2000, 24) == pack("<qqQ", -1, 999_999_999, 5)


@pytest.mark.row("K-37")
def test_clock_pairing_is_refused() -> None:
    """Another clock, or a host whose TSC tells no time, is -EOPNOTSUPP; no memory is -EFAULT; nothing is written."""
    provider, clock = a_provider()
    for clock_type in (1, 2**63, 2**64 - 1):
        assert call(provider, PAIRING, 0x2000, clock_type) == HypercallResult(Status.SUCCESS, error(95))
    for gpa in (SIZE - 63, SIZE, 2**64 - 64, 2**64 - 1):
        assert call(provider, PAIRING, gpa) == HypercallResult(Status.SUCCESS, error(14))
    clock.paired = None
    assert call(provider, PAIRING, 0x2000) == HypercallResult(Status.SUCCESS, error(95))
    assert call(provider, PAIRING, 0x2000, long_mode=False) == HypercallResult(Status.SUCCESS, error(95, 32))
    assert written(clock.memory) == []


@pytest.mark.row("V-32")
@pytest.mark.parametrize("number", [PAIRING, SEND_IPI, SCHED_YIELD])
def test_virtualbox_has_two_hypercalls(number: int) -> None:
    """What Linux serves beside polling and kicking is unknown there."""
    linux, _ = with_vmm()
    assert call(linux, number).status is Status.SUCCESS
    virtualbox, vmm = with_vmm(features=None, profile="virtualbox")
    assert call(virtualbox, number) == HypercallResult(Status.NOT_SUPPORTED, error(1000))
    assert vmm.notes == []
