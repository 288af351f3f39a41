"""What a guest interface may be configured with, and what is chosen for which guest."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock import ConfigError, CpuidLeaf, GuestClock, GuestMemory, MsrFault, SimulatedBackend, WrongType
from pvclock.providers import configuration
from pvclock.providers.guest_interface import GuestInterface, effective_provider
from pvclock.providers.registry import PROVIDER_NUMBERS, PROVIDERS
from tests.unit.stub_clock import NotedVmm

HZ = 2_596_132_000


def interface_of(config: dict[str, object], *, log: list[str] | None = None, tsc_stable: bool = True) -> GuestInterface:
    """A guest interface of that configuration, on a clock of its own."""
    clock = GuestClock(GuestMemory(bytearray(1 << 14)), 2, "None", backend=SimulatedBackend(HZ))
    lines: list[str] = [] if log is None else log
    return GuestInterface(config, clock.interface.provider.clock, 2, tsc_usable=tsc_stable, log=lines.append)


@pytest.mark.row("G-01", "G-02", "G-03", "E13")
@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"provider": "kvm"}, "unknown provider 'kvm'; choose from 'None', 'Minimal', 'HyperV', 'KVM'"),
        ({"provider": "Xen"}, "unknown provider 'Xen'"),
        ({"provider": 3}, "unknown provider 3"),
        ({"provider": "KVM", "Provider": "KVM"}, "given twice: provider as 'KVM' and 'KVM'"),
        ({"provider": "KVM", "colour": "red"}, "unknown key 'colour' := 'red' for provider 'KVM'; keys are 'provider'"),
        ({"provider": "None", "features": 1}, "unknown key 'features' := 1"),
        ({"provider": "Minimal", "features": 1}, "keys are 'provider', 'version', 'profile', 'apic_bus_hz'"),
        ({"provider": "KVM", "version": -1}, "version -1; provider 'KVM' has 1 to"),
        ({"provider": "KVM", "version": 2**32}, "version 4294967296"),
        ({"provider": "KVM", "version": 2**32, "profile": "virtualbox"}, "version 4294967296"),
        ({"provider": "KVM", "version": True}, "version True"),
        ({"provider": "KVM", "version": "1"}, "version '1'"),
        ({"profile": "Linux"}, "profile 'Linux'; choose from 'linux', 'document', 'virtualbox'"),
        ({"provider": "KVM", "profile": 7}, "profile 7"),
        (
            {"provider": "KVM", "features": "all"},
            "features is 'all'; it can be a whole number from 0 to 2.64-1 or None",
        ),
        ({"provider": "KVM", "features": -1}, "features is -1"),
        ({"provider": "KVM", "features": True}, "features is True"),
        ({"provider": "KVM", "enforce_cpuid": 1}, "enforce_cpuid is 1; it can be True or False"),
        ({"provider": "Minimal", "apic_bus_hz": 1e9}, "apic_bus_hz is 1000000000.0"),
        ({"provider": "Minimal", "apic_bus_hz": 2**63}, "apic_bus_hz is 9223372036854775808 Hz; leaf 0x40000010 holds"),
    ],
)
def test_what_is_wrong_and_what_is_legal_is_said(config: dict[str, object], complaint: str) -> None:
    """An unknown key, a value of the wrong type and an illegal one are ConfigErrors that name key, value and choice."""
    with pytest.raises(ConfigError, match=complaint):
        interface_of(config)


@pytest.mark.row("G-02", "G-03")
def test_defaults() -> None:
    """Without a word a guest has provider None in version 0, the newest, behaving as Linux; None has no other."""
    interface = interface_of({})
    assert (interface.name, interface.version, interface.profile) == ("None", 0, "linux")
    assert interface_of({"version": 1}).version == 0
    assert interface_of({"provider": "KVM"}).version == 0
    assert interface_of({"provider": "KVM", "version": 1}).version == 1


@pytest.mark.row("G-02")
def test_the_names_of_providers() -> None:
    """There are None, Minimal, HyperV, KVM and HyperV+KVM, spelled so; any other is unknown, and named."""
    names = ["None", "Minimal", "HyperV", "KVM", "HyperV+KVM"]
    assert [interface_of({"provider": name}).name for name in names] == names == list(PROVIDERS)
    for name in ("none", "NONE", "minimal", "hyperv", "HYPERV", "Hyper-V", "kvm", "Kvm", " KVM", "KVM ", ""):
        with pytest.raises(ConfigError, match=f"unknown provider '{name}'"):
            interface_of({"provider": name})


@pytest.mark.row("G-01", "G-02", "G-27")
@pytest.mark.parametrize("name", PROVIDERS)
def test_virtualboxs_spelling(name: str) -> None:
    """`Provider`, `Version` and a child node `HyperV` are legal for every provider; the node says nothing to others."""
    node = {"VendorID": "VBoxVBoxVBox", "VSInterface": True, "HypercallDebugInterface": True}
    spelled = interface_of({"Provider": name, "Version": 1, "HyperV": node})
    own = {"vendor_id": "VBoxVBoxVBox", "vs_interface": True, "hypercall_debug": True} if name == "HyperV" else {}
    plain = interface_of({"provider": name, "version": 1, **own})
    assert (spelled.name, spelled.version, spelled.config) == (plain.name, plain.version, plain.config)
    assert own.items() <= spelled.config.items()


@pytest.mark.row("G-01", "G-27", "H-04")
@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"Provider": "kvm"}, "unknown provider 'kvm'"),
        ({"Version": -1}, "version -1"),
        ({"version": 0, "Version": 0}, "given twice: version as 0 and 0"),
        ({"PROVIDER": "KVM"}, "unknown key 'PROVIDER' := 'KVM'"),
        ({"HyperV": 1}, "HyperV is 1; it is a node with the keys 'VendorID'"),
        ({"Provider": "KVM", "HyperV": {"Vendor": "x"}}, "unknown key 'Vendor' := 'x' in node HyperV; keys are"),
        ({"Provider": "HyperV", "HyperV": {"VendorID": 12}}, "vendor_id is 12; it can be text or None"),
        ({"Provider": "HyperV", "HyperV": {"vendor_id": "x"}}, "unknown key 'vendor_id' := 'x' in node HyperV"),
        (
            {"provider": "HyperV", "vs_interface": True, "HyperV": {"VSInterface": False}},
            "given twice: vs_interface as True and False",
        ),
        ({"Minimal": {}}, "unknown key 'Minimal' := {}"),
    ],
)
def test_spellings_that_are_not_legal(config: dict[str, object], complaint: str) -> None:
    """A key given in both spellings, and any other key or node, are ConfigErrors that name it."""
    with pytest.raises(ConfigError, match=complaint):
        interface_of(config)


@pytest.mark.row("V-43", "V-04", "G-03")
def test_virtualbox_offers_features_in_its_newest_version_only() -> None:
    """With version 0 the basic bits are there; with any other none, but for bit 24, which the host decides."""
    offered = {}
    for version in (0, 1, 2, 7, 2**32 - 1):
        config = {"provider": "KVM", "profile": "virtualbox", "version": version}
        interface = interface_of(config)
        offered[version] = interface.cpuid_leaves[0x40000001].eax
        assert interface.version == version
        assert interface_of({"provider": "KVM", **interface.config}).config == interface.config
    assert offered == {0: 1 << 0 | 1 << 3 | 1 << 24, **dict.fromkeys((1, 2, 7, 2**32 - 1), 1 << 24)}
    linux = [interface_of({"provider": "KVM", "version": version}).cpuid_leaves for version in (0, 1, 2)]
    assert linux[0] == linux[1] == linux[2]
    asked = interface_of({"provider": "KVM", "profile": "virtualbox", "version": 1, "features": 1 << 3})
    assert asked.cpuid_leaves[0x40000001].eax == 1 << 3


@pytest.mark.row("V-43", "V-04")
@pytest.mark.parametrize(("version", "basic"), [(0, 1 << 0 | 1 << 3 | 1 << 7), (1, 0), (2**32 - 1, 0)])
def test_virtualboxs_guest_is_offered_stable_by_the_host_alone(version: int, basic: int) -> None:
    """What the guest's CPUID shows with a VMM that kicks: the basic bits by version, bit 24 by the host's TSC."""
    config = {"provider": "KVM", "profile": "virtualbox", "version": version}
    for tsc_stable in (True, False):
        backend = SimulatedBackend(HZ, tsc_stable=tsc_stable)
        clock = GuestClock(GuestMemory(bytearray(1 << 14)), 2, config, backend=backend, vmm=NotedVmm())
        assert clock.cpuid(0x40000001) == (basic | tsc_stable << 24, 0, 0, 0)


@pytest.mark.row("G-02", "E9")
@given(
    config=st.dictionaries(
        st.sampled_from(["provider", "version", "profile", "features", "enforce_cpuid", "apic_bus_hz", "colour", ""]),
        st.none() | st.booleans() | st.integers(-2, 2**33) | st.sampled_from([*PROVIDERS, "kvm", "virtualbox", b"KVM"]),
    )
)
def test_any_configuration_is_taken_or_refused(config: dict[str, object]) -> None:
    """A configuration makes an interface that says it back, or is a ConfigError; nothing else comes out."""
    try:
        interface = interface_of(config)
    except ConfigError:
        return
    assert interface.name == config.get("provider", "None")
    assert interface_of({"provider": interface.name, **interface.config}).config == interface.config


@pytest.mark.row("G-05", "G-06")
def test_a_provider_is_for_life() -> None:
    """The provider has VirtualBox's number where there is one, and neither clock nor interface lets it be replaced."""
    assert PROVIDER_NUMBERS == {"None": 0, "Minimal": 1, "HyperV": 2, "KVM": 3, "HyperV+KVM": 0x203}
    assert {name: kind.number for name, kind in PROVIDERS.items()}.items() <= PROVIDER_NUMBERS.items()
    clock = GuestClock(GuestMemory(), backend=SimulatedBackend(HZ))
    with pytest.raises(AttributeError):
        clock.interface = interface_of({})  # type: ignore[misc]
    with pytest.raises(AttributeError):
        clock.interface.provider = interface_of({}).provider  # type: ignore[misc]


@pytest.mark.row("G-05", "G-07")
@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_guest_keeps_what_it_was_shown(provider: str) -> None:
    """Reset, pause, restore on another host, resume and a loaded unit leave name, CPUID and MSRs as they were."""
    options: dict[str, object] = {"features": 1 << 3, "hints": 1} if provider == "KVM" else {}
    memory = GuestMemory(bytearray(1 << 14))
    clock = GuestClock(memory, 1, {"provider": provider, **options}, backend=SimulatedBackend(HZ))

    def shown(clock: GuestClock) -> tuple[object, ...]:
        found: list[int | None] = []
        for index in (0x12, 0x4B564D01, 0x4B564D03):
            with suppress(MsrFault):
                found.append(clock.read_msr(0, index))
        leaves = [clock.cpuid(leaf, 0) for leaf in range(0x40000000, 0x40000012)]
        return clock.interface.name, clock.patch_cpuid(1, 0, CpuidLeaf()), leaves, found

    before = shown(clock)
    assert (before[0], before[3]) == (provider, {"KVM": [0], "HyperV+KVM": [0, 0, 0]}.get(provider, []))
    restored = GuestClock.restore(clock.save(), memory, backend=SimulatedBackend(HZ, tsc=5, tsc_stable=False))
    operations = (restored.resume, restored.pause, restored.reset, restored.resume, restored.interface.term)
    load = partial(restored.interface.load_unit, restored.interface.save_unit())
    for operate in (*operations, load):
        assert shown(restored) == before
        operate()
    assert shown(restored) == before


@pytest.mark.row("G-07", "V-04")
@pytest.mark.parametrize("is_stable", [True, False])
def test_what_the_hosts_tsc_decides_is_decided_once(is_stable: bool) -> None:
    """Bit 24 of VirtualBox's KVM is there by the TSC as it is found first, and no vCPU sees another CPUID later."""
    backend = SimulatedBackend(HZ, tsc_stable=is_stable)
    clock = GuestClock(GuestMemory(), 2, {"provider": "KVM", "profile": "virtualbox"}, backend=backend)
    expected = 1 << 0 | 1 << 3 | is_stable << 24
    for trusted in (True, False, True):
        leaf = clock.cpuid(0x40000001, 0)
        assert leaf == CpuidLeaf(eax=expected)
        backend.tsc_stable = trusted
        clock.apply_host_findings([], tsc_trusted=not trusted)


@pytest.mark.row("G-04")
@pytest.mark.parametrize(
    ("guest_os", "default", "legacy"),
    [
        *((system, "KVM", "None") for system in ("linux", "Linux26_64", "Ubuntu_64", "Debian12_64", "Oracle_64")),
        *((system, "None", "None") for system in ("Linux24", "linux22", "FreeBSD_64", "OS2", "Other", "")),
        *((system, "HyperV", "None") for system in ("windows", "Windows11_64")),
        *((system, "Minimal", "Minimal") for system in ("macos", "MacOS1013_64")),
    ],
)
def test_the_guests_system_decides_where_the_user_does_not(guest_os: str, default: str, legacy: str) -> None:
    """Of "default" and "legacy" the guest's system makes a provider; a name is that provider for every guest."""
    assert effective_provider("default", guest_os) == default
    assert effective_provider("legacy", guest_os) == legacy
    for choice, provider in (("none", "None"), ("minimal", "Minimal"), ("hyperv", "HyperV"), ("kvm", "KVM")):
        assert effective_provider(choice, guest_os) == effective_provider(provider, guest_os) == provider


@pytest.mark.row("G-04", "E13")
def test_no_other_choice() -> None:
    """A choice that is none names what there is."""
    with pytest.raises(ConfigError, match="provider choice 'Default'; choose from 'default', 'legacy', 'none'"):
        effective_provider("Default", "linux")


@pytest.mark.row("G-03", "G-26")
def test_what_was_chosen_is_told_once() -> None:
    """One line at the start has provider, id, the version that 0 means, profile, vcpu_host; reset and load add none."""
    version = PROVIDERS["KVM"].version
    for config, line in (
        ({"profile": "document"}, f"version {version}, profile document"),
        ({"version": version - 1}, f"version {version - 1}, profile linux"),
        ({"profile": "virtualbox", "version": 2**32 - 1}, "version 4294967295, profile virtualbox"),
    ):
        told: list[str] = []
        interface_of({"provider": "KVM", **config}, log=told)
        assert told == [f"provider KVM, id 3, {line}, on emulator"]
    clock = GuestClock(GuestMemory(), 1, "Minimal", backend=SimulatedBackend(HZ), vcpu_host="kvm")
    clock.reset()
    clock.interface.load_unit(clock.interface.save_unit())
    clock.tick()
    first, *others = ((event.kind, event.why) for event in clock.events.read().events)
    assert first == ("start", "provider Minimal, id 1, version 1, profile linux, on kvm")
    assert [kind for kind, _ in others] == ["reset"]


@pytest.mark.row("G-26", "G-30", "G-07")
@pytest.mark.parametrize("provider", PROVIDERS)
def test_an_unusable_tsc_is_told_for_every_provider(provider: str) -> None:
    """VirtualBox's warning cannot be reached for providers that return early (T12); here each one has it."""
    told: list[str] = []
    interface_of({"provider": provider}, log=told, tsc_stable=False)
    for vcpus in (1, 2):
        for stable in (True, False):
            clock = GuestClock(GuestMemory(), vcpus, provider, backend=SimulatedBackend(HZ, tsc_stable=stable))
            why = [event.why for event in clock.events.read().events]
            assert why == (told[:1] if stable else told)
    chosen, warning = told
    assert chosen.startswith(f"provider {provider}, ")
    assert warning.startswith("warning: the host's TSC is not usable")
    assert provider in warning


@pytest.mark.row("X-02")
@pytest.mark.parametrize(("vcpu_host", "feature"), [("kvm", 4), ("kvm", 9), ("kvm", 30), ("emulator", 30)])
def test_what_is_offered_can_be_served(vcpu_host: str, feature: int) -> None:
    """A feature that the vcpu_host cannot serve is refused: async page faults on KVM, unknown ones anywhere."""
    with pytest.raises(ConfigError, match="cannot be served"):
        GuestClock(GuestMemory(), backend=SimulatedBackend(HZ), vcpu_host=vcpu_host, features=1 << feature)


@pytest.mark.row("E13")
def test_an_unknown_vcpu_host_is_refused() -> None:
    """There are two engines, and the error names them."""
    with pytest.raises(ConfigError, match="vcpu_host 'xen'; choose from 'emulator', 'kvm'"):
        GuestClock(GuestMemory(), backend=SimulatedBackend(HZ), vcpu_host="xen")


@pytest.mark.row("G-01", "E13")
def test_a_clock_takes_a_name_or_a_configuration() -> None:
    """A provider's options come with the configuration, or as keywords; both at once is an error."""
    backend = SimulatedBackend(HZ)
    by_name = GuestClock(GuestMemory(), 1, "KVM", backend=backend, features=9, profile="document")
    config = {"provider": "KVM", "features": 9, "profile": "document"}
    assert by_name.interface.config == GuestClock(GuestMemory(), 1, config, backend=backend).interface.config
    with pytest.raises(ConfigError, match="given twice: features as 9 and 8"):
        GuestClock(GuestMemory(), 1, config, backend=backend, features=8)
    with pytest.raises(ConfigError, match="unknown key 'backends'"):
        GuestClock(GuestMemory(), 1, backend=backend, backends=1)


@pytest.mark.row("G-01")
def test_a_configuration_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock checks what it is made of and hands that on; an interface takes a checked configuration as it is."""
    seen: list[object] = []
    respelled = configuration._respelled

    def noting(config: Mapping[str, object]) -> dict[str, object]:
        seen.append(config)
        return respelled(config)

    monkeypatch.setattr(configuration, "_respelled", noting)
    GuestClock(GuestMemory(), 1, {"Provider": "KVM", "Version": 1}, backend=SimulatedBackend(HZ), features=9)
    assert seen == [{"Provider": "KVM", "Version": 1, "features": 9}]
    chosen = configuration.checked({"provider": "KVM", "features": 9})
    assert configuration.checked(chosen) is chosen
    clock = GuestClock(GuestMemory(bytearray(1 << 14)), 2, "None", backend=SimulatedBackend(HZ))
    assert GuestInterface(chosen, clock._guest, 2).config == interface_of({"provider": "KVM", "features": 9}).config


@pytest.mark.row("X-02", "E13")
def test_what_a_backends_kernel_serves_is_by_provider() -> None:
    """A backend that says nothing has no kernel; one whose features are for nobody in particular is refused."""
    backend = SimulatedBackend(HZ)
    backend.kernel_features = {"KVM": 1 << 7, "HyperV": 1}
    assert GuestClock(GuestMemory(), backend=backend).cpuid_leaves[0x40000001].eax & 1 << 7
    del backend.kernel_features
    assert not GuestClock(GuestMemory(), backend=backend).cpuid_leaves[0x40000001].eax & 1 << 7
    backend.kernel_features = 1 << 7  # type: ignore[assignment]  # that is the test
    with pytest.raises(WrongType, match=r"^backend\.kernel_features is 128, an int; .*providers' names"):
        GuestClock(GuestMemory(), backend=backend)
