"""The Hyper-V provider as a whole: dispatch by privilege, options, what is due, what is saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock import ConfigError, CpuidLeaf, GuestClock, GuestMemory, SimulatedBackend
from pvclock.providers.hyperv import HyperVProvider, Privilege
from pvclock.providers.hyperv.msr import Msr
from pvclock.providers.interface import VcpuHost
from tests.unit.hyperv_provider import EVERY_PROFILE, OS_ID, KickingVmm, a_provider, full_vmm, is_refused
from tests.unit.stub_clock import NotedVmm

U64 = st.integers(0, 2**64 - 1)
HZ: Final = 2_500_000_000

PRIVILEGE_OF: Final = {
    0x40000020: 1 << 1,
    **dict.fromkeys((0x40000000, 0x40000001), 1 << 5),
    0x40000002: 1 << 6,
    0x40000003: 1 << 7,
    0x40000021: 1 << 9,
    **dict.fromkeys((0x40000022, 0x40000023), 1 << 11),
    **dict.fromkeys(range(0x40000106, 0x40000109), 1 << 13),
    0x40000118: 1 << 15,
}
"""The privilege that each MSR needs, as in the TLFS; of those that the core of the provider serves."""

ALL: Final = sum(set(PRIVILEGE_OF.values()))
READ_ONLY: Final = (0x40000002, 0x40000020, 0x40000022, 0x40000023)


# Dispatch


@pytest.mark.row("H-13", "H-20", "H-30", "H-31", "H-32", "H-33", "H-35", "H-36", "H-37")
@EVERY_PROFILE
@pytest.mark.parametrize("bit", [1, 7, 9, 11, 13, 15])
def test_an_msr_without_its_privilege_is_refused(profile: str, bit: int) -> None:
    """Each privilege that is left out makes its own MSRs #GP, and no others; unless CPUID is not enforced."""
    provider, _ = a_provider(profile=profile, privileges=ALL & ~(1 << bit))
    for index, privilege in PRIVILEGE_OF.items():
        assert is_refused(provider, index) is (privilege == 1 << bit)
        assert is_refused(provider, index, 0) is (privilege == 1 << bit or index in READ_ONLY)
    lenient, _ = a_provider(profile=profile, privileges=ALL & ~(1 << bit), enforce_cpuid=False)
    assert lenient.cpuid_leaves == provider.cpuid_leaves
    assert not any(is_refused(lenient, index) for index in PRIVILEGE_OF)


@pytest.mark.row("H-43", "H-34")
@EVERY_PROFILE
@given(index=st.integers(0x3FFFFF00, 0x40000300), value=U64)
def test_all_other_msrs_are_refused(profile: str, index: int, value: int) -> None:
    """What the TLFS does not have, or a clock cannot serve, is #GP both ways."""
    provider, _ = a_provider(profile=profile, privileges=ALL)
    if index not in PRIVILEGE_OF and not 0x40000100 <= index <= 0x40000105:
        assert is_refused(provider, index)
        assert is_refused(provider, index, value)


@pytest.mark.row("H-30")
def test_the_kernel_serves_none_of_its_msrs() -> None:
    """Every MSR of the interface exits to the clock on /dev/kvm, whose kernel may have some of them."""
    (msrs,) = HyperVProvider.msr_ranges
    assert (msrs.base, msrs.reads, msrs.writes, msrs.kept) == (0x40000000, True, True, ())
    assert msrs.length >= 0x119


# Options


@pytest.mark.row("G-08", "H-01", "H-20")
@EVERY_PROFILE
@pytest.mark.parametrize("vcpu_host", VcpuHost)
@pytest.mark.parametrize("vmm", [NotedVmm(), KickingVmm()])
def test_options_make_an_equal_provider(profile: str, vcpu_host: VcpuHost, vmm: NotedVmm | KickingVmm) -> None:
    """What config says makes a provider that shows, serves and saves the same, defaults included."""
    provider, clock = a_provider(
        profile=profile, vcpu_host=vcpu_host, vmm=vmm, cpu_vendor="AuthenticAMD", apic_bus_hz=5, vs_interface=True
    )
    other, _ = a_provider(clock=clock, **dict[str, Any](provider.config))
    assert (other.config, other.cpuid_leaves) == (provider.config, provider.cpuid_leaves)
    assert other.hypercall_opcodes == (b"\x0f\x01\xd9",)
    assert other.save() == provider.save()
    assert {type(value) for value in provider.config.values()} == {int, bool, str}  # plain data, no enumerations


@pytest.mark.row("G-27", "H-01", "H-02", "H-03")
def test_virtualboxs_node_is_this_providers() -> None:
    """VirtualBox's node `HyperV` sets vendor, debug interface and debug hypercalls, as this provider's own options."""
    node = {"VendorID": "Microsoft Hv", "VSInterface": True, "HypercallDebugInterface": True}
    config = {"Provider": "HyperV", "profile": "virtualbox", "HyperV": node}
    clock = GuestClock(GuestMemory(bytearray(1 << 14)), 1, config, backend=SimulatedBackend(HZ))
    found = clock.interface.config
    assert (found["vendor_id"], found["vs_interface"], found["hypercall_debug"]) == ("Microsoft Hv", True, True)
    assert clock.cpuid(0x40000000) == CpuidLeaf(0x40000082, 0x7263694D, 0x666F736F, 0x76482074)
    assert clock.cpuid(0x40000082) == CpuidLeaf(2)


@pytest.mark.row("E22")
def test_cpuid_shows_an_invariant_tsc_with_the_guests_consent() -> None:
    """With the control, CPUID 0x80000007 hides what the VMM offers until the guest writes 1, and from a reset on."""
    options = {"privileges": ALL & ~(1 << 7 | 1 << 13), "offer_invariant_tsc": True}
    clock = GuestClock(GuestMemory(bytearray(1 << 14)), 1, "HyperV", backend=SimulatedBackend(HZ), **options)  # type: ignore[arg-type]  # a test's own choice
    leaf = CpuidLeaf(edx=1 << 8 | 1)
    assert clock.patch_cpuid(0x80000007, 0, leaf).edx == 1
    clock.write_msr(0, 0x40000118, 1)
    assert clock.patch_cpuid(0x80000007, 0, leaf).edx == 1 << 8 | 1
    clock.reset()
    assert clock.patch_cpuid(0x80000007, 0, leaf).edx == 1


# What is due


class Alarm:
    """A part of which something gets due."""

    def __init__(self, due_ns: int | None, deliver: Callable[[], object] | None) -> None:
        self.due_ns, self.deliver = due_ns, deliver
        self.msrs: Mapping[int, Msr] = {0x400000B0: Msr(Privilege.TIME_REF_COUNT)}
        self.asked_at: list[int] = []

    def reset(self) -> None:
        """Not asked."""

    def save(self) -> Mapping[str, int]:
        """Nothing."""
        return {}

    def checked(self, saved: Mapping[str, object]) -> Callable[[], None]:
        """Nothing."""
        return lambda: None

    def next_due_ns(self) -> int | None:
        """As it was made."""
        return self.due_ns

    def expire(self, now_ns: int) -> Callable[[], object] | None:
        """As it was made."""
        self.asked_at.append(now_ns)
        return self.deliver


@pytest.mark.row("G-08")
@given(due=st.lists(st.none() | st.integers(0, 2**64), min_size=1, max_size=4))
def test_what_is_due_of_all_parts(due: list[int | None]) -> None:
    """The provider's next time is its parts' earliest; all parts expire at one instant, and deliver in their order."""
    delivered: list[int] = []

    def delivery(number: int) -> Callable[[], object]:
        return lambda: delivered.append(number)

    alarms = [Alarm(each, None if each is None else delivery(number)) for number, each in enumerate(due)]
    provider, _ = a_provider()
    provider._timed = tuple(alarms)  # those that a provider has depend on its VMM
    hooks = provider.hooks
    assert hooks.next_due_ns is not None
    assert hooks.expire is not None
    times = [each for each in due if each is not None]
    assert hooks.next_due_ns() == (min(times) if times else None)
    deliver = hooks.expire(77)
    assert [alarm.asked_at for alarm in alarms] == [[77]] * len(alarms)
    assert delivered == []
    assert (deliver is None) is (not times)
    if deliver is not None:
        deliver()
    assert delivered == [number for number, each in enumerate(due) if each is not None]


@pytest.mark.row("H-42", "E13")
def test_a_delivery_that_fails_loses_no_other() -> None:
    """The other parts' interrupts are raised all the same, and the error comes out."""
    delivered: list[int] = []

    def fail() -> None:
        raise OSError("this vCPU is gone")

    provider, _ = a_provider()
    provider._timed = (Alarm(0, lambda: delivered.append(0)), Alarm(0, fail), Alarm(0, lambda: delivered.append(2)))
    assert provider.hooks.expire is not None
    deliver = provider.hooks.expire(1)
    assert deliver is not None
    with pytest.raises(OSError, match="is gone"):
        deliver()
    assert delivered == [0, 2]


# What is saved


@pytest.mark.row("H-72", "G-08")
@EVERY_PROFILE
@given(writes=st.lists(st.tuples(st.sampled_from([*PRIVILEGE_OF, *range(0x40000100, 0x40000106)]), U64), max_size=8))
def test_a_restored_guest_reads_what_it_wrote(profile: str, writes: list[tuple[int, int]]) -> None:
    """Saved and loaded, also as JSON has it, every MSR of the core reads as before, crash parameters included."""
    provider, _ = a_provider(profile=profile, privileges=ALL)
    provider.write_msr(0, 0x40000000, OS_ID)
    for index, value in writes:
        is_refused(provider, index, value)
    saved = {name: list(value) if isinstance(value, tuple) else value for name, value in provider.save().items()}
    other, _ = a_provider(profile=profile, privileges=ALL)
    other.load(saved)
    for index in (*PRIVILEGE_OF, *range(0x40000100, 0x40000106)):
        assert other.read_msr(1, index) == provider.read_msr(1, index)
    assert other.are_hypercalls_enabled is provider.are_hypercalls_enabled


@pytest.mark.row("H-72", "E13")
@EVERY_PROFILE
def test_a_state_that_no_guest_has_is_refused(profile: str) -> None:
    """A missing or unknown name, and a value that no guest can have written, are ConfigErrors, with nothing changed."""
    provider, _ = a_provider(profile=profile, privileges=ALL)
    provider.write_msr(0, 0x40000000, OS_ID)
    saved = provider.save()
    bad: list[Mapping[str, object]] = [{**saved, "colour": 1}, {}]
    bad += [{key: value for key, value in saved.items() if key != name} for name in saved]
    wrong = (None, -1, 1 << 64, True, "1", 1.0, [1], [0] * 4 + [-1])
    bad += [{**saved, name: value} for name in saved for value in wrong]
    bad += [{**saved, "reference_sequence": 1 << 32}, {**saved, "tsc_invariant_control": 2}]
    bad += [{**saved, "guest_os_id": 0, "hypercall": 0x5001}, {**saved, "crash_parameters": [0] * 6}]
    for state in bad:
        with pytest.raises(ConfigError, match="provider 'HyperV'"):
            provider.load(state)
        assert provider.save() == saved


NOT_IN_UNITS: Final = {
    0x40000073: 0x5001,  # VP assist page
    0x40000080: 1,  # SCONTROL
    0x40000082: 0x6001,  # SIEFP
    0x400000B0: 1 << 3 | 2 << 16,  # a timer's configuration, enabled by its count
    0x400000B1: 12345,
    **{0x40000100 + number: 0xD0 + number for number in range(5)},  # crash parameters
}


@pytest.mark.row("H-72")
@pytest.mark.parametrize("profile", ["linux", "document"])
@given(written=st.sets(st.sampled_from(sorted(NOT_IN_UNITS))))
def test_what_virtualboxs_unit_does_not_hold(profile: str, written: set[int]) -> None:
    """Assist page, SCONTROL, SIEFP, timers and crash parameters leave the unit as it is, and are lost with a load."""
    provider, _ = a_provider(profile=profile, vmm=full_vmm())
    before = provider.save_unit()
    fresh = {index: provider.read_msr(1, index) for index in NOT_IN_UNITS}
    for index in sorted(written):
        provider.write_msr(1, index, NOT_IN_UNITS[index])
    assert {index for index in NOT_IN_UNITS if provider.read_msr(1, index) != fresh[index]} >= written
    assert provider.save_unit() == before
    provider.load_unit(before, lambda: None, lambda: None)
    assert {index: provider.read_msr(1, index) for index in NOT_IN_UNITS} == fresh
