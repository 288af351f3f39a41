"""Where Linux, its documents and VirtualBox differ in the clock itself: each difference, shown on both sides."""

from __future__ import annotations

from contextlib import AbstractContextManager
from struct import pack

import pytest

from pvclock import CpuidLeaf, GuestClock, GuestMemory, MsrFault, SimulatedBackend
from pvclock.providers.interface import Pairing
from pvclock.providers.kvm import PROFILES
from pvclock.timekeeping.events import EventKind
from tests import golden, oracle
from tests.unit.stub_clock import GUARD, NOW, SIZE, UPTIME_NS, NotedVmm, StubClock, a_provider, u32, written

SYSTEM_TIME, SYSTEM_TIME_NEW = 0x12, 0x4B564D01
WALL_CLOCK, WALL_CLOCK_NEW = 0x11, 0x4B564D00
PAGE, OTHER = 0x2000, 0x2040
NS_PER_S = 10**9
NOT_VIRTUALBOX = [profile for profile in PROFILES if profile != "virtualbox"]


def page_of(clock: StubClock, gpa: int = PAGE) -> oracle.TimeInfo:
    """The time page at `gpa`."""
    return oracle.TimeInfo.parse(clock.memory.read(gpa, 32))


# Where a page may be


@pytest.mark.row("K-10", "V-14")
@pytest.mark.parametrize("index", [SYSTEM_TIME, SYSTEM_TIME_NEW])
@pytest.mark.parametrize("offset", [2, 0xE])
def test_a_misaligned_time_page(index: int, offset: int) -> None:
    """As documented it faults and changes nothing; Linux and VirtualBox mask bit 0 and take it."""
    for profile in ("linux", "virtualbox"):
        provider, clock = a_provider(profile=profile)
        clock.memory.write(PAGE, bytes(64))
        provider.write_msr(0, index, PAGE + offset | 1)
        assert page_of(clock, PAGE + offset).version == 2
    provider, clock = a_provider(profile="document")
    with pytest.raises(MsrFault, match="4-byte aligned"):
        provider.write_msr(0, index, PAGE + offset | 1)
    assert (provider.read_msr(0, index), clock.page_at(0), written(clock.memory)) == (0, None, [])
    provider.write_msr(0, index, PAGE + offset)  # off: the address is of no account


@pytest.mark.row("K-10", "V-13", "V-16")
@pytest.mark.parametrize("gpa", [SIZE, 2**64 - 4096])
def test_a_time_page_without_memory(gpa: int) -> None:
    """As documented it faults; the others keep the value (T6), and Linux serves the page once memory comes."""
    served = {}
    for profile in ("linux", "virtualbox"):
        provider, clock = a_provider(profile=profile)
        provider.write_msr(0, SYSTEM_TIME_NEW, gpa | 1)
        assert provider.read_msr(0, SYSTEM_TIME_NEW) == gpa | 1
        assert [kind for kind, _ in clock.told] == (["refused"] if profile == "virtualbox" else [])  # Linux: placement
        clock.memory.add_slot(gpa, bytearray(4096))
        clock.refresh()
        served[profile] = page_of(clock, gpa).version
    assert served == {"linux": 2, "virtualbox": 0}
    provider, clock = a_provider(profile="document")
    with pytest.raises(MsrFault, match="no 32 bytes"):
        provider.write_msr(0, SYSTEM_TIME_NEW, gpa | 1)
    assert provider.read_msr(0, SYSTEM_TIME_NEW) == 0


@pytest.mark.row("V-16", "V-13")
def test_virtualbox_tells_of_enables_that_fail() -> None:
    """Each is told with its address, 20 at most; the MSR has the new value, and the old page is out of use."""
    provider, clock = a_provider(profile="virtualbox")
    provider.write_msr(0, SYSTEM_TIME_NEW, PAGE | 1)
    before = clock.memory.read(0, SIZE)
    provider.write_msr(0, SYSTEM_TIME_NEW, SIZE | 1)
    ((kind, why),) = clock.told
    assert (kind, f"{SIZE:#x}" in why, "vCPU 0" in why) == (EventKind.REFUSED, True, True)
    assert (provider.read_msr(0, SYSTEM_TIME), clock.page_at(0), clock.memory.read(0, SIZE)) == (SIZE | 1, None, before)
    for _ in range(30):
        provider.write_msr(1, SYSTEM_TIME_NEW, (SIZE - 8) | 1)  # 24 of 32 bytes are not there
    assert (len(clock.told), clock.page_at(1), clock.memory.read(0, SIZE)) == (20, None, before)


@pytest.mark.row("K-10", "V-14")
def test_a_page_across_two_pages() -> None:
    """Linux refuses the address and goes on with the old one; the others know no such rule."""
    places, versions = {}, {}
    for profile in PROFILES:
        provider, clock = a_provider(profile=profile)
        provider.write_msr(0, SYSTEM_TIME_NEW, PAGE | 1)
        provider.write_msr(0, SYSTEM_TIME_NEW, 0x3FF0 | 1)
        places[profile] = clock.page_at(0)
        versions[profile] = page_of(clock, 0x3FF0).version
    assert places == {"linux": PAGE, "document": 0x3FF0, "virtualbox": 0x3FF0}
    guarded = int.from_bytes(bytes([GUARD]) * 4)  # odd: it goes to the next odd version, and ends even
    assert versions == {"linux": guarded, "document": guarded + 3, "virtualbox": 4}


@pytest.mark.row("K-11", "K-10")
def test_a_time_page_has_32_bytes_to_be_in() -> None:
    """With 28 of them in memory it faults as documented, with 28 to the page's end Linux refuses it; the last 32 do."""
    provider, clock = a_provider(profile="document")
    with pytest.raises(MsrFault):
        provider.write_msr(0, SYSTEM_TIME_NEW, SIZE - 28 | 1)
    assert (provider.read_msr(0, SYSTEM_TIME_NEW), written(clock.memory)) == (0, [])
    provider, clock = a_provider()
    provider.write_msr(0, SYSTEM_TIME_NEW, 0x2FE4 | 1)
    assert (provider.read_msr(0, SYSTEM_TIME_NEW), written(clock.memory)) == (0x2FE5, [])
    for profile in PROFILES:
        provider, clock = a_provider(profile=profile)
        provider.write_msr(0, SYSTEM_TIME_NEW, SIZE - 32 | 1)
        assert page_of(clock, SIZE - 32).tsc_to_system_mul == 0xC5376ADD


# What a page says


@pytest.mark.row("V-17", "K-16")
@pytest.mark.parametrize(("features", "index"), [(1 << 3, SYSTEM_TIME_NEW), (1 << 0 | 1 << 24, SYSTEM_TIME)])
def test_virtualbox_says_stable_unasked(features: int, index: int) -> None:
    """VirtualBox sets the flag whether CPUID offers it or not (T7), and by the old number, too; the others do not."""
    flags = {}
    for profile in PROFILES:
        provider, clock = a_provider(features=features, profile=profile)
        provider.write_msr(0, index, PAGE | 1)
        flags[profile] = page_of(clock).flags & 1
    assert flags == {"linux": 0, "document": 0, "virtualbox": 1}


@pytest.mark.row("V-17", "K-17")
def test_whose_flags_it_has() -> None:
    """Of what is in guest memory VirtualBox takes nothing, whose flags are its own and STABLE; Linux GUEST_STOPPED."""
    flags = {}
    for profile in PROFILES:
        provider, clock = a_provider(profile=profile)
        clock.memory.write(PAGE, bytes(29) + b"\xff" * 3)
        provider.write_msr(0, SYSTEM_TIME_NEW, PAGE | 1)
        flags[profile] = clock.memory.read(PAGE + 29, 3)
    assert flags == {"linux": b"\3\0\0", "document": b"\3\0\0", "virtualbox": b"\1\0\0"}
    provider, clock = a_provider(profile="virtualbox")
    provider.load({**provider.save(), "time_page_flags": (0, 2)})
    provider.write_msr(1, SYSTEM_TIME_NEW, PAGE | 1)
    assert page_of(clock).flags == 3


@pytest.mark.row("V-20", "V-21", "K-08")
@pytest.mark.parametrize("step", golden.TIME_VERSIONS)
def test_whose_version_it_is(step: golden.VersionStep) -> None:
    """Linux goes on from guest memory; VirtualBox from a count of its own, 2 a registration (T9)."""
    for profile in PROFILES:
        provider, clock = a_provider(profile=profile)
        versions = []
        for _ in range(3):
            clock.memory.write(PAGE, step.old.to_bytes(4, "little"))
            provider.write_msr(0, SYSTEM_TIME_NEW, PAGE | 1)
            versions.append(page_of(clock).version)
        assert versions == ([2, 4, 6] if profile == "virtualbox" else [step.after] * 3)


@pytest.mark.row("V-21")
def test_virtualboxs_version_wraps() -> None:
    """It has 32 bits, and each vCPU has its own."""
    provider, clock = a_provider(profile="virtualbox")
    provider.load({**provider.save(), "time_page_version": (2**32 - 2, 2**31 - 4)})
    for vcpu, versions in ((0, [0, 2]), (1, [2**31 - 2, 2**31, 2**31 + 2])):
        for version in versions:
            provider.write_msr(vcpu, SYSTEM_TIME_NEW, PAGE + 64 * vcpu | 1)
            assert page_of(clock, PAGE + 64 * vcpu).version == version


@pytest.mark.row("V-12", "K-10", "K-12")
def test_one_vcpu_that_stops_its_page() -> None:
    """VirtualBox leaves all vCPUs' pages as they are then (T11); the others go on with the other vCPU's."""
    versions, places = {}, {}
    for profile in PROFILES:
        provider, clock = a_provider(profile=profile)
        clock.memory.write(PAGE, bytes(128))
        for vcpu, gpa in enumerate((PAGE, OTHER)):
            provider.write_msr(vcpu, SYSTEM_TIME_NEW, gpa | 1)
        provider.write_msr(0, SYSTEM_TIME_NEW, 0)
        before = page_of(clock, OTHER).version
        clock.refresh()
        versions[profile] = page_of(clock, OTHER).version - before
        places[profile] = (clock.page_at(0), clock.page_at(1))
        assert provider.read_msr(1, SYSTEM_TIME_NEW) == OTHER | 1
    assert versions == {"linux": 2, "document": 2, "virtualbox": 0}
    assert places == {"linux": (None, OTHER), "document": (None, OTHER), "virtualbox": (None, None)}


# The wall clock


@pytest.mark.row("V-26", "K-07")
def test_which_time_the_wall_clock_is() -> None:
    """VirtualBox writes the time of day at the write: a guest that adds its uptime is ahead by it (T3)."""
    shown = {}
    for profile in PROFILES:
        provider, clock = a_provider(profile=profile)
        provider.write_msr(0, WALL_CLOCK_NEW, 0x3000)
        shown[profile] = u32(clock.memory, 0x3004) * NS_PER_S + u32(clock.memory, 0x3008)
    boot = NOW.real_ns - UPTIME_NS
    assert shown == {"linux": boot, "document": boot, "virtualbox": NOW.real_ns}


@pytest.mark.row("V-26")
def test_virtualboxs_wall_clock_where_the_tsc_tells_no_time() -> None:
    """It needs UTC alone, so it is the time of the write there, too."""
    provider, clock = a_provider(clock=StubClock(paired=None), profile="virtualbox")
    provider.write_msr(0, WALL_CLOCK_NEW, 0x3000)
    assert u32(clock.memory, 0x3004) == NOW.real_ns // NS_PER_S


@pytest.mark.row("V-25")
def test_virtualbox_writes_the_wall_clock_with_all_vcpus_out() -> None:
    """Version, UTC and the 12 bytes are read and written in one rendezvous; Linux needs none."""
    asked = {}
    for profile in PROFILES:
        provider, clock = a_provider(profile=profile)
        at_write: list[list[int | None]] = []
        clock.memory.on_dirty = lambda *_: at_write.append(list(clock.inside))  # noqa: B023  # called within this turn
        provider.write_msr(1, WALL_CLOCK_NEW, 0x3000)
        asked[profile] = (clock.quiesced, at_write, clock.inside)
    assert asked == {"linux": ([], [[]], []), "document": ([], [[]], []), "virtualbox": ([1], [[1]], [])}


class WatchedMemory:
    """Guest memory of a clock that notes each write with those who are within its rendezvous."""

    def __init__(self, clock: StubClock) -> None:
        self._memory, self._clock = clock.memory, clock
        self.contains, self.read = clock.memory.contains, clock.memory.read
        self.notes: list[tuple[int, bytes, list[int | None]]] = []

    def write(self, gpa: int, data: bytes) -> None:
        """Note it, and do it."""
        self.notes.append((gpa, data, list(self._clock.inside)))
        self._memory.write(gpa, data)


@pytest.mark.row("V-25")
def test_virtualboxs_wall_clock_is_one_write_of_12_bytes() -> None:
    """Version, seconds and ns go into memory together, once, within the rendezvous, whichever vCPU asks."""
    for vcpu in range(2):
        provider, clock = a_provider(profile="virtualbox")
        clock.memory.write(0x3000, pack("<I", 7))
        memory = WatchedMemory(clock)
        clock.memory = memory  # type: ignore[assignment]  # of its shape
        provider.write_msr(vcpu, WALL_CLOCK_NEW, 0x3000)
        assert memory.notes == [(0x3000, pack("<III", 8, 1_700_000_007, 5), [vcpu])]
        assert (clock.quiesced, clock.inside) == ([vcpu], [])


@pytest.mark.row("V-44", "V-25")
def test_virtualbox_tells_of_each_wall_clock() -> None:
    """One line says seconds, ns and version, another what is wrong with an address; 20 of each at most."""
    provider, clock = a_provider(profile="virtualbox")
    clock.memory.write(0x3000, bytes(4))
    provider.write_msr(0, WALL_CLOCK_NEW, 0x3000)
    assert clock.told == [(EventKind.PAGE, "wall clock at 0x3000: sec 1700000007, nsec 5, version 2")]
    clock.told.clear()
    with pytest.raises(MsrFault):
        provider.write_msr(0, WALL_CLOCK, SIZE)
    ((kind, why),) = clock.told
    assert (kind, why.startswith("wall clock not written: WRMSR 0x11"), "no 12 bytes" in why) == ("refused", True, True)
    for _ in range(30):
        provider.write_msr(0, WALL_CLOCK_NEW, 0x3000)
    assert len(clock.told) == 1 + 19
    for profile in NOT_VIRTUALBOX:
        quiet, silent = a_provider(profile=profile)
        quiet.write_msr(0, WALL_CLOCK_NEW, 0x3000)
        assert silent.told == []


@pytest.mark.row("V-44", "V-15")
def test_virtualboxs_wall_clock_whose_memory_goes_meanwhile() -> None:
    """Memory that the VMM takes away before the version is read: #GP to the guest, a line, and the old value stays."""
    provider, clock = a_provider(profile="virtualbox")
    provider.write_msr(0, WALL_CLOCK_NEW, 0x3000)
    clock.told.clear()
    quiesce = clock.quiesce

    def quiesce_without_memory(vcpu: int | None) -> AbstractContextManager[None]:
        clock.memory.remove_slot(0)
        return quiesce(vcpu)

    clock.quiesce = quiesce_without_memory  # type: ignore[method-assign]  # the moment of the race
    with pytest.raises(MsrFault, match="is not in guest memory"):
        provider.write_msr(0, WALL_CLOCK_NEW, 0x4000)
    assert provider.read_msr(0, WALL_CLOCK_NEW) == 0x3000
    assert [kind for kind, _ in clock.told] == ["refused"]


@pytest.mark.row("V-09")
def test_virtualbox_tells_of_the_first_20_faults() -> None:
    """Accesses of the ranges' other MSRs are told with number and value, the first 20 of them; others never are."""
    provider, clock = a_provider(profile="virtualbox")
    for index in (0x4B564D02, 0x4B564D03, 0x4B564D04):
        before = len(clock.told)
        with pytest.raises(MsrFault):
            provider.read_msr(0, index)
        with pytest.raises(MsrFault):
            provider.write_msr(1, index, 0x5001)
        told = [(kind, f"{index:#x}" in why, "0x5001" in why) for kind, why in clock.told[before:]]
        assert told == [("refused", True, False), ("refused", True, True)]
    for _ in range(40):
        with pytest.raises(MsrFault):
            provider.read_msr(0, 0x4B564D03)
    assert len(clock.told) == 20
    quiet, silent = a_provider(features=0)
    with pytest.raises(MsrFault):
        quiet.read_msr(0, 0x4B564D03)
    with pytest.raises(MsrFault):
        provider.read_msr(0, 0x4B564DFF)
    assert (silent.told, len(clock.told)) == ([], 20)


@pytest.mark.row("V-09")
def test_refused_pages_and_wall_clocks_hide_no_fault() -> None:
    """After 20 refusals of either the guest's first access to the steal-time MSR is told all the same."""
    provider, clock = a_provider(profile="virtualbox")
    for _ in range(25):
        provider.write_msr(0, SYSTEM_TIME_NEW, SIZE | 1)
        with pytest.raises(MsrFault):
            provider.write_msr(0, WALL_CLOCK_NEW, SIZE)
    told = len(clock.told)
    with pytest.raises(MsrFault):
        provider.write_msr(0, 0x4B564D03, 0x7001)
    assert [(kind, "0x4b564d03" in why) for kind, why in clock.told[told:]] == [(EventKind.REFUSED, True)]


@pytest.mark.row("V-25", "K-08")
@pytest.mark.parametrize(("old", "linux"), golden.WALL_VERSIONS)
def test_wall_clock_versions(old: int, linux: int) -> None:
    """VirtualBox makes (v | 1) + 1 of the version, in one write of 12 bytes; Linux makes an odd one even first."""
    for profile in PROFILES:
        provider, clock = a_provider(profile=profile)
        clock.memory.write(0x3000, old.to_bytes(4, "little"))
        heard: list[tuple[int, int]] = []
        clock.memory.on_dirty = lambda *extent: heard.append(extent)  # noqa: B023  # called within this turn
        provider.write_msr(0, WALL_CLOCK_NEW, 0x3000)
        assert u32(clock.memory, 0x3000) == (((old | 1) + 1) % 2**32 if profile == "virtualbox" else linux)
        assert heard == [(0x3000, 12)]


@pytest.mark.row("V-15", "K-03")
@pytest.mark.parametrize("gpa", [0x3001, 0x3002, SIZE, SIZE - 8, 2**64 - 4])
def test_a_wall_clock_in_a_bad_place(gpa: int) -> None:
    """Misaligned or without memory it faults as documented and in VirtualBox, old value kept; Linux writes or not."""
    for profile in ("document", "virtualbox"):
        provider, clock = a_provider(profile=profile)
        provider.write_msr(0, WALL_CLOCK_NEW, 0x3000)
        with pytest.raises(MsrFault, match=r"aligned|no 12 bytes"):
            provider.write_msr(0, WALL_CLOCK, gpa)
        assert provider.read_msr(0, WALL_CLOCK_NEW) == 0x3000
        assert written(clock.memory) == [0x3000]
    provider, clock = a_provider()
    provider.write_msr(0, WALL_CLOCK_NEW, gpa)
    assert provider.read_msr(0, WALL_CLOCK) == gpa
    assert written(clock.memory) == ([gpa] if gpa < SIZE - 12 else [])


@pytest.mark.row("K-03", "V-15")
def test_a_wall_clock_at_0() -> None:
    """To Linux 0 is no address; VirtualBox writes there."""
    for profile, expected in (("linux", []), ("virtualbox", [0])):
        provider, clock = a_provider(profile=profile)
        clock.memory.write(0, bytes([GUARD]) * 12)
        provider.write_msr(0, WALL_CLOCK_NEW, 0)
        assert written(clock.memory) == expected


# What is offered


@pytest.mark.row("V-01", "V-02", "V-03")
def test_virtualboxs_guest_finds_its_hypervisor() -> None:
    """CPUID has bit 31 of leaf 1 beside what else is there, KVM's name, and a leaf with nothing but features."""
    clock = GuestClock(GuestMemory(), backend=SimulatedBackend(10**9), profile="virtualbox")
    for subleaf in (0, 1):  # leaf 1 has none: ECX may be anything
        assert clock.patch_cpuid(1, subleaf, CpuidLeaf(1, 2, 4, 8)) == (1, 2, 1 << 31 | 4, 8)
        assert clock.patch_cpuid(2, subleaf, CpuidLeaf()).ecx == 0
    name = [int.from_bytes(part, "little") for part in (b"KVMK", b"VMKV", b"M\0\0\0")]
    assert dict(clock.cpuid_leaves) == {
        0x40000000: (0x40000001, *name),
        0x40000001: (1 << 0 | 1 << 3 | 1 << 24, 0, 0, 0),
    }


@pytest.mark.row("V-03", "V-04", "V-05")
def test_virtualbox_offers_four_features() -> None:
    """The clock by both numbers, kicks and STABLE; its steal-time, page-fault and EOI MSRs fault."""
    provider, _ = a_provider(clock=StubClock(vmm=NotedVmm()), profile="virtualbox")
    leaf = provider.cpuid_leaves[0x40000001]
    assert tuple(leaf) == (1 << 0 | 1 << 3 | 1 << 7 | 1 << 24, 0, 0, 0)
    for index in range(0x4B564D02, 0x4B564D09):
        loose, _ = a_provider(profile="virtualbox", enforce_cpuid=False)
        for each in (provider, loose):
            with pytest.raises(MsrFault):
                each.read_msr(0, index)
            with pytest.raises(MsrFault):
                each.write_msr(0, index, 0)
    for bit in (1, 2, 4, 5, 6):
        with pytest.raises(ValueError, match="cannot be served"):
            a_provider(profile="virtualbox", features=1 << bit)


@pytest.mark.row("V-06", "K-01")
def test_virtualboxs_msr_ranges() -> None:
    """Of 0x11 to 0x12 and 0x4b564d00 to 04 the clock's four numbers are served; everything beside them faults."""
    provider, _ = a_provider(profile="virtualbox")
    for index in (WALL_CLOCK, SYSTEM_TIME, WALL_CLOCK_NEW, SYSTEM_TIME_NEW):
        provider.write_msr(1, index, 0x3000)
        assert provider.read_msr(1, index) == 0x3000
        provider.reset()
    for index in (0x10, 0x13, *range(0x4B564D02, 0x4B564E00), 0x4B564CFF):
        with pytest.raises(MsrFault):
            provider.read_msr(0, index)
        with pytest.raises(MsrFault):
            provider.write_msr(0, index, 0)


@pytest.mark.row("V-06")
def test_virtualboxs_msr_ranges_come_to_the_clock() -> None:
    """Accesses to 0x11 to 0x12 and 0x4b564d00 to 04 exit on KVM; the other profiles leave PV EOI to the kernel."""
    for profile in PROFILES:
        ranges = GuestClock(GuestMemory(), backend=SimulatedBackend(10**9), profile=profile).msr_ranges
        for index in (WALL_CLOCK, SYSTEM_TIME, *range(WALL_CLOCK_NEW, 0x4B564D05)):
            at = [each for each in ranges if each.base <= index < each.base + each.length]
            is_kept = index == 0x4B564D04 and profile != "virtualbox"
            assert [(each.reads, each.writes, index in each.kept) for each in at] == [(True, True, is_kept)]


@pytest.mark.row("V-04", "X-02")
def test_virtualbox_offers_kicks_only_where_they_are_served() -> None:
    """Without a VMM that kicks, PV_UNHALT would be a promise that nobody keeps."""
    assert a_provider(profile="virtualbox")[0].cpuid_leaves[0x40000001].eax == 1 << 0 | 1 << 3 | 1 << 24


@pytest.mark.row("V-04")
def test_virtualbox_offers_stable_by_its_host() -> None:
    """Bit 24 is left out where the host's TSC tells no time; the others offer it, and let the page's flag say no."""
    offered = {}
    for profile in PROFILES:
        provider, _ = a_provider(clock=StubClock(paired=None), profile=profile)
        offered[profile] = provider.cpuid_leaves[0x40000001].eax >> 24
    assert offered == {"linux": 1, "document": 1, "virtualbox": 0}


@pytest.mark.row("V-04")
@pytest.mark.parametrize("paired", [NOW, None])
def test_virtualbox_decides_on_stable_once(paired: Pairing | None) -> None:
    """What its guest was offered at first it is offered for life, whatever becomes of the host's TSC."""
    provider, clock = a_provider(clock=StubClock(paired=paired), profile="virtualbox")
    clock.paired = None if paired else NOW
    assert provider.cpuid_leaves[0x40000001].eax >> 24 == (paired is not None)
    assert provider.save_unit()[-1] == (paired is not None)  # the feature word's last byte


@pytest.mark.row("K-09")
@pytest.mark.parametrize("profile", NOT_VIRTUALBOX)
def test_the_others_offer_alike(profile: str) -> None:
    """The documents describe what Linux offers."""
    assert a_provider(profile=profile)[0].features == a_provider()[0].features
