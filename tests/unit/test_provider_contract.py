"""The provider contract: every member of it for every provider, and what a clock tells a provider that asks for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Final, get_type_hints

import pytest

from pvclock import (
    ConfigError,
    CpuidLeaf,
    Gpa,
    GuestClock,
    GuestMemory,
    MsrFault,
    SimulatedBackend,
    StateFileError,
    TimeInfo,
)
from pvclock.msr_ranges import MsrRange
from pvclock.providers import registry
from pvclock.providers.guest_interface import Statistics
from pvclock.providers.hypercall_instructions import VMCALL, VMMCALL
from pvclock.providers.interface import (
    CPUID_BASE,
    DebugSetup,
    HypercallRegisters,
    HypercallResult,
    Provider,
    Status,
)
from pvclock.providers.options import option_types
from pvclock.providers.registry import PROVIDER_NUMBERS, PROVIDERS
from pvclock.providers.virtualbox import saved_unit
from tests.unit.clocks import NS_PER_S
from tests.unit.listening_provider import Listener
from tests.unit.test_debug_channel import Wire

HZ: Final = 2_500_000_000
SIZE: Final = 1 << 16
SYSTEM_TIME: Final = 0x4B564D01
SIGNATURE: Final = (0x4B4D564B, 0x564B4D56, 0x4D)  # "KVMKVMKVM\0\0\0"

EVERY_PROVIDER = pytest.mark.parametrize("name", PROVIDERS)


def a_clock(provider: str, vcpus: int = 2, **options: object) -> tuple[GuestClock, SimulatedBackend]:
    """A clock on a simulated host, and that host."""
    backend = SimulatedBackend(HZ, tsc=10**12)
    memory = GuestMemory(bytearray(SIZE))
    return GuestClock(memory, vcpus, provider, backend=backend, **options), backend  # type: ignore[arg-type]


NO_CALL: Final = HypercallRegisters(rax=2**64 - 1)
NOT_THERE: Final = (Status.NOT_ENABLED, Status.NOT_AVAILABLE)


def made_again(clock: GuestClock, provider: Provider, **options: object) -> Provider:
    """Another provider of the same kind, of the same clock."""
    return PROVIDERS[provider.name](clock._guest, 2, **options)  # type: ignore[call-arg]


def options_of(provider: Provider) -> set[str]:
    """The names of the options that it has."""
    return set(option_types(PROVIDERS[provider.name]))


def warnings(clock: GuestClock) -> list[str]:
    """What the VMM was warned of when the clock was made."""
    return [event.why for event in clock.events.read().events if event.why.startswith("warning: ")]


def is_asked(clock: GuestClock, provider: Provider, member: str) -> bool:
    """What the guest interface says is what its provider says."""
    return bool(getattr(clock.interface, member) == getattr(provider, member))


def loads_its_own_unit(clock: GuestClock, provider: Provider) -> bool:
    """load_unit() takes save_unit(), with what changes along with it, and refuses a byte more, with nothing changed."""
    clock.pause()  # else a load publishes
    part, done = provider.save_unit(), list[str]()
    provider.load_unit(part, lambda: done.append("begin"), lambda: done.append("undo"))
    with pytest.raises(StateFileError):
        provider.load_unit(part + b"\0", lambda: done.append("again"), lambda: None)
    return provider.save_unit() == part and done == ["begin"]


def loads_its_own_state(_: GuestClock, provider: Provider) -> bool:
    """load() takes save(), and refuses another name."""
    saved = provider.save()
    provider.load(saved)
    with pytest.raises(ConfigError):
        provider.load({**saved, "colour": 1})
    return provider.save() == saved


def faults(access: Callable[..., object], *arguments: int) -> bool:
    """An access of an MSR that is nobody's is #GP."""
    with pytest.raises(MsrFault):
        access(*arguments)
    return True


def takes_back(clock: GuestClock, provider: Provider) -> bool:
    """A reset takes every page back, and what is saved is as of a new provider."""
    provider.reset()
    return all(clock.page(vcpu) is None for vcpu in range(2)) and provider.save() == made_again(clock, provider).save()


def refreshes(clock: GuestClock) -> bool:
    """A refresh publishes each page that there is once."""
    before = [page.version for page in pages(clock)]
    clock.refresh()
    return [page.version for page in pages(clock)] == [version + 2 for version in before]


def pages(clock: GuestClock) -> list[TimeInfo]:
    """The pages that there are."""
    return [page for vcpu in range(2) if (page := clock.page(vcpu))]


def are_leaves(provider: Provider) -> bool:
    """The leaves begin at the base, and the first ones of each 0x100 have the number of the last one there in EAX."""
    leaves, base = provider.cpuid_leaves, provider.cpuid_base
    is_sound = all(0 <= register < 2**32 for leaf in leaves.values() for register in leaf)
    bases = {leaf & ~0xFF for leaf in leaves}
    last = {each: max(leaf for leaf in leaves if leaf & ~0xFF == each) for each in bases}
    return not leaves or (is_sound and min(leaves) == base and {each: leaves[each].eax for each in bases} == last)


CHECKS: Final[Mapping[str, Callable[[GuestClock, Provider], bool]]] = {
    "name": lambda clock, each: (
        type(made_again(clock, each)) is type(each) and clock.interface.name == PROVIDERS[each.name].name == each.name
    ),
    "number": lambda clock, each: PROVIDER_NUMBERS[each.name] == each.number == clock.interface.number,
    "version": lambda clock, each: clock.save().provider.version == each.version >= 1,
    "is_enabled": lambda clock, each: clock.interface.is_enabled is each.is_enabled is bool(each.cpuid_leaves),
    "clock": lambda clock, each: each.clock is clock._guest,
    "config": lambda clock, each: made_again(clock, each, **each.config).config == each.config,
    "warnings": lambda clock, each: [f"warning: {line}" for line in each.warnings] == warnings(clock),
    "node_keys": lambda _, each: options_of(each) >= set(each.node_keys.values()),
    "cpuid_base": lambda _, each: each.cpuid_base >= CPUID_BASE and each.cpuid_base % 0x100 == 0,
    "cpuid_leaves": lambda clock, each: are_leaves(each) and is_asked(clock, each, "cpuid_leaves"),
    "guest_lives_by_tsc": lambda clock, each: is_asked(clock, each, "guest_lives_by_tsc"),
    "shows_invariant_tsc": lambda clock, each: (
        clock.patch_cpuid(0x80000007, 0, CpuidLeaf(edx=1 << 8)).edx == each.shows_invariant_tsc << 8
    ),
    "msr_ranges": lambda clock, each: {MsrRange(*it) for it in each.msr_ranges} <= set(clock.msr_ranges),
    "read_msr": lambda clock, each: is_asked(clock, each, "read_msr") and faults(each.read_msr, 0, 0xC0000080),
    "write_msr": lambda clock, each: is_asked(clock, each, "write_msr") and faults(each.write_msr, 1, 0xC0000080, 0),
    "hypercall_opcodes": lambda _, each: set(each.hypercall_opcodes) <= {VMCALL, VMMCALL},
    "hypercall_port": lambda _, each: each.hypercall_port is None,  # the hypercall instructions exit
    "are_hypercalls_enabled": lambda clock, each: is_asked(clock, each, "are_hypercalls_enabled"),
    "hypercall": lambda _, each: (each.hypercall(0, NO_CALL).status in NOT_THERE) is not each.are_hypercalls_enabled,
    "allows_stable": lambda clock, each: [page.flags for page in pages(clock)] == [1, 1] * each.allows_stable,
    "own_page": lambda clock, each: (
        clock._guest.own_page(0) is each.own_page(0) is None
    ),  # V-11, V-38: another profile's
    "refreshes_pages": lambda clock, each: each.refreshes_pages is True and refreshes(clock),
    "tells_of_pauses": lambda clock, each: clock._guest.tells_of_pauses is each.tells_of_pauses,
    "hooks": lambda clock, each: (clock._guest.at_tick is None) is (each.hooks[:2] == (None, None)),
    "is_paravirt_tsc_enabled": lambda clock, each: is_asked(clock, each, "is_paravirt_tsc_enabled"),
    "update_paravirt_tsc": lambda clock, each: each.update_paravirt_tsc() is clock.interface.update_paravirt_tsc(),
    "reset": takes_back,
    "save": lambda clock, each: clock.save().provider.msrs == each.save(),
    "load": loads_its_own_state,
    "debug_setup": lambda clock, each: clock.interface.debug.setup()[1] == each.debug_setup,
    "save_unit": lambda clock, each: saved_unit.decode_header(clock.interface.save_unit())[2] == each.save_unit(),
    "load_unit": loads_its_own_unit,
}
"""What is checked of each member."""


def members() -> set[str]:
    """The names that the contract has, attributes, properties and methods."""
    named = {name for name, value in vars(Provider).items() if inspect.isfunction(value) or isinstance(value, property)}
    return {name for name in named | set(get_type_hints(Provider)) if not name.startswith("_")}


@EVERY_PROVIDER
@pytest.mark.row("G-08")
@pytest.mark.parametrize("member", CHECKS)
def test_every_member(name: str, member: str) -> None:
    """Each provider has each member of the contract, it is what the contract says, and the clock goes by it."""
    clock, _ = a_clock(name, offer_invariant_tsc=True)
    for vcpu in range(2):
        if "KVM" in name:
            clock.write_msr(vcpu, SYSTEM_TIME, 0x1001 + 0x1000 * vcpu)
    assert CHECKS[member](clock, clock.interface.provider)


@pytest.mark.row("style")
def test_no_member_is_left_out() -> None:
    """What the contract says is what is checked."""
    assert set(CHECKS) == members()


@pytest.mark.row("style")
@pytest.mark.parametrize("kind", [each for each in PROVIDERS.values() if isinstance(each, type)])
def test_options_are_keywords_with_types(kind: type[Provider]) -> None:
    """A provider is made of a clock and a number of vCPUs; all else is an option with a type and a default."""
    clock, vcpus, *options = list(inspect.signature(kind).parameters.values())
    assert (clock.name, vcpus.name) == ("clock", "vcpus")
    assert all(each.kind is each.KEYWORD_ONLY and each.default is not each.empty for each in options)
    assert [each.name for each in options] == list(option_types(kind))


# Where KVM's leaves stand


@pytest.mark.row("K-34", "K-38")
@pytest.mark.parametrize("base", [0x40000000, 0x40000100, 0x4000FF00])
def test_kvms_leaves_stand_at_their_base(base: int) -> None:
    """Signature and features are the two leaves from the base on, the first one's EAX being the second's number."""
    clock, _ = a_clock("KVM", cpuid_base=base, features=1 << 3, hints=1, timing_leaf=False)
    assert clock.cpuid_leaves == {
        base: CpuidLeaf(base + 1, *SIGNATURE),
        base + 1: CpuidLeaf(eax=1 << 3, edx=1),
    }
    assert clock.patch_cpuid(1, 0, CpuidLeaf()).ecx == 1 << 31
    if base != 0x40000000:
        assert clock.cpuid(0x40000000) is clock.cpuid(0x40000001) is None


@pytest.mark.row("K-34", "E13")
@pytest.mark.parametrize("base", [0, 0x3FFFFF00, 0x40000001, 0x40000080, 0x40010000, 2**32])
def test_no_guest_looks_for_kvm_there(base: int) -> None:
    """Linux and KVM itself look at every 0x100 leaves from 0x40000000 to 0x4000ff00: any other base is refused."""
    with pytest.raises(ConfigError, match=r"cpuid_base 0x.*; choose a multiple of 0x100 from 0x40000000 to 0x4000ff00"):
        a_clock("KVM", cpuid_base=base)


@pytest.mark.row("E22", "E13")
def test_the_timing_leaf_is_the_first_interfaces() -> None:
    """As in QEMU there is no leaf 0x40000010 where the leaves at 0x40000000 are another interface's."""
    with pytest.raises(ConfigError, match=r"timing_leaf=True with cpuid_base 0x40000100; leaf 0x40000010"):
        a_clock("KVM", cpuid_base=0x40000100, timing_leaf=True)


@pytest.mark.row("P-25", "K-34")
def test_the_base_is_saved_with_the_clock() -> None:
    """A restored clock has its leaves where they were; a state without the option has them at 0x40000000."""
    for options in ({}, {"cpuid_base": 0x40000000}, {"cpuid_base": 0x40000100}):
        clock, _ = a_clock("KVM", vcpus=2, **options)
        saved = clock.save()
        assert ("cpuid_base" in saved.provider.config) is (options.get("cpuid_base") == 0x40000100)
        restored = GuestClock.restore(saved, clock.memory, backend=SimulatedBackend(HZ))
        assert restored.cpuid_leaves == clock.cpuid_leaves
        assert min(restored.cpuid_leaves) == options.get("cpuid_base", 0x40000000)


# What a provider is told


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> tuple[GuestClock, SimulatedBackend, Listener]:
    """A clock whose provider is a Listener, which the registry alone knows."""
    monkeypatch.setitem(registry.PROVIDERS, "Listener", Listener)
    clock, backend = a_clock("Listener")
    provider = clock.interface.provider
    assert isinstance(provider, Listener)
    return clock, backend, provider


@pytest.mark.row("G-08", "G-10", "G-14")
def test_a_new_provider_needs_its_class_in_the_registry_alone(
    listening: tuple[GuestClock, SimulatedBackend, Listener],
) -> None:
    """CPUID, MSR routing, hypercalls, #UD, debug channel, paravirtual TSC and saved unit are all its own answers."""
    clock, _, provider = listening
    interface = clock.interface
    assert (interface.is_enabled, interface.are_hypercalls_enabled, interface.is_paravirt_tsc_enabled) == (True,) * 3
    assert clock.cpuid_leaves == provider.cpuid_leaves
    assert provider.msr_ranges[0] in clock.msr_ranges
    assert clock.hypercall(1, HypercallRegisters(rax=4)) == HypercallResult(Status.SUCCESS, 5)
    assert interface.should_trap_ud("GenuineIntel")
    assert not interface.should_trap_ud("AuthenticAMD")
    assert interface.debug.setup() == (Status.SUCCESS, DebugSetup(4096))
    assert interface.update_paravirt_tsc() is Status.SUCCESS
    assert provider.take() == [("offsets",)]
    assert interface.save_unit() == b"\x63\0\0\0\0\0\0\0\x07"
    interface.load_unit(b"\x63\0\0\0\1\0\0\0other")
    assert (provider.take(), interface.version) == ([("unit", b"other")], 1)
    clock.reset()
    assert provider.take() == [("reset",)]
    assert warnings(clock) == ["warning: it listens", "warning: to everything"]


@pytest.mark.row("G-16")
def test_statistics_go_on_for_the_vms_life(listening: tuple[GuestClock, SimulatedBackend, Listener]) -> None:
    """Each counter has its own events; neither a reset, a load, the VM's end nor another device changes it."""
    clock, _, _ = listening
    interface = clock.interface
    interface.debug.register(Wire(b"abcdefg"))
    clock.hypercall(0, HypercallRegisters(rax=1))
    for _ in range(2):
        interface.handle_ud(1, HypercallRegisters(rax=1), VMCALL, Gpa(0), "AuthenticAMD", fix=False)
    assert interface.debug.write(b"xyz") == (Status.SUCCESS, 3)
    assert [interface.debug.read(5)[1] for _ in range(3)] == [b"abcde", b"fg", b""]
    counted = Statistics(1, 2, debug_transmit=1, debug_transmit_bytes=3, debug_receive=2, debug_receive_bytes=7)
    steps: tuple[Callable[[], object], ...] = (
        clock.reset,
        lambda: interface.load_unit(interface.save_unit()),
        interface.term,
        lambda: interface.debug.register(Wire()),
    )
    assert interface.statistics == counted
    for step in steps:
        step()
        assert interface.statistics == counted


@pytest.mark.row("K-28")
def test_ticks_and_run_delays_are_told(listening: tuple[GuestClock, SimulatedBackend, Listener]) -> None:
    """Each tick is told, and before it what each vCPU waited since the last one; while paused, ticks alone."""
    clock, backend, provider = listening
    backend.run_delays_ns.update({0: 5, 1: 7})
    clock.tick()
    assert provider.take() == [("run delay", 0, 5), ("run delay", 1, 7), ("tick",)]
    backend.run_delays_ns[1] = 10
    clock.tick()
    clock.tick()
    assert provider.take() == [("run delay", 1, 3), ("tick",), ("tick",)]
    clock.pause()
    provider.take()
    backend.run_delays_ns[0] = 6
    clock.tick()
    assert provider.take() == [("tick",)]
    clock.resume()
    provider.take()
    clock.tick()
    assert provider.take() == [("run delay", 0, 1), ("tick",)]


@pytest.mark.row("E9")
def test_changes_of_guest_time_are_told(listening: tuple[GuestClock, SimulatedBackend, Listener]) -> None:
    """Pause, resume, run_for, skip, dilation, slew and restore are told, once or twice; reading and refreshing not."""
    clock, backend, provider = listening
    told: dict[str, set[tuple[object, ...]]] = {}
    operations: dict[str, Callable[[], object]] = {
        "refresh": clock.refresh,
        "dilate": lambda: clock.dilate(3, 2),
        "skip": lambda: clock.skip(5),
        "slew": lambda: clock.slew(1000),
        "pause": clock.pause,
        "skip paused": lambda: clock.skip(5),
        "run_for": lambda: clock.run_for(NS_PER_S),
        "resume": clock.resume,
        "read": clock.now,
    }
    for operation, call in operations.items():
        call()
        told[operation] = set(provider.take())
    runs, stands = ("time", False), ("time", True)
    assert told.pop("run_for") == {runs, stands}
    assert {operation for operation, found in told.items() if found == {runs}} == {"dilate", "skip", "slew", "resume"}
    assert {operation for operation, found in told.items() if found == {stands}} == {"pause", "skip paused"}
    assert not told["refresh"]
    assert not told["read"]
    restored = GuestClock.restore(clock.save(), clock.memory, backend=backend).interface.provider
    assert isinstance(restored, Listener)
    assert set(restored.take()) == {stands}


@pytest.mark.row("E9", "E11")
def test_a_change_is_recorded_before_it_is_told(listening: tuple[GuestClock, SimulatedBackend, Listener]) -> None:
    """When a provider hears of a change its event is in the log and time is the new one; a page alone is no change."""
    clock, _, _ = listening
    heard: list[tuple[int, bool]] = []
    clock._keeper.time_changed = lambda is_paused: heard.append((clock.events.last, clock.is_paused is is_paused))
    for change in (lambda: clock.dilate(3, 2), lambda: clock.skip(5), clock.pause, clock.resume):
        heard.clear()
        change()
        assert heard[-1] == (clock.events.last, True)
        assert {agrees for _, agrees in heard} == {True}
    heard.clear()
    clock._guest.place_time_page(0, Gpa(0x3000))
    assert heard == []


@pytest.mark.row("G-08")
@pytest.mark.parametrize(("provider", "options"), [("None", {}), ("Minimal", {}), ("KVM", {"features": 1 << 3})])
def test_a_tick_looks_at_no_run_delay_that_nobody_wants(provider: str, options: dict[str, int]) -> None:
    """Without steal time the host is never asked how long vCPUs waited."""
    clock, backend = a_clock(provider, vcpus=2, **options)

    def unexpected(vcpu: int) -> int:
        raise AssertionError(f"vCPU {vcpu}'s run delay was asked for")

    backend.run_delay_ns = unexpected  # type: ignore[method-assign]  # that is the test
    clock.tick()
    assert clock._guest.at_tick is None
