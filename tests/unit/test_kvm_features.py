"""Which features are offered, which vcpu_host serves them, and what they open."""

from __future__ import annotations

from functools import reduce
from operator import or_

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock import ConfigError, CpuidLeaf, KvmFeature, MsrFault
from pvclock.providers.interface import VcpuHost
from pvclock.providers.kvm import KvmHint
from tests.unit.stub_clock import NotedVmm, StubClock, a_provider

CLOCK = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 24
STEAL_TIME = 1 << 5
LIBRARY = CLOCK | STEAL_TIME | 1 << 4 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 12 | 1 << 14 | 1 << 17
BY_VMM = 1 << 7 | 1 << 11 | 1 << 13
EVERY_MSR = (0x11, 0x12, *range(0x4B564D00, 0x4B564D09))

# Documentation/virt/kvm/x86/cpuid.rst, by bit.
NAMES = (
    *("CLOCKSOURCE", "NOP_IO_DELAY", "MMU_OP", "CLOCKSOURCE2", "ASYNC_PF", "STEAL_TIME", "PV_EOI", "PV_UNHALT", None),
    *("PV_TLB_FLUSH", "ASYNC_PF_VMEXIT", "PV_SEND_IPI", "POLL_CONTROL", "PV_SCHED_YIELD", "ASYNC_PF_INT"),
    *("MSI_EXT_DEST_ID", "HC_MAP_GPA_RANGE", "MIGRATION_CONTROL"),
)


@pytest.mark.row("K-33", "K-34", "V-05")
def test_features_have_the_kernels_names_and_bits() -> None:
    """Every bit that Linux has a name for has it here, and no other."""
    named = {name: 1 << bit for bit, name in enumerate(NAMES) if name} | {"CLOCKSOURCE_STABLE": 1 << 24}
    assert {feature.name: feature.value for feature in KvmFeature} == named


@pytest.mark.row("K-33", "K-34", "X-01")
def test_what_is_offered_by_default() -> None:
    """The clock and steal time, and what the kernel serves beside; on KVM steal time waits to be asked for."""
    for vcpu_host, expected in ((VcpuHost.EMULATOR, CLOCK | STEAL_TIME), (VcpuHost.KVM, CLOCK)):
        for kernel in (0, 1 << 7 | 1 << 12):
            provider, _ = a_provider(clock=StubClock(vcpu_host=vcpu_host, kernel_features=kernel))
            assert provider.cpuid_leaves[0x40000001] == CpuidLeaf(eax=expected | kernel)


@pytest.mark.row("X-02", "K-34")
def test_what_goes_on_being_the_kernels() -> None:
    """Of all that a host's kernel can offer, it goes on serving unhalt and poll control beside a clock of ours."""
    everything = 0xFFFFFFFF
    for vcpu_host, own in ((VcpuHost.EMULATOR, CLOCK | STEAL_TIME), (VcpuHost.KVM, CLOCK)):
        provider, _ = a_provider(clock=StubClock(vcpu_host=vcpu_host, kernel_features=everything))
        assert provider.cpuid_leaves[0x40000001].eax == own | 1 << 7 | 1 << 12


@pytest.mark.row("X-02", "K-33", "K-34")
@pytest.mark.parametrize(
    ("vcpu_host", "has_vmm", "served"),
    [
        (VcpuHost.EMULATOR, False, LIBRARY),
        (VcpuHost.EMULATOR, True, LIBRARY | BY_VMM),
        (VcpuHost.KVM, False, CLOCK | STEAL_TIME),
        (VcpuHost.KVM, True, CLOCK | STEAL_TIME),
    ],
)
def test_each_engine_offers_what_it_can_serve(vcpu_host: VcpuHost, has_vmm: bool, served: int) -> None:
    """Each bit is offered where vcpu_host and VMM can serve it, and refused with the list of what can be else."""
    for bit in range(64):
        clock = StubClock(vcpu_host=vcpu_host, vmm=NotedVmm() if has_vmm else None)
        if served >> bit & 1:
            assert a_provider(clock=clock, features=1 << bit)[0].cpuid_leaves[0x40000001].eax == 1 << bit
        else:
            with pytest.raises(ConfigError, match=r"cannot be served here; choose from .*CLOCKSOURCE2"):
                a_provider(clock=clock, features=1 << bit)


@pytest.mark.row("K-34")
def test_hints_are_in_edx() -> None:
    """REALTIME is the only hint, and none is given unless asked for; another is an error."""
    assert a_provider(hints=int(KvmHint.REALTIME))[0].cpuid_leaves[0x40000001].edx == 1
    assert a_provider()[0].cpuid_leaves[0x40000001].edx == 0
    for hints in (2, 3, -1):
        with pytest.raises(ConfigError, match=r"hints .* choose from .*REALTIME"):
            a_provider(hints=hints)


@pytest.mark.row("K-09", "K-20", "K-33", "K-34", "K-35")
@given(features=st.lists(st.sampled_from([f for f in KvmFeature if f & LIBRARY])), enforced=st.booleans())
def test_cpuid_opens_msrs(features: list[KvmFeature], enforced: bool) -> None:
    """An MSR is there, read and written, if its feature is offered or nothing is enforced; else it faults."""
    opened_by = (0, 0, 3, 3, 4, 5, 6, 12, 14, 14, 17)
    offered = reduce(or_, map(int, features), 0)
    provider, _ = a_provider(features=offered, enforce_cpuid=enforced)
    for index, bit in zip(EVERY_MSR, opened_by, strict=True):
        if offered >> bit & 1 or not enforced:
            provider.write_msr(0, index, 0)
            assert provider.read_msr(0, index) == 0
        else:
            with pytest.raises(MsrFault):
                provider.write_msr(0, index, 0)
            with pytest.raises(MsrFault):
                provider.read_msr(0, index)


@pytest.mark.row("X-02", "K-35")
def test_on_kvm_nothing_is_served_that_user_space_cannot() -> None:
    """Without enforcement, too, page-fault, EOI and migration MSRs fault on KVM: nobody stands behind them."""
    provider, _ = a_provider(clock=StubClock(vcpu_host=VcpuHost.KVM), enforce_cpuid=False)
    served = set()
    for index in EVERY_MSR:
        try:
            provider.write_msr(0, index, 0)
        except MsrFault:
            continue
        served.add(index)
    assert served == {0x11, 0x12, 0x4B564D00, 0x4B564D01, 0x4B564D03}


@pytest.mark.row("K-35")
def test_poll_control_is_a_switch_of_each_vcpu() -> None:
    """Polling is on at first; bit 0 is all there is of it, and each vCPU has its own."""
    provider, _ = a_provider(features=1 << 12)
    assert [provider.read_msr(vcpu, 0x4B564D05) for vcpu in range(2)] == [1, 1]
    provider.write_msr(1, 0x4B564D05, 0)
    assert (provider.may_poll(0), provider.may_poll(1)) == (True, False)
    for value in (2, 3, 1 << 63):
        with pytest.raises(MsrFault):
            provider.write_msr(1, 0x4B564D05, value)
    assert provider.read_msr(1, 0x4B564D05) == 0


@pytest.mark.row("K-35")
def test_migration_control_is_one_switch_for_the_vm() -> None:
    """Migration is allowed at first; whichever vCPU says otherwise says it for all."""
    provider, _ = a_provider(features=1 << 17)
    assert (provider.read_msr(1, 0x4B564D08), provider.may_migrate) == (1, True)
    provider.write_msr(1, 0x4B564D08, 0)
    assert (provider.read_msr(0, 0x4B564D08), provider.may_migrate) == (0, False)
    with pytest.raises(MsrFault):
        provider.write_msr(0, 0x4B564D08, 2)


@pytest.mark.row("E14")
def test_an_unknown_profile_is_named() -> None:
    """The error says which there are."""
    with pytest.raises(ConfigError, match="'linux', 'document', 'virtualbox'"):
        a_provider(profile="xen")
