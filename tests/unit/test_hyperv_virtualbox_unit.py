"""Hyper-V's part of VirtualBox's saved unit: its bytes in each version, what it lacks, and damaged ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock import ConfigError, Gpa, GuestClock, GuestMemory, SimulatedBackend, StateFileError
from pvclock.providers.hyperv import HyperVProvider
from pvclock.providers.hyperv.features import MICROSOFT
from pvclock.providers.hyperv.virtualbox_unit import (
    NO_PAGE,
    VERSIONS,
    DebugPart,
    Unit,
    VcpuPart,
    decode,
    encode,
    unit_of,
    written_in,
)
from pvclock.providers.interface import MsrValue, ReferenceTime
from tests.unit.hyperv_provider import EVERY_PROFILE, OS_ID, a_provider
from tests.unit.stub_clock import SIZE, NotedVmm, StubClock

U16, U32, U64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))
MASKED = 1 << 16
HZ = 2_500_000_000

# The bytes by hand, from the order in which VirtualBox's gimR3HvSave() puts its fields: name, hex.
FIRST = [
    ("guest OS id", "0807060504030201"),
    ("hypercall MSR", "0190000000000000"),
    ("reference TSC MSR", "01a0000000000000"),
    ("base", "f20a0000"),
    ("partition", "00001000"),
    ("power", "00000000"),
    ("misc", "00050000"),
    ("hints", "30010000"),
    ("host", "09000000"),
    ("hypercall region", "0000001000000090000000000000"),
    ("its description", "16000000" + b"Hyper-V hypercall page".hex()),
    ("TSC region", "01000010000000a0000000000000"),
    ("its description", "10000000" + b"Hyper-V TSC page".hex()),
    ("sequence", "2a000000"),
]
DEBUGGER = [
    ("pending buffer", "0010000000000000"),
    ("send buffer", "0020000000000000"),
    ("receive buffer", "0030000000000000"),
    ("status", "0400080000000000"),
    ("reply", "05000000"),
    ("transaction", "78563412"),
    ("guest's address", "0a000505"),
]
PORTS = [("destination", "0043"), ("source", "0044")]
SINT2 = "3300000000000000"
MESSAGE_PAGES = ("01b0000000000000", "0000000000000000")
SINT_NONE = "0000010000000000"
ALL_SINTS = SINT_NONE * 2 + SINT2 + SINT_NONE * 13
WRITTEN: dict[int, list[tuple[str, str]]] = {
    1: [("version", "01000000"), *FIRST],
    2: [("version", "02000000"), *FIRST, *DEBUGGER]
    + [("vCPU", page + SINT2) for page in MESSAGE_PAGES]
    + [("end", "ff")],
    3: [("version", "03000000"), *FIRST, *DEBUGGER]
    + [("vCPU", page + ALL_SINTS) for page in MESSAGE_PAGES]
    + [("end", "ff")],
    4: [("version", "04000000"), *FIRST, *DEBUGGER, *PORTS]
    + [("vCPU", page + ALL_SINTS) for page in MESSAGE_PAGES]
    + [("end", "ff")],
}
GOLDEN = {version: bytes.fromhex("".join(each for _, each in fields)) for version, fields in WRITTEN.items()}

SINTS = (MASKED, MASKED, 0x33, *[MASKED] * 13)
DEBUG = DebugPart(0x1000, 0x2000, 0x3000, 0x80004, 5, 0x12345678, 0x0505000A, 0x4300, 0x4400)
WHOLE = Unit(
    guest_os_id=0x0102030405060708,
    hypercall=0x9001,
    reference_tsc=0xA001,
    features=(0xAF2, 0x100000, 0, 0x500, 0x130, 9),
    hypercall_page=0x9000,
    reference_page=0xA000,
    sequence=42,
    debug=DEBUG,
    vcpus=(VcpuPart(0xB001, SINTS), VcpuPart(0, SINTS)),
)
AS_READ = {
    1: WHOLE._replace(debug=DebugPart(), vcpus=(VcpuPart(),) * 2),
    2: WHOLE._replace(debug=DEBUG._replace(destination_port=0, source_port=0)),
    3: WHOLE._replace(debug=DEBUG._replace(destination_port=0, source_port=0)),
    4: WHOLE,
}


@st.composite
def units(draw: st.DrawFn, vcpus: int) -> Unit:
    """Any unit that VirtualBox can write: pages lie where their MSRs say, as long as these are enabled."""
    hypercall, reference_tsc = draw(U64), draw(U64)
    pages = [
        msr & ~0xFFF if msr & 1 else draw(st.sampled_from([NO_PAGE, 0x5000])) for msr in (hypercall, reference_tsc)
    ]
    msrs = (draw(U64), draw(U64), draw(U64), draw(U64))
    debug = DebugPart(*msrs, draw(st.integers(0, 6)), draw(U32), draw(U32), draw(U16), draw(U16))
    parts = tuple(VcpuPart(draw(U64), tuple(draw(U64) for _ in range(16))) for _ in range(vcpus))
    features = tuple(draw(U32) for _ in range(6))
    return Unit(draw(U64), hypercall, reference_tsc, features, pages[0], pages[1], draw(U32), debug, parts)


@pytest.mark.row("H-70")
@pytest.mark.parametrize("version", VERSIONS)
def test_the_bytes_of_each_version(version: int) -> None:
    """Written and read, they are those that VirtualBox's order of fields makes."""
    assert encode(WHOLE, version) == GOLDEN[version]
    assert decode(GOLDEN[version], 2) == AS_READ[version]


@pytest.mark.row("H-70")
def test_lengths_of_each_version() -> None:
    """Of one vCPU: they grow by the debugger and a message page, then by fifteen SINTs, then by two ports."""
    unit = WHOLE._replace(vcpus=(VcpuPart(),))
    assert [len(encode(unit, version)) for version in VERSIONS] == [130, 191, 311, 315]
    assert len(encode(WHOLE)) == 315 + 8 * 17


@pytest.mark.row("H-70")
@given(unit=st.integers(0, 4).flatmap(units))
def test_the_newest_version_keeps_all(unit: Unit) -> None:
    """What is written is read again, for any number of vCPUs."""
    assert decode(encode(unit), len(unit.vcpus)) == unit


@pytest.mark.row("H-70", "H-72")
@given(unit=units(3), version=st.sampled_from(VERSIONS))
def test_what_an_older_version_lacks(unit: Unit, version: int) -> None:
    """Ports before 4; SINTs but the one of VMBus before 3; the debugger and all SynIC state before 2."""
    found = decode(encode(unit, version), 3)
    assert found[:7] == unit[:7]
    ports = {"destination_port": 0, "source_port": 0}
    assert found.debug == (
        DebugPart() if version == 1 else unit.debug if version == 4 else unit.debug._replace(**ports)
    )
    for here, there in zip(found.vcpus, unit.vcpus, strict=True):
        assert here.message_page == (there.message_page if version > 1 else 0)
        kept = {1: set(), 2: {2}, 3: set(range(16)), 4: set(range(16))}[version]
        assert here.sints == tuple(there.sints[sint] if sint in kept else MASKED for sint in range(16))


@pytest.mark.row("H-72")
def test_what_a_unit_never_holds() -> None:
    """Its fields are these; SIEFP, SCONTROL, the APIC assist page, timers and crash MSRs have none."""
    assert Unit._fields == (
        "guest_os_id",
        "hypercall",
        "reference_tsc",
        "features",
        "hypercall_page",
        "reference_page",
        "sequence",
        "debug",
        "vcpus",
    )
    assert VcpuPart._fields == ("message_page", "sints")


HYPERCALL_REGION, TSC_REGION = 52, 92
SIZE_IN_REGION, GPA_IN_REGION, LENGTH_IN_REGION = 2, 6, 14


def patched(at: int, data: bytes, version: int = 4) -> bytes:
    """The golden bytes with others at a place."""
    return GOLDEN[version][:at] + data + GOLDEN[version][at + len(data) :]


@pytest.mark.row("H-71")
@pytest.mark.parametrize("version", [0, 5, 2**32 - 1])
def test_versions_that_are_not_supported(version: int) -> None:
    """The error names the one that was found and those that can be read."""
    with pytest.raises(StateFileError, match=f"unsupported Hyper-V saved-state version {version}; supported: 1 to 4"):
        decode(patched(0, version.to_bytes(4, "little")), 2)


@pytest.mark.row("H-71")
@pytest.mark.parametrize(("region", "name"), [(HYPERCALL_REGION, "hypercall_page"), (TSC_REGION, "reference_page")])
@pytest.mark.parametrize(
    ("offset", "data", "why"),
    [
        (SIZE_IN_REGION, "01100000", r"\.size: found region size 0x1001; supported: 0x1000"),
        (0, "02", ": found region 2, flag 0"),
        (1, "02", ": found region [01], flag 2"),
        (GPA_IN_REGION, "00c0000000000000", r"\.gpa: found 0xc000; supported: 0x[9a]000, which the MSR says"),
        (GPA_IN_REGION, "ff" * 8, r"\.gpa: found 0xffffffffffffffff; supported: 0x[9a]000"),
        (LENGTH_IN_REGION, "20000000", r"\.description: found a text of 32 bytes; supported: 31 at most"),
        (LENGTH_IN_REGION, "ffffffff", r"\.description: found a text of 4294967295 bytes"),
    ],
)
def test_regions_that_cannot_be(region: int, name: str, offset: int, data: str, why: str) -> None:
    """Size, number, flag, address and description of either page are refused by name."""
    with pytest.raises(StateFileError, match=rf"^unit\.hyperv\.{name}{why}"):
        decode(patched(region + offset, bytes.fromhex(data)), 2)


@pytest.mark.row("H-71")
def test_a_page_that_is_disabled_may_have_been_anywhere() -> None:
    """Its address is not looked at then."""
    for msr, region in ((12, HYPERCALL_REGION), (20, TSC_REGION)):
        moved = patched(region + GPA_IN_REGION, b"\xff" * 8)
        assert NO_PAGE in decode(moved[:msr] + b"\x00" + moved[msr + 1 :], 2)[4:6]


@pytest.mark.row("H-71")
def test_a_debugger_that_cannot_be() -> None:
    """Replies are 0 to 6."""
    reply = len(GOLDEN[1]) + 32
    assert decode(patched(reply, b"\x06"), 2).debug.reply == 6
    with pytest.raises(StateFileError, match=r"debug\.reply: found 7; supported: 0 to 6"):
        decode(patched(reply, b"\x07"), 2)


@pytest.mark.row("H-71")
@pytest.mark.parametrize("version", VERSIONS)
def test_units_of_another_length(version: int) -> None:
    """Every shorter one is refused, and so is a longer one, and one of another number of vCPUs."""
    whole = GOLDEN[version]
    for length in range(len(whole)):
        with pytest.raises(StateFileError, match="the end after"):
            decode(whole[:length], 2)
    with pytest.raises(StateFileError, match="1 bytes after the end"):
        decode(whole + b"\xff", 2)
    if version > 1:
        with pytest.raises(StateFileError, match="the end after"):
            decode(whole, 3)
        with pytest.raises(StateFileError, match=r"unit\.hyperv\.end: found 0x0; supported: 0xff after 1 vCPUs"):
            decode(whole, 1)


def damaged(seed: int, count: int) -> Iterator[tuple[bytes, int]]:
    """Golden units with a few bytes changed, cut, repeated or put in front, and a number of vCPUs."""
    chance = random.Random(seed)  # noqa: S311  # reproducible damage
    for _ in range(count):
        data = bytearray(GOLDEN[chance.choice(VERSIONS)])
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(data) + 1)
            match chance.randrange(4):
                case 0:
                    data[at : at + 1] = bytes([chance.randrange(256)])
                case 1:
                    del data[at : at + chance.randint(1, 16)]
                case 2:
                    data[at:at] = data[at : at + chance.randint(1, 16)]
                case _:
                    data[at : at + 4] = chance.choice([b"\xff\xff\xff\xff", bytes(4), b"\x00\x00\x00\x80"])
        yield bytes(data), chance.randint(1, 3)


@pytest.mark.row("H-71")
def test_damaged_units() -> None:
    """Of 100000 each is refused by the one error for it, or is a unit that VirtualBox could have written as it is."""
    refused = 0
    for data, vcpus in damaged(seed=14, count=100_000):
        try:
            unit = decode(data, vcpus)
        except StateFileError:
            refused += 1
            continue
        again = encode(unit, data[0])
        assert len(unit.vcpus) == vcpus
        assert decode(again, vcpus) == unit
    assert 50_000 < refused < 95_000


@pytest.mark.row("H-71")
@given(data=st.binary(max_size=400), version=st.sampled_from(VERSIONS), vcpus=st.integers(0, 3))
def test_units_of_chance(data: bytes, version: int, vcpus: int) -> None:
    """No bytes after a good version make another error, or a unit of another number of vCPUs."""
    with suppress(StateFileError):
        assert len(decode(version.to_bytes(4, "little") + data, vcpus).vcpus) == vcpus


# In the provider

ENABLED_MSRS = ((0x40000000, OS_ID), (0x40000001, 0x5001), (0x40000021, 0x6001))
DEBUGGER_OF: dict[str, dict[str, Any]] = {
    "linux": {"vs_interface": True},
    "document": {"vs_interface": True},
    "virtualbox": {"vendor_id": MICROSOFT},
}


def a_guest(profile: str) -> tuple[HyperVProvider, StubClock]:
    """A provider with a debugger whose guest has enabled both pages, and written what a unit does not hold."""
    provider, clock = a_provider(profile=profile, **DEBUGGER_OF[profile])
    for index, value in (*ENABLED_MSRS, (0x400000F3, 0x7000), (0x400000F5, 0x7008), (0x40000100, 77)):
        provider.write_msr(0, index, value)
    return provider, clock


def nothing() -> None:
    """Takes part in a load without a word."""


@pytest.mark.row("H-70", "H-72", "G-18")
@EVERY_PROFILE
def test_a_guests_unit_comes_back(profile: str) -> None:
    """Its MSRs read as before, pages lie where they lay, and what a unit does not hold is as after a reset."""
    provider, _ = a_guest(profile)
    saved = provider.save_unit()
    unit = decode(saved, 2)
    assert unit[:3] == (OS_ID, 0x5001, 0x6001)
    assert unit[4:6] == (0x5000, 0x6000)
    other, clock = a_provider(profile=profile, **DEBUGGER_OF[profile])
    other.write_msr(0, 0x40000101, 5)
    other.load_unit(saved, nothing, nothing)
    assert [other.read_msr(1, index) for index, _ in ENABLED_MSRS] == [value for _, value in ENABLED_MSRS]
    assert other.save()["debug_send"] == 0x7000
    assert other.save()["debug_pending"] == 0x7008
    assert [other.read_msr(0, index) for index in (0x40000100, 0x40000101)] == [0, 0]
    assert clock.memory.read(0x5000, 4) == bytes.fromhex("0f01c1c3")
    assert other.are_hypercalls_enabled
    if profile == "virtualbox":
        assert int.from_bytes(clock.memory.read(0x6000, 4), "little") == unit.sequence + 1
    else:
        assert clock.reference_page == 0x6000
        assert other.save_unit() == saved


@pytest.mark.row("H-70")
def test_the_pages_sequence_goes_on() -> None:
    """From the unit's, or from the one that is here if that is further on."""
    for here, there in ((3, 40), (40, 3)):
        provider, clock = a_guest("linux")
        clock.reference_time = ReferenceTime(5, there)
        saved = provider.save_unit()
        assert decode(saved, 2).sequence == there
        other, clock = a_provider(**DEBUGGER_OF["linux"])
        clock.reference_time = ReferenceTime(9, here)
        other.load_unit(saved, nothing, nothing)
        assert clock.reference_time == ReferenceTime(9, 40)


@pytest.mark.row("H-70")
@EVERY_PROFILE
@pytest.mark.parametrize("version", VERSIONS)
def test_the_provider_reads_every_version(version: int, profile: str) -> None:
    """An older unit loads, with what it lacks as after a reset."""
    provider, _ = a_guest(profile)
    part = encode(decode(provider.save_unit(), 2), version)
    other, _ = a_guest(profile)
    other.load_unit(part, nothing, nothing)
    assert other.read_msr(0, 0x40000000) == OS_ID
    assert other.save()["debug_send"] == (0x7000 if version > 1 else 0)


@pytest.mark.row("H-71", "E13")
@EVERY_PROFILE
def test_a_hypercall_page_that_cannot_be_enabled(profile: str) -> None:
    """One outside guest memory is refused; so is, where VirtualBox's guests could not have had it, a TSC page."""
    provider, _ = a_guest(profile)
    unit = decode(provider.save_unit(), 2)
    bad = unit._replace(hypercall=SIZE | 1, hypercall_page=SIZE)
    with pytest.raises(ConfigError, match=f"failed to enable the hypercall page at {SIZE:#x}"):
        provider.load_unit(encode(bad), nothing, nothing)
    bad = unit._replace(reference_tsc=SIZE | 1, reference_page=SIZE)
    if profile == "virtualbox":
        with pytest.raises(ConfigError, match=f"failed to enable the TSC page at {SIZE:#x}"):
            provider.load_unit(encode(bad), nothing, nothing)
    else:
        provider.load_unit(encode(bad), nothing, nothing)
        assert provider.read_msr(0, 0x40000021) == SIZE | 1


@pytest.mark.row("H-71", "E13")
@EVERY_PROFILE
def test_values_that_no_guest_can_have_written(profile: str) -> None:
    """A hypercall page without an OS id is refused before anything changes."""
    provider, clock = a_guest(profile)
    before, memory = provider.save(), clock.memory.read(0, SIZE)
    bad = decode(provider.save_unit(), 2)._replace(guest_os_id=0, reference_tsc=0x8001, reference_page=0x8000)
    with pytest.raises(ConfigError, match="'guest_os_id' is 0"):
        provider.load_unit(encode(bad), nothing, nothing)
    assert (provider.save(), clock.memory.read(0, SIZE)) == (before, memory)


@pytest.mark.row("H-71", "E13")
def test_a_unit_of_another_offer() -> None:
    """Linux's guests may rely on what CPUID has told them; VirtualBox takes the unit's words and saves them again."""
    for profile in ("linux", "virtualbox"):
        provider, _ = a_guest(profile)
        other = encode(decode(provider.save_unit(), 2)._replace(features=(1, 2, 3, 4, 5, 6)))
        if profile == "linux":
            with pytest.raises(ConfigError, match="was offered 0x1, 0x2, 0x3, 0x4, 0x5, 0x6; this VM offers"):
                provider.load_unit(other, nothing, nothing)
        else:
            provider.load_unit(other, nothing, nothing)
            assert decode(provider.save_unit(), 2).features == (1, 2, 3, 4, 5, 6)


@pytest.mark.row("H-71", "E13")
@EVERY_PROFILE
def test_damaged_units_are_never_loaded_by_half(profile: str) -> None:
    """Of 300 each either loads, or leaves the state, the pages and the memory of the guest as they were."""
    source, _ = a_guest(profile)
    part = source.save_unit()
    chance, refused = random.Random(7), 0  # noqa: S311  # reproducible damage
    for _ in range(300):
        provider, clock = a_guest(profile)
        before, memory, page = provider.save(), clock.memory.read(0, SIZE), clock.reference_page
        data = bytearray(part)
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        told: list[str] = []
        try:
            provider.load_unit(bytes(data), partial(told.append, "begin"), nothing)
        except (StateFileError, ConfigError):
            refused += 1
            assert (provider.save(), clock.memory.read(0, SIZE), clock.reference_page) == (before, memory, page)
            assert told == []
        else:
            assert told == ["begin"]
    assert 20 < refused < 300


@pytest.mark.row("H-71")
def test_a_load_that_fails_at_its_end_is_taken_back() -> None:
    """What was to change along with it did not: the guest's state is as it was."""

    class Failing(StubClock):
        """Cannot publish a reference page."""

        def place_reference_page(
            self,
            gpa: Gpa | None,
            begin: Callable[[], object] = nothing,
            undo: Callable[[], object] = nothing,
            vcpu: int | None = None,
        ) -> None:
            """Begin, and fail."""
            begin()
            undo()
            raise BrokenPipeError("no page was published")

    source, _ = a_guest("linux")
    part = source.save_unit()
    provider, clock = a_provider(clock=Failing(2, vmm=NotedVmm()), **DEBUGGER_OF["linux"])
    clock.reference_time = ReferenceTime(8, 9)
    provider.write_msr(0, 0x40000000, 5)
    before = provider.save()
    done: list[str] = []
    with pytest.raises(BrokenPipeError):
        provider.load_unit(part, lambda: done.append("begin"), lambda: done.append("undo"))
    assert (provider.save(), done) == (before, ["begin", "undo"])


@pytest.mark.row("H-70", "H-72")
@given(values=st.lists(U64, min_size=36, max_size=36))
def test_the_synic_of_a_unit(values: list[int]) -> None:
    """Message pages and SINTs go into it, vCPU by vCPU, and come out of it, by the names of a provider's state."""
    simp, sint = tuple(values[:2]), tuple(values[2:34])
    saved: dict[str, MsrValue] = {
        "guest_os_id": values[34],
        "simp": simp,
        "sint": sint,
        "scontrol": (1, 1),
        "siefp": (1, 1),
    }
    unit = decode(encode(unit_of(saved, (0,) * 6, 2)), 2)
    assert unit.vcpus == tuple(VcpuPart(simp[vcpu], sint[16 * vcpu : 16 * vcpu + 16]) for vcpu in range(2))
    written = written_in(unit)
    assert (written["guest_os_id"], written["simp"], written["sint"]) == (values[34], simp, sint)
    assert not {"scontrol", "siefp"} & set(written)


# In a clock

HZ = 2_500_000_000


def a_clock() -> GuestClock:
    """A clock of two vCPUs, with interrupts."""
    memory = GuestMemory(bytearray(1 << 16))
    return GuestClock(memory, 2, "HyperV", backend=SimulatedBackend(HZ), vmm=NotedVmm())


def shown_sequence(clock: GuestClock) -> int:
    """The sequence of the reference TSC page at 0x6000."""
    return int.from_bytes(clock.memory.read(0x6000, 4), "little")


@pytest.mark.row("H-70", "H-71")
def test_a_clock_goes_on_from_a_unit() -> None:
    """Its page has a sequence beyond the unit's at once, its counter never goes back, and its SynIC is there."""
    source = a_clock()
    for index, value in (*ENABLED_MSRS, (0x40000083, 0x7001), (0x40000093, 0x55)):
        source.write_msr(1, index, value)
    assert isinstance(source.backend, SimulatedBackend)
    for _ in range(3):
        source.pause()
        source.backend.advance(ns=10**9)
        source.resume()
    saved = source.interface.save_unit()
    sequence = shown_sequence(source)
    assert decode(saved[8:], 2).sequence == sequence > 1
    clock = a_clock()
    before = clock.read_msr(0, 0x40000020)
    clock.write_msr(0, 0x40000080, 1)
    clock.interface.load_unit(saved)
    assert shown_sequence(clock) > sequence
    assert clock.read_msr(0, 0x40000020) >= before
    assert [clock.read_msr(1, index) for index in (0x40000083, 0x40000093, 0x40000092)] == [0x7001, 0x55, MASKED]
    assert clock.read_msr(0, 0x40000080) == 0
    assert clock.memory.read(0x5000, 4) == bytes.fromhex("0f01c1c3")


@pytest.mark.row("H-71")
def test_a_clock_refuses_a_unit_with_a_vector_that_no_apic_takes() -> None:
    """The SynIC's own rules hold for units: nothing of such a one is loaded."""
    clock = a_clock()
    clock.write_msr(0, 0x40000000, OS_ID)
    unit = decode(clock.interface.save_unit()[8:], 2)
    bad = unit._replace(guest_os_id=5, vcpus=(VcpuPart(), VcpuPart(sints=(MASKED,) * 15 + (7,))))
    header = clock.interface.save_unit()[:8]
    with pytest.raises(ConfigError, match="'sint'"):
        clock.interface.load_unit(header + encode(bad))
    assert clock.read_msr(0, 0x40000000) == OS_ID
    clock.interface.load_unit(header + encode(unit._replace(guest_os_id=5)))
    assert clock.read_msr(0, 0x40000000) == 5


@pytest.mark.row("H-72", "E13")
@EVERY_PROFILE
def test_what_fails_along_with_a_unit_leaves_all_as_it_was(profile: str) -> None:
    """The VMM's own part of a load may raise: provider and page are as before, and its undo() has run."""
    memory, undone = GuestMemory(bytearray(1 << 16)), list[str]()
    clock = GuestClock(memory, 1, "HyperV", backend=SimulatedBackend(HZ), profile=profile)
    provider = clock.interface.provider
    empty = provider.save_unit()
    for index, value in ((0x40000000, OS_ID), (0x40000001, 0x3001), (0x40000021, 0x4001)):
        clock.write_msr(0, index, value)
    before, page = provider.save(), memory.read(0x4000, 24)

    def fail() -> None:
        raise OSError("the VMM's part")

    with pytest.raises(OSError, match="the VMM's part"):
        provider.load_unit(empty, fail, lambda: undone.append("undo"))
    after, read = provider.save(), memory.read(0x4000, 24)
    assert {**after, "reference_sequence": 0} == {**before, "reference_sequence": 0}
    assert (read[4:], int.from_bytes(read[:4], "little")) == (page[4:], after["reference_sequence"])
    assert undone == ["undo"]
