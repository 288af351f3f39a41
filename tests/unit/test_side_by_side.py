"""Two providers side by side: each serves what is its own, and the guest finds both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock import ConfigError, CpuidLeaf, GuestClock, GuestMemory, MsrFault, SimulatedBackend, StateFileError
from pvclock.providers import configuration, registry
from pvclock.providers.hypercall_instructions import VMCALL, VMMCALL
from pvclock.providers.interface import CPUID_BASE, ClockServices, Hooks, HypercallRegisters, Provider, Status
from pvclock.providers.kvm import KvmProvider
from pvclock.providers.minimal import MinimalProvider
from pvclock.providers.options import option_types
from pvclock.providers.registry import HYPERV_BESIDE_KVM
from pvclock.providers.side_by_side import Pair, Side, SideBySide
from tests import oracle
from tests.unit.listening_provider import Listener
from tests.unit.stub_clock import NotedVmm, StubClock

HZ: Final = 2_500_000_000
GUEST_OS_ID, HYPERCALL, VP_INDEX = 0x40000000, 0x40000001, 0x40000002
TIME_REF_COUNT, REFERENCE_TSC = 0x40000020, 0x40000021
WALL_CLOCK, SYSTEM_TIME, STEAL_TIME = 0x4B564D00, 0x4B564D01, 0x4B564D03
OLD_WALL_CLOCK, OLD_SYSTEM_TIME = 0x11, 0x12
LINUX_ID: Final = 0x8100 << 48
KVM_SIGNATURE: Final = (0x4B4D564B, 0x564B4D56, 0x4D)
UNKNOWN_CALL: Final = HypercallRegisters(rax=2**32 - 1)
AT_100: Final = {"cpuid_base": 0x40000100, "timing_leaf": False, "apic_bus_hz": None}
MINIMAL_BESIDE_KVM: Final = Pair("Both", 77, Side(MinimalProvider), Side(KvmProvider, AT_100))


def both(**options: object) -> tuple[SideBySide, StubClock]:
    """Hyper-V's interface beside KVM's, and its clock."""
    clock = StubClock(vmm=NotedVmm())
    return HYPERV_BESIDE_KVM(clock, 2, **options), clock


# CPUID and options


@pytest.mark.row("X-01", "K-34", "K-38", "H-10", "H-11")
def test_both_signatures_are_there() -> None:
    """Hyper-V's leaves begin at 0x40000000 and KVM's at 0x40000100; each first one has its own last one's number."""
    leaves = both()[0].cpuid_leaves
    last = leaves[CPUID_BASE].eax
    assert leaves[CPUID_BASE + 1].eax == int.from_bytes(b"Hv#1", "little")
    assert leaves[0x40000100] == CpuidLeaf(0x40000101, *KVM_SIGNATURE)
    assert sorted(leaves) == [*range(CPUID_BASE, last + 1), 0x40000100, 0x40000101]


@pytest.mark.row("X-01", "H-04")
def test_an_option_goes_to_its_side() -> None:
    """What both mean alike goes to both, and each side's own to that side; the configuration is said back."""
    options = {"profile": "document", "enforce_cpuid": False, "hints": 1, "vendor_id": "TestTestTest"}
    provider, clock = both(**options, apic_bus_hz=200_000_000, kvm_features=1 << 3, hyperv_features=1 << 10)
    assert {name: provider.config[name] for name in options} == options
    assert provider.cpuid_leaves[0x40000101] == CpuidLeaf(eax=1 << 3, edx=1)
    assert provider.cpuid_leaves[CPUID_BASE + 3].edx == 1 << 10
    assert provider.sides["HyperV"].read_msr(0, 0x40000023) == 200_000_000
    again = HYPERV_BESIDE_KVM(clock, 2, **provider.config)
    assert (again.config, again.cpuid_leaves) == (provider.config, provider.cpuid_leaves)


@pytest.mark.row("X-01")
def test_the_options_of_a_pair_are_those_of_both() -> None:
    """Every option of either is one of the pair's, by one name each, but for those that the pair decides."""
    options = option_types(HYPERV_BESIDE_KVM)
    hyperv, kvm = (option_types(kind) for kind in (registry.PROVIDERS["HyperV"], KvmProvider))
    expected = (hyperv.keys() | kvm.keys()) - {"features", "cpuid_base", "timing_leaf"}
    assert options.keys() == expected | {"hyperv_features", "kvm_features"}
    for side in (hyperv, kvm):
        assert all(side[name] == options[name] for name in side.keys() & options.keys() - {"apic_bus_hz"})
    assert options["apic_bus_hz"] == hyperv["apic_bus_hz"]


@pytest.mark.row("H-04", "G-02")
@pytest.mark.parametrize("key", ["features", "cpuid_base", "timing_leaf", "kvm_hints", "hyperv_profile"])
def test_an_ambiguous_option_is_refused(key: str) -> None:
    """A key that could be either side's, or that the pair decides, is unknown; the error names those that there are."""
    with pytest.raises(ConfigError, match=rf"unknown key '{key}' .*'hyperv_features'.*'kvm_features'"):
        configuration.checked({"provider": "HyperV+KVM", key: 1})


@pytest.mark.row("X-02")
def test_what_a_side_refuses_is_refused() -> None:
    """A feature that one of them cannot serve is its own error."""
    for options in ({"kvm_features": 1 << 30}, {"hyperv_features": 1 << 31}):
        with pytest.raises(ConfigError, match="cannot be served"):
            both(**options)


# MSRs and hypercalls


@pytest.mark.row("X-01", "K-01")
@given(
    index=st.sampled_from([0x10, OLD_WALL_CLOCK, OLD_SYSTEM_TIME, 0x13, TIME_REF_COUNT, REFERENCE_TSC, SYSTEM_TIME])
    | st.integers(0x40000000, 0x40000200)
    | st.integers(WALL_CLOCK, 0x4B564DFF)
    | st.integers(0, 2**32 - 1)
)
def test_an_msr_is_its_sides(index: int) -> None:
    """Each MSR reads, or faults, as with that provider alone."""
    provider, clock = both()
    alone: tuple[Provider, ...] = (
        registry.PROVIDERS["HyperV"](clock, 2),  # type: ignore[call-arg]
        KvmProvider(clock, 2),
    )
    expected = {outcome for each in alone if (outcome := read(each, index)) is not None}
    assert read(provider, index) == (expected.pop() if expected else None)
    assert not expected


def read(provider: Provider, index: int) -> int | None:
    """What vCPU 1 reads, or None for a fault."""
    try:
        return provider.read_msr(1, index)
    except MsrFault:
        return None


@pytest.mark.row("X-01", "E4")
def test_a_guest_uses_both() -> None:
    """Pages of both kinds are placed, each where its own MSR says, and each MSR reads back."""
    provider, clock = both()
    clock.own_page = provider.own_page
    writes = {GUEST_OS_ID: LINUX_ID, REFERENCE_TSC: 0x5001, SYSTEM_TIME: 0x3001}
    for index, value in writes.items():
        provider.write_msr(0, index, value)
    assert (clock.reference_page, clock.page_at(0)) == (0x5000, 0x3000)
    assert {index: provider.read_msr(0, index) for index in writes} == writes
    assert provider.is_paravirt_tsc_enabled
    assert provider.update_paravirt_tsc() is Status.SUCCESS
    provider.reset()
    assert (clock.reference_page, clock.page_at(0)) == (None, None)
    assert {provider.read_msr(0, index) for index in writes} == {0}
    assert provider.update_paravirt_tsc() is Status.SUCCESS  # KVM's pages are the clock's


@pytest.mark.row("X-01", "G-15", "H-30")
def test_hypercalls_are_hyper_vs_once_the_guest_says_what_it_is() -> None:
    """Until then, and after the id is 0 again, they are KVM's, as Linux's kvm_hv_hypercall_enabled() has it."""
    provider, _ = both()
    hyperv, kvm = provider.sides["HyperV"], provider.sides["KVM"]
    for guest_os_id in (0, LINUX_ID, 0):
        provider.write_msr(0, GUEST_OS_ID, guest_os_id)
        side, other = (hyperv, kvm) if guest_os_id else (kvm, hyperv)
        assert provider.are_hypercalls_enabled
        assert provider.hypercall(0, UNKNOWN_CALL) == side.hypercall(0, UNKNOWN_CALL)
        assert provider.hypercall(0, UNKNOWN_CALL) != other.hypercall(0, UNKNOWN_CALL)


@pytest.mark.row("G-10", "V-33")
def test_instructions_of_both_are_trapped() -> None:
    """#UD exits for what either side's guests execute, each instruction once."""
    assert both()[0].hypercall_opcodes == (VMCALL,)
    assert both(cpu_vendor="AuthenticAMD")[0].hypercall_opcodes == (VMMCALL, VMCALL)


# Pages and time


@pytest.mark.row("X-01", "V-20", "K-12")
@pytest.mark.parametrize("profile", ["linux", "virtualbox"])
def test_pages_are_as_kvms_alone(profile: str) -> None:
    """What pvclock pages say and when they are published is the side's that has them."""
    provider, clock = both(profile=profile)
    kvm = KvmProvider(clock, 2, profile=profile)
    for name in ("allows_stable", "refreshes_pages", "tells_of_pauses"):
        assert getattr(provider, name) == getattr(kvm, name)
    assert provider.own_page(0) == kvm.own_page(0)


class First(Listener):
    """A provider with the hooks that it is given."""

    name = "First"
    given = Hooks()

    def __init__(self, clock: ClockServices, vcpus: int) -> None:
        super().__init__(clock, vcpus)
        self.hooks = self.given


class Second(First):
    """Another one."""

    name = "Second"


def no_delay(vcpu: int, ns: int) -> Callable[[], object]:
    """Account nothing."""
    return lambda: (vcpu, ns)


Hooked = Callable[[Hooks, Hooks], Hooks]
LISTENERS: Final = Pair("Listeners", 78, Side(First), Side(Second))


@pytest.fixture
def hooked(monkeypatch: pytest.MonkeyPatch) -> Hooked:
    """What a pair makes of its sides' hooks."""

    def made(first: Hooks, second: Hooks) -> Hooks:
        monkeypatch.setattr(First, "given", first)
        monkeypatch.setattr(Second, "given", second)
        return LISTENERS(StubClock(), 2).hooks

    return made


@pytest.mark.row("G-08")
def test_both_sides_are_told(hooked: Hooked) -> None:
    """Ticks and changes of time reach both, the first side first; one side's function is passed on as it is."""
    told: list[tuple[object, ...]] = []

    def telling(side: str) -> Hooks:
        return Hooks(
            tick=lambda: told.append((side, "tick")), time_changed=lambda paused: told.append((side, "time", paused))
        )

    hooks = hooked(telling("first"), telling("second"))
    assert hooks.tick is not None
    assert hooks.time_changed is not None
    hooks.tick()
    hooks.time_changed(True)
    assert told == [("first", "tick"), ("second", "tick"), ("first", "time", True), ("second", "time", True)]
    for one in (telling("first"), Hooks(run_delay=no_delay, next_due_ns=lambda: 5)):
        assert hooked(one, Hooks()) == hooked(Hooks(), one) == one
    assert hooked(Hooks(), Hooks()) == Hooks()


@pytest.mark.row("K-28")
def test_two_sides_cannot_account_run_delays(hooked: Hooked) -> None:
    """That is compiled code which no interrupt can split, and two of them cannot be one."""
    with pytest.raises(ConfigError, match="run delays"):
        hooked(Hooks(run_delay=no_delay), Hooks(run_delay=no_delay))


@pytest.mark.row("X-01", "H-42")
@pytest.mark.parametrize(
    ("first", "second", "earlier"),
    [(None, None, None), (5, None, 5), (None, 0, 0), (0, 5, 0), (7, -1, -1), (3, 3, 3)],
)
def test_the_next_timer_is_either_sides(
    hooked: Hooked, first: int | None, second: int | None, earlier: int | None
) -> None:
    """What is due next is what is due earlier, if anything is."""
    due = hooked(Hooks(next_due_ns=lambda: first), Hooks(next_due_ns=lambda: second)).next_due_ns
    assert due is not None
    assert due() == earlier


@pytest.mark.row("H-42")
@pytest.mark.parametrize("is_due", [(False, False), (True, False), (False, True), (True, True)])
def test_what_expires_is_delivered(hooked: Hooked, is_due: tuple[bool, bool]) -> None:
    """Both sides' timers expire at the same instant, and what either returns is called, later and once."""
    told: list[tuple[str, int]] = []

    def timed(side: str, due: bool) -> Hooks:
        def expire(now_ns: int) -> Callable[[], object] | None:
            told.append((f"{side} expires", now_ns))
            return (lambda: told.append((f"{side} delivers", now_ns))) if due else None

        return Hooks(next_due_ns=lambda: 0, expire=expire)

    expire = hooked(timed("first", is_due[0]), timed("second", is_due[1])).expire
    assert expire is not None
    deliver = expire(7)
    assert told == [("first expires", 7), ("second expires", 7)]
    assert (deliver is None) is (is_due == (False, False))
    if deliver:
        deliver()
    names = ("first", "second")
    assert told[2:] == [(f"{side} delivers", 7) for side, due in zip(names, is_due, strict=True) if due]


@pytest.mark.row("X-01", "H-42")
def test_one_sides_failure_delays_no_other_delivery(hooked: Hooked) -> None:
    """A VMM's service that raises for one side is told, and the other side's is called all the same."""
    told: list[str] = []

    def fail() -> None:
        raise OSError(5, "no interrupt")

    first = Hooks(next_due_ns=lambda: 0, expire=lambda _: fail)
    second = Hooks(next_due_ns=lambda: 0, expire=lambda _: lambda: told.append("second"))
    expire = hooked(first, second).expire
    assert expire is not None
    deliver = expire(0)
    assert deliver is not None
    with pytest.raises(OSError, match="no interrupt"):
        deliver()
    assert told == ["second"]


# Life


@pytest.mark.row("P-25", "X-01")
def test_both_sides_state_is_saved() -> None:
    """Names have their side's in front; another pair that loads them has both, and one of another shape refuses."""
    provider, _ = both()
    provider.write_msr(0, GUEST_OS_ID, LINUX_ID)
    provider.write_msr(1, SYSTEM_TIME, 0x3001)
    saved = provider.save()
    assert saved["HyperV-guest_os_id"] == LINUX_ID
    assert saved["KVM-system_time"] == (0, 0x3001)
    other, _ = both()
    other.load(saved)
    assert other.save() == saved
    assert (other.read_msr(0, GUEST_OS_ID), other.read_msr(1, SYSTEM_TIME)) == (LINUX_ID, 0x3001)


@pytest.mark.row("X-01", "P-25", "E13")
@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"guest_os_id": 1}, r"'HyperV\+KVM' saves nothing by these names: 'guest_os_id'"),
        ({"Xen-clock": 1}, "'Xen-clock'"),
        ({"": 1}, "''"),
        ({"KVM-colour": 1}, "colour"),
        ({"HyperV-colour": 1}, "colour"),
        ({"KVM-system_time": -1}, "system_time"),
        ({"HyperV-guest_os_id": "x"}, "guest_os_id"),
        ({"HyperV-guest_os_id": 2**64}, "guest_os_id"),
    ],
)
def test_a_state_that_nobody_saved_changes_nothing(changes: dict[str, object], complaint: str) -> None:
    """A name or value that either side refuses is a ConfigError, and both sides are as they were."""
    source, _ = both()
    source.write_msr(0, GUEST_OS_ID, LINUX_ID)
    source.write_msr(0, SYSTEM_TIME, 0x3001)
    provider, _ = both()
    provider.write_msr(0, GUEST_OS_ID, 5)
    provider.write_msr(0, SYSTEM_TIME, 0x7001)
    before = provider.save()
    with pytest.raises(ConfigError, match=complaint):
        provider.load({**source.save(), **changes})
    assert provider.save() == before


@pytest.mark.row("G-19", "P-25")
def test_the_version_goes_up_with_either_side() -> None:
    """Whichever side's saved state changes, the pair's has another version; both load what they ever wrote."""
    newer = type("Newer", (MinimalProvider,), {"version": 4})
    assert HYPERV_BESIDE_KVM.version == registry.PROVIDERS["HyperV"].version + KvmProvider.version - 1
    assert MINIMAL_BESIDE_KVM.version == KvmProvider.version
    assert Pair("Both", 77, Side(newer), Side(KvmProvider, AT_100)).version == KvmProvider.version + 3


@pytest.mark.row("G-06", "G-18", "G-28")
def test_virtualbox_has_no_unit_for_it() -> None:
    """Its unit is an id that VirtualBox does not know, and a version; a byte more is refused."""
    memory, backend = GuestMemory(bytearray(1 << 16)), SimulatedBackend(HZ)
    interface = GuestClock(memory, 2, "HyperV+KVM", backend=backend).interface
    assert interface.save_unit() == bytes.fromhex("0302000000000000")
    interface.load_unit(interface.save_unit())
    with pytest.raises(StateFileError, match="1 bytes after the header"):
        interface.load_unit(interface.save_unit() + b"\0")
    with pytest.raises(ConfigError, match=r"3 \(KVM\); this VM has provider 515 \(HyperV\+KVM\)"):
        interface.load_unit(bytes([3, 0, 0, 0, 0, 0, 0, 0]))


# A guest of another pair, on a clock of its own


@pytest.mark.row("X-01", "M-02", "K-34")
def test_any_two_providers_can_be_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """The timing leaf's interface beside KVM's: the guest has both, its clock ticks, and it is saved and restored."""
    monkeypatch.setitem(registry.PROVIDERS, "Both", MINIMAL_BESIDE_KVM)
    backend, memory = SimulatedBackend(HZ), GuestMemory(bytearray(1 << 16))
    clock = GuestClock(memory, 2, "Both", backend=backend, apic_bus_hz=200_000_000)
    assert clock.cpuid(0x40000010) == CpuidLeaf(HZ // 1000, 200_000)
    assert clock.cpuid(0x40000100) == CpuidLeaf(0x40000101, *KVM_SIGNATURE)
    clock.write_msr(1, SYSTEM_TIME, 0x3001)
    backend.advance(ns=10**9)
    clock.tick()
    assert abs(oracle.TimeInfo.parse(memory.read(0x3000, 32)).read(backend.tsc) - 10**9) <= 1
    with pytest.raises(MsrFault):
        clock.read_msr(0, REFERENCE_TSC)
    restored = GuestClock.restore(clock.save(), memory, backend=backend)
    assert restored.interface.config == clock.interface.config
    assert restored.cpuid_leaves == clock.cpuid_leaves
    assert restored.read_msr(1, SYSTEM_TIME) == 0x3001
