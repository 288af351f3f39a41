"""VirtualBox's saved unit: its bytes, what comes back of it, and each mismatch."""

from __future__ import annotations

import re
import struct

import pytest

from pvclock import ConfigError, GuestClock, GuestMemory, SimulatedBackend, StateFileError
from pvclock.providers.interface import HypercallRegisters
from pvclock.providers.kvm import virtualbox_unit
from pvclock.providers.registry import PROVIDERS
from tests import oracle

HZ = 2_596_132_000
SIZE = 1 << 16
SYSTEM_TIME, WALL_CLOCK = 0x4B564D01, 0x4B564D00
FEATURES = 1 << 0 | 1 << 3 | 1 << 24


def a_clock(provider: str = "KVM", memory: GuestMemory | None = None, **options: object) -> GuestClock:
    """A clock of two vCPUs on a simulated host; the KVM one with features that are fixed."""
    given = {"features": FEATURES, **options} if provider == "KVM" else options
    here = GuestMemory(bytearray(SIZE)) if memory is None else memory
    return GuestClock(here, 2, provider, backend=SimulatedBackend(HZ, 10**6), **given)  # type: ignore[arg-type]


def a_running_guest(**options: object) -> GuestClock:
    """A clock whose guest has registered one page and the wall clock."""
    clock = a_clock(**options)  # type: ignore[arg-type]
    clock.write_msr(0, SYSTEM_TIME, 0x2001)
    clock.write_msr(1, SYSTEM_TIME, 0x3000)  # bit 0 clear: off
    clock.write_msr(0, WALL_CLOCK, 0x4000)
    return clock


@pytest.mark.row("G-18", "G-06", "G-21", "V-36")
def test_the_units_bytes() -> None:
    """Id 3, the provider's version, then KVM's part field by field, little-endian, and nothing else of a vCPU."""
    clock = a_running_guest()
    page = oracle.TimeInfo.parse(clock.memory.read(0x2000, 32))
    assert clock.interface.save_unit() == b"".join(
        (
            struct.pack("<II", 3, 0),  # as configured: 0 is the newest
            struct.pack("<I", 1),
            struct.pack("<QQQQIB", 0x2001, page.tsc_timestamp, page.system_time, 0x2000, page.version, 1),
            struct.pack("<QQQQIB", 0x3000, 0, 0, 0, 0, 0),
            struct.pack("<QI", 0x4000, FEATURES),
        )
    )


@pytest.mark.row("G-06")
@pytest.mark.parametrize(("provider", "number"), [("None", 0), ("Minimal", 1), ("KVM", 3)])
def test_the_ids_in_units(provider: str, number: int) -> None:
    """A unit begins with its provider's id in 32 bits, little-endian; one of Hyper-V's, 2, is named and refused."""
    interface = a_clock(provider).interface
    assert interface.save_unit()[:4] == bytes([number, 0, 0, 0])
    assert interface.number == number
    with pytest.raises(ConfigError, match=rf"2 \(HyperV\); this VM has provider {number} \({provider}\)"):
        interface.load_unit(bytes([2, 0, 0, 0, 0, 0, 0, 0]))


@pytest.mark.row("G-18", "M-03")
@pytest.mark.parametrize("provider", ["None", "Minimal"])
def test_units_of_providers_that_save_nothing(provider: str) -> None:
    """Id and version are all; they load, and a byte more is refused."""
    clock = a_clock(provider)
    saved = clock.interface.save_unit()
    assert saved == struct.pack("<II", PROVIDERS[provider].number, 0)
    clock.interface.load_unit(saved)
    with pytest.raises(StateFileError, match="1 bytes after the header"):
        clock.interface.load_unit(saved + b"\0")


@pytest.mark.row("G-18", "G-21", "V-36", "V-38", "K-10")
def test_a_unit_comes_back() -> None:
    """The MSRs read as they did, pages are published where they were, and saving again gives the same bytes."""
    clock = a_running_guest()
    clock.pause()
    saved = clock.interface.save_unit()
    other = a_clock(memory=clock.memory)
    other.pause()
    other.write_msr(1, SYSTEM_TIME, 0x6001)  # what the unit knows nothing of is taken back
    other.interface.load_unit(saved)
    assert [other.read_msr(vcpu, SYSTEM_TIME) for vcpu in (0, 1)] == [0x2001, 0x3000]
    assert other.read_msr(1, WALL_CLOCK) == 0x4000
    assert other.interface.save_unit() == saved
    page = clock.page(0)
    other.resume()
    now = other.page(0)
    assert page is not None
    assert now is not None
    assert now.version > page.version
    assert clock.memory.read(0x3000, 32) == clock.memory.read(0x6000, 32) == bytes(32)
    assert isinstance(other.backend, SimulatedBackend)
    other.backend.advance(ns=5 * 10**9)
    other.refresh()
    page_now = oracle.TimeInfo.parse(clock.memory.read(0x2000, 32))
    assert abs(page_now.read(other.backend.tsc) - 5 * 10**9) <= 1
    assert clock.memory.read(0x3000, 32) == clock.memory.read(0x6000, 32) == bytes(32)


@pytest.mark.row("G-21")
@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_core_saves_nothing_of_a_vcpu(provider: str) -> None:
    """A unit is id, version and the provider's part, however many vCPUs there are and whatever they have called."""
    of_one = {"None": 8, "Minimal": 8, "HyperV": 323, "KVM": 8 + 4 + 37 + 12, "HyperV+KVM": 8}[provider]
    of_a_vcpu = {"KVM": 37, "HyperV": 136}.get(provider, 0)  # MSR, TSC, ns, address, version, flags; SIMP, SINTs
    for vcpus in (1, 2, 7):
        clock = GuestClock(GuestMemory(bytearray(SIZE)), vcpus, provider, backend=SimulatedBackend(HZ))
        for vcpu in range(vcpus):
            clock.hypercall(vcpu, HypercallRegisters(rax=1))
        saved = clock.interface.save_unit()
        assert len(saved) == of_one + of_a_vcpu * (vcpus - 1)
        assert saved[:8] == struct.pack("<II", PROVIDERS[provider].number, 0)
        assert saved[8:] == clock.interface.provider.save_unit()
        if provider not in ("KVM", "HyperV"):
            a_clock(provider).interface.load_unit(saved)  # a VM of another number of vCPUs


@pytest.mark.row("V-38")
def test_a_unit_goes_on_at_the_destinations_frequency() -> None:
    """A page is published by this host's TSC, whatever the saving host's was."""
    saved = a_running_guest().interface.save_unit()
    clock = GuestClock(GuestMemory(bytearray(SIZE)), 2, backend=SimulatedBackend(10**9), features=FEATURES)
    clock.interface.load_unit(saved)
    page = clock.page(0)
    assert page is not None
    assert (page.tsc_to_system_mul, page.tsc_shift) == (0x80000000, 1)


@pytest.mark.row("G-18", "V-36")
def test_addresses_that_have_no_page() -> None:
    """A page that is not in memory is saved by its address; one across two pages, which nobody serves, by 0."""
    clock = a_clock()
    clock.write_msr(0, SYSTEM_TIME, SIZE + 0x1001)
    clock.write_msr(1, SYSTEM_TIME, 0x2FF1)
    saved = clock.interface.save_unit()
    part = virtualbox_unit.decode(saved[8:], 2)
    assert part.vcpus == (virtualbox_unit.VcpuPart(SIZE + 0x1001, gpa=SIZE + 0x1000), virtualbox_unit.VcpuPart(0x2FF1))
    other = a_clock()
    other.interface.load_unit(saved)
    assert other.interface.save_unit() == saved
    assert other.memory.read(0, SIZE) == bytes(SIZE)


def a_virtualbox_unit() -> bytes:
    """A unit as VirtualBox saves it: two pages of versions 8 and 20, the first one's guest told of a pause."""
    vcpus = ((0x2001, 5 * 10**6, 7 * 10**9, 0x2000, 8, 2), (0x3001, 6 * 10**6, 8 * 10**9, 0x3000, 20, 0))
    parts = b"".join(struct.pack("<QQQQIB", *vcpu) for vcpu in vcpus)
    return struct.pack("<III", 3, 0, 1) + parts + struct.pack("<QI", 0x4000, FEATURES)


def changed(saved: bytes, at: int, form: str, value: int) -> bytes:
    """The unit with another value at an offset."""
    data = bytearray(saved)
    struct.pack_into(form, data, at, value)
    return bytes(data)


@pytest.mark.row("G-19", "V-37", "G-18", "G-05", "E13")
def test_what_does_not_fit_is_refused() -> None:
    """Each mismatch says what was found and what was expected, and the clock is as it was."""
    clock = a_running_guest()
    saved = clock.interface.save_unit()
    newest = PROVIDERS["KVM"].version
    before = (clock.save().provider, clock.memory.read(0, SIZE))
    cases: list[tuple[bytes, type[Exception], str]] = [
        (changed(saved, 0, "<I", 2), ConfigError, r"of provider 2 \(HyperV\); this VM has provider 3 \(KVM\)"),
        (changed(saved, 0, "<I", 0), ConfigError, r"of provider 0 \(None\); this VM has provider 3 \(KVM\)"),
        (changed(saved, 0, "<I", 99), ConfigError, r"of provider 99 \(unknown\); this VM has provider 3 \(KVM\)"),
        (changed(saved, 4, "<I", 7), StateFileError, f"provider version: found 7; supported: 0 to {newest}"),
        (changed(saved, 8, "<I", 7), StateFileError, "unsupported KVM saved-state version 7; supported: 1"),
        (
            changed(saved, 12 + 24, "<Q", 0x5000),
            StateFileError,
            r"vcpus\[0\].gpa: found 0x5000; supported: 0 or 0x2000",
        ),
        (
            changed(saved, len(saved) - 4, "<I", 1),
            ConfigError,
            "was offered KVM features 0x1; this VM offers 0x1000009",
        ),
        (saved[:-1], StateFileError, "unit.kvm: found 89 bytes; supported: 90 bytes, for 2 vCPUs"),
        (saved + b"\0", StateFileError, "91 bytes"),
        (changed(saved[:-1], 4, "<I", 1), StateFileError, "89 bytes"),
        (saved[:11], StateFileError, "3 bytes"),
        (saved[:7], StateFileError, "unit: found 7 bytes; supported: at least 8"),
    ]
    for data, error, message in cases:
        with pytest.raises(error, match=message):
            clock.interface.load_unit(data)
        assert (clock.save().provider, clock.memory.read(0, SIZE)) == before
    for version in (0, 2, 2**32 - 1):
        with pytest.raises(StateFileError, match=f"unit version: found {version}; supported: 1"):
            clock.interface.load_unit(saved, version=version)
    assert (clock.save().provider, clock.memory.read(0, SIZE)) == before


@pytest.mark.row("V-37")
@pytest.mark.parametrize("version", [0, 2, 7, 2**32 - 1])
@pytest.mark.parametrize("profile", ["linux", "virtualbox"])
def test_a_kvm_part_of_another_version_is_refused(version: int, profile: str) -> None:
    """The error has the version found and the one expected, be the part longer or shorter, and nothing changes."""
    clock = a_running_guest(profile=profile)
    saved = clock.interface.save_unit()
    memory = clock.memory.read(0, SIZE)
    for length in (12, len(saved) - 1, len(saved), len(saved) + 8):
        other = changed(saved.ljust(length, b"\0")[:length], 8, "<I", version)
        with pytest.raises(StateFileError) as refused:
            clock.interface.load_unit(other)
        assert refused.value.field == "unit.kvm.version"
        assert (re.findall(r"\d+", refused.value.found), refused.value.supported) == ([str(version)], "1")
    assert (clock.interface.save_unit(), clock.memory.read(0, SIZE)) == (saved, memory)


@pytest.mark.row("G-19", "G-28")
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("configured", [0, 1])
def test_the_version_is_as_configured_and_as_loaded(provider: str, configured: int) -> None:
    """A unit has the configured version, 0 by default and always for None; load adopts it, and it is saved again."""
    options = {"features": FEATURES} if provider == "KVM" else {}
    memory, backend = GuestMemory(bytearray(SIZE)), SimulatedBackend(HZ)
    clock = GuestClock(memory, 2, {"provider": provider, "version": configured, **options}, backend=backend)
    saved = clock.interface.save_unit()
    assert saved[4:8] == struct.pack("<I", 0 if provider == "None" else configured)
    other = a_clock(provider)
    other.interface.load_unit(saved)
    assert other.interface.save_unit() == saved
    restored = GuestClock.restore(other.save(), memory, backend=backend)
    assert restored.interface.save_unit()[:8] == saved[:8]


@pytest.mark.row("G-19")
def test_a_newer_interface_is_adopted_as_virtualbox_does() -> None:
    """Refused by default; under profile "virtualbox" the version is taken over silently, and saved again (T13)."""
    other = changed(a_running_guest(profile="virtualbox").interface.save_unit(), 4, "<I", 7)
    with pytest.raises(StateFileError, match="provider version: found 7; supported: 0 to"):
        a_clock().interface.load_unit(other)
    quirky = a_clock(profile="virtualbox")
    told = quirky.events.last
    quirky.interface.load_unit(other)
    assert quirky.interface.version == 7
    assert [event.kind for event in quirky.events.read(told).events] == ["page"]
    assert quirky.read_msr(0, SYSTEM_TIME) == 0x2001
    assert quirky.interface.save_unit()[:8] == struct.pack("<II", 3, 7)


@pytest.mark.row("V-46", "V-36")
def test_virtualbox_adopts_other_features_without_telling_the_guest() -> None:
    """Another feature word is kept for the next save, and CPUID stays as it was; other profiles refuse it."""
    saved = a_running_guest(profile="virtualbox").interface.save_unit()
    other = changed(saved, len(saved) - 4, "<I", 1 << 3)
    clock = a_clock(profile="virtualbox")
    clock.interface.load_unit(other)
    assert clock.interface.save_unit()[-4:] == struct.pack("<I", 1 << 3)
    leaf = clock.cpuid(0x40000001)
    assert leaf is not None
    assert leaf.eax == FEATURES
    assert clock.read_msr(1, WALL_CLOCK) == 0x4000
    with pytest.raises(ConfigError, match="was offered KVM features 0x8"):
        a_clock().interface.load_unit(other)


@pytest.mark.row("G-18", "G-28")
def test_only_the_final_pass_counts() -> None:
    """In any other pass of a live migration a unit, be it unsound, is not looked at, and nothing changes."""
    clock = a_running_guest()
    before, ram, told = clock.interface.save_unit(), clock.memory.read(0, SIZE), clock.events.last
    for data in (b"", before[:-1], changed(before, 12, "<Q", 0x6001), changed(before, 0, "<I", 1)):
        for version in (1, 9):
            clock.interface.load_unit(data, version=version, is_final_pass=False)
    assert clock.interface.save_unit() == before
    assert (clock.memory.read(0, SIZE), clock.events.last) == (ram, told)
    clock.interface.load_unit(changed(changed(before, 12, "<Q", 0x6001), 12 + 24, "<Q", 0x6000))
    assert clock.read_msr(0, SYSTEM_TIME) == 0x6001


@pytest.mark.row("V-38")
@pytest.mark.parametrize("provider", PROVIDERS)
def test_nothing_is_left_to_do_after_a_load(provider: str) -> None:
    """When load_unit() returns, a running guest's pages are in its memory: a refresh at that TSC adds nothing."""
    saved = (a_running_guest() if provider == "KVM" else a_clock(provider)).interface.save_unit()
    clock = a_clock(provider)
    clock.interface.load_unit(saved)
    page = clock.memory.read(0x2000, 32)
    assert (page != bytes(32)) is (provider == "KVM")
    clock.refresh()
    assert clock.memory.read(0x2004, 28) == page[4:]  # all but the version
    assert clock.memory.read(0x3000, 32) == bytes(32)


@pytest.mark.row("V-36", "V-21", "V-17")
def test_virtualboxs_unit_has_its_own_count() -> None:
    """A guest that scribbles over version and flags of its page does not change what is saved, nor the next version."""
    clock = a_running_guest(profile="virtualbox")
    clock.write_msr(0, SYSTEM_TIME, 0x2001)
    clock.memory.write(0x2000, struct.pack("<I", 0xABCDEF))
    clock.memory.write(0x2000 + 29, b"\xff")
    first, _ = virtualbox_unit.decode(clock.interface.save_unit()[8:], 2).vcpus
    assert (first.version, first.flags) == (4, 0)
    clock.write_msr(0, SYSTEM_TIME, 0x2001)
    page = clock.page(0)
    assert page is not None
    assert (page.version, page.flags) == (6, 1)


@pytest.mark.row("V-38", "V-17", "V-21")
def test_version_and_flags_of_virtualboxs_unit_come_back() -> None:
    """The page has the saved version, 8, and the saved flags beside STABLE; the next registration makes 10 of it."""
    clock = a_clock(profile="virtualbox")
    clock.pause()
    clock.interface.load_unit(a_virtualbox_unit())
    clock.resume()
    pages = [clock.page(vcpu) for vcpu in range(2)]
    assert [(page.version, page.flags) for page in pages if page is not None] == [(8, 3), (20, 1)]
    assert clock.interface.save_unit()[8:][4 + 32 : 4 + 37] == struct.pack("<IB", 8, 2)
    clock.write_msr(0, SYSTEM_TIME, 0x2001)
    page = clock.page(0)
    assert page is not None
    assert (page.version, page.flags) == (10, 3)


@pytest.mark.row("P-25")
def test_a_restored_clock_has_its_interface() -> None:
    """Provider, options and profile come back with a saved clock, on the engine and for the VMM that it is given."""
    clock = a_running_guest(profile="document")
    restored = GuestClock.restore(clock.save(), clock.memory, backend=SimulatedBackend(HZ), vcpu_host="kvm")
    assert restored.interface.config == clock.interface.config
    assert (restored.interface.profile, str(restored.vcpu_host)) == ("document", "kvm")
    minimal = a_clock("Minimal", apic_bus_hz=100_000_000)
    again = GuestClock.restore(minimal.save(), minimal.memory, backend=SimulatedBackend(HZ))
    assert again.cpuid_leaves == minimal.cpuid_leaves


@pytest.mark.row("P-25", "E9", "E13")
@pytest.mark.parametrize("key", ["provider", "backend", "vcpus", "memory", "engine", "colour", "self"])
def test_a_saved_configuration_has_the_providers_options_only(key: str) -> None:
    """What would be another argument of the clock's, or a second provider, is no option: StateFileError."""
    saved = a_clock().save()
    config = {**saved.provider.config, key: 1}
    with pytest.raises(StateFileError, match=key):
        GuestClock.restore(
            saved._replace(provider=saved.provider._replace(config=config)),
            GuestMemory(bytearray(SIZE)),
            backend=SimulatedBackend(HZ),
        )


@pytest.mark.row("V-36", "V-38", "E9")
@pytest.mark.parametrize("profile", ["linux", "virtualbox"])
def test_a_load_is_whole_before_on_dirty_is_told(profile: str) -> None:
    """An on_dirty that raises at the first write finds MSRs, pages and the interface's version as in the unit."""
    source = a_clock(profile=profile, version=2 if profile == "linux" else 0)
    for vcpu in range(2):
        source.write_msr(vcpu, SYSTEM_TIME, 0x2001 + 0x1000 * vcpu)
    saved = source.interface.save_unit()
    clock = a_clock(profile=profile)
    clock.write_msr(0, SYSTEM_TIME, 0x6001)
    found: list[object] = []

    def full(gpa: int, length: int) -> None:
        msrs = [clock.read_msr(vcpu, SYSTEM_TIME) for vcpu in range(2)]
        found.append((msrs, [clock._keeper.pages.registered(vcpu) for vcpu in range(2)], clock.interface.version))
        raise OSError(f"{gpa:#x}+{length}: the dirty log is full")

    clock.memory.on_dirty = full
    with pytest.raises(OSError, match="full"):
        clock.interface.load_unit(saved)
    assert set(map(repr, found)) == {repr(([0x2001, 0x3001], [0x2000, 0x3000], source.interface.version))}
    assert all(clock.page(vcpu) is not None for vcpu in range(2))
