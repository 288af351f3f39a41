"""The KVM provider's MSRs and CPUID, as Linux serves them: addresses, versions, flags, faults."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock import ConfigError, CpuidLeaf, GuestClock, GuestMemory, KvmFeature, MsrFault, RangeError, SimulatedBackend
from pvclock.clock.guest_side import usual_msr_ranges
from tests import golden, oracle
from tests.unit.stub_clock import GUARD, SIZE, guards_gone
from tests.unit.test_provider_conformance import MsrWrite, allowed_places

WALL_CLOCK, SYSTEM_TIME, WALL_CLOCK_NEW, SYSTEM_TIME_NEW = 0x11, 0x12, 0x4B564D00, 0x4B564D01
NS_PER_S = 10**9
HZ = 2_596_132_000
GUARDED_VERSION = 0xA5A5A5A5 + 2  # odd junk: a publish skips to the next odd version and ends even


def a_clock(vcpus: int = 2, realtime_ns: int = 0, **options: object) -> tuple[GuestClock, SimulatedBackend]:
    """A clock over memory full of guard bytes, and its backend."""
    backend = SimulatedBackend(HZ, realtime_ns=realtime_ns)
    memory = GuestMemory(bytearray([GUARD]) * SIZE)
    return GuestClock(memory, vcpus, backend=backend, **options), backend  # type: ignore[arg-type]


def written(clock: GuestClock) -> list[int]:
    """Where guard bytes are gone: the first address of each place, places 32 bytes or more apart."""
    gone = guards_gone(clock.memory)
    return [at for i, at in enumerate(gone) if i == 0 or at - gone[i - 1] >= 32]


def u32(clock: GuestClock, gpa: int) -> int:
    """A little-endian word of guest memory."""
    return int.from_bytes(clock.memory.read(gpa, 4), "little")


@pytest.mark.row("K-01", "K-33", "K-38", "V-01", "V-02", "V-03")
def test_cpuid_has_signature_and_features() -> None:
    """Leaf 0x40000000 is "KVMKVMKVM" with the highest leaf, 0x40000001 the features; other leaves are not ours."""
    clock, _ = a_clock(timing_leaf=False)
    signature = clock.cpuid(0x40000000)
    assert signature is not None
    assert signature.eax == 0x40000001
    name = b"".join(register.to_bytes(4, "little") for register in signature[1:])
    assert name == b"KVMKVMKVM\0\0\0"
    assert clock.cpuid(0x40000001, 0) == CpuidLeaf(eax=1 << 0 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 24)
    assert clock.cpuid(0x40000002) is None
    assert clock.cpuid(1) is None
    assert clock.patch_cpuid(1, 0, CpuidLeaf()).ecx == 1 << 31


@pytest.mark.row("K-09")
def test_invariant_tsc_is_hidden_unless_asked_for() -> None:
    """A guest that sees an invariant TSC prefers it to any clock of ours, so it does not see it."""
    whole = CpuidLeaf(edx=0xFFFFFFFF)
    assert a_clock()[0].patch_cpuid(0x80000007, 0, whole).edx == 0xFFFFFEFF
    assert a_clock(offer_invariant_tsc=True)[0].patch_cpuid(0x80000007, 0, whole).edx == 0xFFFFFFFF


@pytest.mark.row("K-09", "K-19", "K-20")
@pytest.mark.parametrize(
    ("features", "served"),
    [
        (KvmFeature.CLOCKSOURCE, {WALL_CLOCK, SYSTEM_TIME}),
        (KvmFeature.CLOCKSOURCE2, {WALL_CLOCK_NEW, SYSTEM_TIME_NEW}),
        (KvmFeature.NOP_IO_DELAY, set()),
    ],
)
def test_features_gate_msrs(features: KvmFeature, served: set[int]) -> None:
    """An MSR whose feature CPUID does not offer faults, read and written; without enforcement it works."""
    every = {WALL_CLOCK, SYSTEM_TIME, WALL_CLOCK_NEW, SYSTEM_TIME_NEW}
    strict, _ = a_clock(features=features)
    loose, _ = a_clock(features=features, enforce_cpuid=False)
    for index in every:
        loose.write_msr(0, index, 0)
        assert loose.read_msr(0, index) == 0
        if index in served:
            strict.write_msr(0, index, 0)
            assert strict.read_msr(0, index) == 0
        else:
            with pytest.raises(MsrFault):
                strict.write_msr(0, index, 0)
            with pytest.raises(MsrFault):
                strict.read_msr(0, index)


@pytest.mark.row("K-09")
def test_bit_3_says_that_the_new_msrs_are_there() -> None:
    """EAX of the feature leaf has bit 3 unless it is left out; a clock page comes with it, and #GP without it."""
    clock, _ = a_clock()
    assert clock.cpuid_leaves[0x40000001].eax >> 3 & 1 == 1
    clock, _ = a_clock(features=1 << 3)
    assert clock.cpuid(0x40000001) == CpuidLeaf(eax=1 << 3)
    for index, value in ((WALL_CLOCK_NEW, 0x3000), (SYSTEM_TIME_NEW, 0x2001)):
        clock.write_msr(0, index, value)
    assert written(clock) == [0x2000, 0x3000]
    clock, _ = a_clock(features=1 << 0)
    assert clock.cpuid(0x40000001) == CpuidLeaf(eax=1 << 0)
    for index, value in ((WALL_CLOCK_NEW, 0x3000), (SYSTEM_TIME_NEW, 0x2001)):
        with pytest.raises(MsrFault):
            clock.write_msr(0, index, value)
    assert written(clock) == []


@pytest.mark.row("X-02", "K-34")
def test_only_what_can_be_served_is_offered() -> None:
    """Features that neither the engine nor the kernel serves are refused when the clock is made."""
    for feature in (1 << 2, 1 << 8, 1 << 15, 1 << 30, KvmFeature.PV_UNHALT):
        with pytest.raises(ConfigError, match="cannot be served"):
            a_clock(features=int(feature))
    backend = SimulatedBackend(10**9)
    backend.kernel_features = {"KVM": KvmFeature.PV_UNHALT}
    clock = GuestClock(GuestMemory(), backend=backend, features=KvmFeature.PV_UNHALT | KvmFeature.CLOCKSOURCE2)
    assert clock.cpuid(0x40000001) == CpuidLeaf(eax=1 << 7 | 1 << 3)


@pytest.mark.row("K-02", "K-04", "K-07")
def test_the_wall_clock_is_the_time_of_day_of_guest_time_zero() -> None:
    """The record holds UTC at boot, so that adding the guest's own time gives the time of day, to the ns."""
    clock, backend = a_clock(realtime_ns=1_700_000_000 * NS_PER_S + 5)
    backend.advance(ns=7 * NS_PER_S)
    clock.write_msr(0, WALL_CLOCK_NEW, 0x3000)
    assert (u32(clock, 0x3004), u32(clock, 0x3008)) == (1_700_000_000, 5)
    assert written(clock) == [0x3000]


@pytest.mark.row("V-45", "V-19")
@pytest.mark.parametrize("profile", ["linux", "virtualbox"])
def test_what_is_told_of_a_page_is_what_is_in_it(profile: str) -> None:
    """The line of a registration has address, final even version, TSC, ns, mul, shift, flags and a guest's kHz."""
    clock, backend = a_clock(profile=profile)
    backend.advance(ns=7 * NS_PER_S)
    since = clock.events.last
    clock.write_msr(1, SYSTEM_TIME_NEW, 0x3001)
    page = oracle.TimeInfo.parse(clock.memory.read(0x3000, 32))
    assert (page.version % 2, page.tsc_to_system_mul, page.tsc_shift, page.flags) == (0, 0xC5376ADD, -1, 1)
    (told,) = clock.events.read(since=since).events
    assert told.kind == "page"
    assert told.why == (
        f"vCPU 1: page at 0x3000, version {page.version}, TSC {page.tsc_timestamp}, {page.system_time} ns, "
        f"mul 0xc5376add, shift -1, flags 0x1, which shows a TSC of 2596132 kHz"
    )


@pytest.mark.row("K-05", "K-06")
def test_the_wall_clock_is_written_once_for_all() -> None:
    """Any vCPU may write the MSR, all read it back, and the record changes at the next write only."""
    clock, backend = a_clock(realtime_ns=10**18)
    clock.write_msr(1, WALL_CLOCK_NEW, 0x3000)
    assert clock.read_msr(0, WALL_CLOCK_NEW) == clock.read_msr(1, WALL_CLOCK) == 0x3000
    assert (u32(clock, 0x3004), u32(clock, 0x3008)) == (10**9, 0)
    before = clock.memory.read(0x3000, 12)
    backend.realtime_ns += 3600 * NS_PER_S
    clock.refresh()
    assert clock.memory.read(0x3000, 12) == before
    clock.write_msr(0, WALL_CLOCK, 0x3000)
    assert u32(clock, 0x3004) == 10**9 + 3600


@pytest.mark.row("K-03")
@pytest.mark.parametrize("gpa", [0x3001, 0x3002, 0x2FFA, SIZE - 12])
def test_the_wall_clock_may_be_anywhere_in_memory(gpa: int) -> None:
    """Odd addresses and page crossings are written, as in Linux, which masks and checks nothing here."""
    clock, _ = a_clock(realtime_ns=10**18)
    clock.memory.write(gpa, bytes(4))
    clock.write_msr(0, WALL_CLOCK_NEW, gpa)
    assert (u32(clock, gpa), u32(clock, gpa + 4)) == (2, 10**9)
    assert written(clock) == [gpa]


@pytest.mark.row("K-03")
@pytest.mark.parametrize("gpa", [0, SIZE, SIZE - 11, 2**64 - 8, 2**64 - 1])
def test_a_wall_clock_that_is_not_in_memory_is_ignored(gpa: int) -> None:
    """An address without memory, or 0, writes nothing and does not fault; it reads back all the same."""
    clock, _ = a_clock()
    clock.write_msr(0, WALL_CLOCK_NEW, gpa)
    assert clock.read_msr(0, WALL_CLOCK_NEW) == gpa
    assert written(clock) == []


@pytest.mark.row("K-08")
@pytest.mark.parametrize(("old", "new"), golden.WALL_VERSIONS)
def test_wall_clock_versions(old: int, new: int) -> None:
    """The record's version goes on from what the guest's memory holds, by Linux's rule."""
    clock, _ = a_clock()
    clock.memory.write(0x3000, old.to_bytes(4, "little"))
    clock.write_msr(0, WALL_CLOCK_NEW, 0x3000)
    assert u32(clock, 0x3000) == new


@pytest.mark.row("K-08")
@pytest.mark.parametrize("step", golden.TIME_VERSIONS)
@pytest.mark.parametrize("gpa", [0x2000, 0x2002, 0x2004, 0x2FE0])
def test_time_page_versions(step: golden.VersionStep, gpa: int) -> None:
    """A page's version goes on from what the guest's memory holds: odd while written, then even."""
    clock, _ = a_clock()
    clock.memory.write(gpa, step.old.to_bytes(4, "little"))
    clock.write_msr(0, SYSTEM_TIME_NEW, gpa | 1)
    assert u32(clock, gpa) == step.after
    clock.refresh()
    assert u32(clock, gpa) == (step.after + 2) % 2**32


@pytest.mark.row("K-11")
def test_a_page_is_32_bytes_and_no_more() -> None:
    """A publish writes the structure, pads cleared, and not a byte beside it."""
    clock, _ = a_clock()
    clock.write_msr(0, SYSTEM_TIME_NEW, 0x2000 | 1)
    page = clock.memory.read(0x2000, 32)
    assert written(clock) == [0x2000]
    assert clock.memory.read(0x2020, 1) == bytes([GUARD])
    assert (page[4:8], page[30:32]) == (bytes(4), bytes(2))
    assert page[24:28] == (0xC5376ADD).to_bytes(4, "little")
    assert (page[28], page[29]) == (0xFF, 1)


@pytest.mark.row("K-11")
def test_every_field_of_a_page_is_in_its_place() -> None:
    """By offset: version, pad, TSC and ns of 64 bits each, mul, a signed shift, flags, pads, on a host long awake."""
    backend = SimulatedBackend(HZ, tsc=2**63 + 5)
    clock = GuestClock(GuestMemory(bytearray([GUARD]) * SIZE), backend=backend)
    backend.advance(ns=3 * 86_400 * NS_PER_S)
    clock.write_msr(0, SYSTEM_TIME_NEW, 0x2001)
    page = clock.memory.read(0x2000, 32)
    version, pad, tsc, ns, mul, shift, flags, pads = struct.unpack("<IIQQIbBH", page)
    assert (version, pad, mul, shift, flags, pads) == (GUARDED_VERSION + 1, 0, 0xC5376ADD, -1, 1, 0)
    assert 2**63 + 5 < tsc < backend.tsc
    elapsed = backend.tsc - tsc
    assert abs(ns + elapsed * NS_PER_S // HZ - 3 * 86_400 * NS_PER_S) <= 2


@pytest.mark.row("K-17", "K-16")
@pytest.mark.parametrize(("before", "after"), [(0, 1), (0xFF, 3), (2, 3), (0x80, 1)])
def test_flags_keep_guest_stopped_and_nothing_else(before: int, after: int) -> None:
    """Of what the guest's flags byte holds at registration only GUEST_STOPPED stays; the rest is the host's."""
    clock, _ = a_clock()
    clock.memory.write(0x2000, bytes(29) + bytes([before]) + bytes(2))
    clock.write_msr(0, SYSTEM_TIME_NEW, 0x2001)
    page = clock.page(0)
    assert page is not None
    assert page.flags == after


@pytest.mark.row("K-12")
def test_each_vcpu_has_a_page_and_an_msr_of_its_own() -> None:
    """Two vCPUs with two addresses and two TSCs: a tick brings both pages up to date, and no guest did anything."""
    clock, backend = a_clock()
    clock.write_msr(1, 0x3B, 5 * HZ)
    for vcpu, gpa in enumerate((0x2000, 0x3000)):
        clock.write_msr(vcpu, SYSTEM_TIME_NEW, gpa | 1)
    assert [clock.read_msr(vcpu, SYSTEM_TIME_NEW) for vcpu in range(2)] == [0x2001, 0x3001]
    assert written(clock) == [0x2000, 0x3000]
    before = [u32(clock, gpa) for gpa in (0x2000, 0x3000)]
    backend.advance(ns=100 * NS_PER_S)
    clock.tick()
    for vcpu, gpa in enumerate((0x2000, 0x3000)):
        page = oracle.TimeInfo.parse(clock.memory.read(gpa, 32))
        assert page.version == before[vcpu] + 2
        assert abs(page.read(backend.tsc + vcpu * 5 * HZ) - 100 * NS_PER_S) <= 2
        assert page.system_time > 90 * NS_PER_S


@pytest.mark.row("K-11", "K-17", "K-12")
def test_a_running_guests_flags_are_its_own() -> None:
    """A refresh, under a running guest, leaves the flags byte and the pads alone."""
    clock, _ = a_clock()
    clock.write_msr(0, SYSTEM_TIME_NEW, 0x2001)
    clock.memory.write(0x201D, b"\x42\x43\x44")
    clock.memory.write(0x2004, b"\x45\x46\x47\x48")
    clock.refresh()
    assert clock.memory.read(0x201D, 3) == b"\x42\x43\x44"
    assert clock.memory.read(0x2004, 4) == b"\x45\x46\x47\x48"


@pytest.mark.row("K-16", "K-17")
@pytest.mark.parametrize("features", [KvmFeature.CLOCKSOURCE2, KvmFeature.CLOCKSOURCE2 | KvmFeature.CLOCKSOURCE_STABLE])
def test_a_pause_is_told_to_each_vcpu_until_it_has_seen_it(features: KvmFeature) -> None:
    """GUEST_STOPPED needs no CPUID bit; each vCPU clears its own, and no later write of the flags brings it back."""
    clock, _ = a_clock(features=features)
    stable = int(bool(features & KvmFeature.CLOCKSOURCE_STABLE))
    for vcpu in range(2):
        clock.write_msr(vcpu, SYSTEM_TIME_NEW, 0x2000 + 64 * vcpu | 1)

    def flags() -> list[int]:
        return [clock.memory.read(0x2000 + 64 * vcpu + 29, 1)[0] for vcpu in range(2)]

    clock.memory.write(0x201D, bytes([stable]))
    clock.memory.write(0x205D, bytes([stable]))
    clock.pause()
    clock.resume()
    assert flags() == [stable | 2, stable | 2]
    clock.memory.write(0x201D, bytes([stable]))  # vCPU 0 has seen it
    clock.refresh()
    for vcpu in range(2):
        clock.write_msr(vcpu, SYSTEM_TIME_NEW, 0x2000 + 64 * vcpu | 1)  # its flags are written
    assert flags() == [stable, stable | 2]
    clock.pause()
    clock.resume(guest_stopped=False)
    assert flags() == [stable, stable | 2]


@pytest.mark.row("K-16")
def test_stable_is_only_said_where_it_is_offered_and_true() -> None:
    """TSC_STABLE needs CPUID bit 24 and a host whose TSCs are in step."""
    offered = KvmFeature.CLOCKSOURCE2 | KvmFeature.CLOCKSOURCE_STABLE
    for features, tsc_stable, flags in ((offered, True, 1), (offered, False, 0), (KvmFeature.CLOCKSOURCE2, True, 0)):
        backend = SimulatedBackend(10**9, tsc_stable=tsc_stable)
        clock = GuestClock(GuestMemory(bytearray(SIZE)), backend=backend, features=features)
        clock.write_msr(0, SYSTEM_TIME_NEW, 0x2001)
        page = clock.page(0)
        assert page is not None
        assert page.flags == flags


@pytest.mark.row("K-16")
def test_a_host_that_loses_its_tsc_loses_stable() -> None:
    """When the host's TSCs are no longer in step, the next refresh takes STABLE from every page."""
    clock, backend = a_clock()
    for vcpu in range(2):
        clock.write_msr(vcpu, SYSTEM_TIME_NEW, 0x2000 + 64 * vcpu | 1)
    backend.tsc_stable = False
    clock.refresh()
    assert [page.flags for vcpu in range(2) if (page := clock.page(vcpu))] == [0, 0]


@pytest.mark.row("K-19", "K-16")
def test_old_msrs_share_the_new_ones_values_and_cost_stable() -> None:
    """0x12 reads and writes what the new number does; the boot vCPU on it, not the other, costs all pages STABLE."""
    clock, _ = a_clock()
    clock.write_msr(1, SYSTEM_TIME_NEW, 0x3001)
    accesses = (
        (0, SYSTEM_TIME, 0x2001, [0, 0]),
        (1, SYSTEM_TIME_NEW, 0x3001, [0, 0]),
        (1, SYSTEM_TIME, 0x3001, [0, 0]),
        (0, SYSTEM_TIME_NEW, 0x2001, [1, 1]),
        (1, SYSTEM_TIME, 0x3001, [1, 1]),
    )
    for vcpu, index, value, flags in accesses:
        clock.write_msr(vcpu, index, value)
        assert clock.read_msr(vcpu, SYSTEM_TIME_NEW) == clock.read_msr(vcpu, SYSTEM_TIME) == value
        assert [clock.memory.read(gpa + 29, 1)[0] for gpa in (0x2000, 0x3000)] == flags


@pytest.mark.row("K-19")
def test_an_old_number_gives_the_same_page() -> None:
    """At one instant both numbers publish the same 32 bytes but for STABLE."""
    pages = []
    for index in (SYSTEM_TIME, SYSTEM_TIME_NEW):
        clock, backend = a_clock()
        backend.advance(ns=7 * NS_PER_S)
        clock.write_msr(0, index, 0x2001)
        pages.append(clock.memory.read(0x2000, 32))
        assert written(clock) == [0x2000]
    old, new = pages
    assert (old[:29], old[30:]) == (new[:29], new[30:])
    assert (old[29], new[29]) == (0, 1)


@pytest.mark.row("K-19")
def test_the_old_wall_clock_is_the_new_one() -> None:
    """0x11 writes the record that 0x4b564d00 writes, and each reads back what was written by the other."""
    clock, _ = a_clock(realtime_ns=1_700_000_000 * NS_PER_S + 5)
    for index, gpa in ((WALL_CLOCK, 0x3000), (WALL_CLOCK_NEW, 0x4000), (WALL_CLOCK, 0x5000)):
        clock.memory.write(gpa, bytes(4))
        clock.write_msr(0, index, gpa)
        assert clock.read_msr(1, WALL_CLOCK) == clock.read_msr(1, WALL_CLOCK_NEW) == gpa
        assert (u32(clock, gpa), u32(clock, gpa + 4), u32(clock, gpa + 8)) == (2, 1_700_000_000, 5)


@pytest.mark.row("K-10")
def test_bit_0_clear_stops_updates_of_that_vcpu_alone() -> None:
    """Disabled, a page stays as it is and the MSR reads back; the other vCPU's page goes on (T11)."""
    clock, _ = a_clock()
    for vcpu in range(2):
        clock.write_msr(vcpu, SYSTEM_TIME_NEW, 0x2000 + 64 * vcpu | 1)
    clock.write_msr(0, SYSTEM_TIME_NEW, 0x2000)
    before = clock.memory.read(0x2000, 32)
    version = u32(clock, 0x2040)
    clock.refresh()
    assert clock.memory.read(0x2000, 32) == before
    assert u32(clock, 0x2040) == version + 2
    assert (clock.read_msr(0, SYSTEM_TIME_NEW), clock.page(0)) == (0x2000, None)


@pytest.mark.row("K-10")
def test_a_page_crossing_address_leaves_the_old_page_in_use() -> None:
    """Linux refuses the new address before it drops the old one: the old page is updated on, the MSR shows the new."""
    clock, _ = a_clock()
    clock.write_msr(0, SYSTEM_TIME_NEW, 0x2FE1)
    clock.write_msr(0, SYSTEM_TIME_NEW, 0x3FE3)
    assert u32(clock, 0x2FE0) == GUARDED_VERSION + 1 + 2
    assert clock.read_msr(0, SYSTEM_TIME_NEW) == 0x3FE3
    assert written(clock) == [0x2FE0]


@pytest.mark.row("K-10")
@pytest.mark.parametrize("value", [SIZE | 1, (SIZE - 16) | 1, 2**64 - 1, (2**64 - 8) | 1, 0x3FE3, 0x4001 - 0x1E])
def test_a_bad_address_writes_nothing_and_does_not_fault(value: int) -> None:
    """Without memory, across pages or wrapping: no write, no fault, and the MSR reads back."""
    clock, _ = a_clock()
    clock.write_msr(0, SYSTEM_TIME_NEW, value)
    clock.refresh()
    assert written(clock) == []
    assert clock.read_msr(0, SYSTEM_TIME_NEW) == value


@pytest.mark.row("K-01")
def test_which_msrs_come_to_the_clock_beside_a_kernel() -> None:
    """KVM's block, but for two that only the kernel can serve, the old pair, the TSC's and Hyper-V's; and no other."""
    clock, _ = a_clock()
    claimed = [index for each in clock.msr_ranges for index in range(each.base, each.base + each.length)]
    assert sorted(claimed) == [0x10, 0x11, 0x12, 0x3B, *range(0x40000000, 0x40000200), *range(0x4B564D00, 0x4B564E00)]
    assert [index for each in clock.msr_ranges for index in each.kept] == [0x4B564D04, 0x4B564D05]


@pytest.mark.row("K-01")
@pytest.mark.parametrize("provider", ["KVM", "HyperV", "HyperV+KVM", "Minimal", "None"])
def test_which_msrs_come_to_a_clock_is_known_before_it_is_made(provider: str) -> None:
    """Every provider's are the same ones, in the same order, unless an option changes them: profile "virtualbox"."""
    clock, _ = a_clock(provider=provider)
    assert clock.msr_ranges == usual_msr_ranges()
    if provider == "KVM":
        other, _ = a_clock(profile="virtualbox")
        assert [index for each in other.msr_ranges for index in each.kept] == []


@pytest.mark.row("K-01", "G-09")
@pytest.mark.parametrize("index", [0, 0x1B, 0x4B564D02, 0x4B564D04, 0x4B564D08, 0x4B564DFF, 0x4B564E00, 0x40000000])
def test_msrs_that_are_not_the_clocks_fault(index: int) -> None:
    """Any other MSR raises MsrFault with its number, read or written."""
    clock, _ = a_clock()
    with pytest.raises(MsrFault) as caught:
        clock.read_msr(0, index)
    assert (caught.value.index, caught.value.value) == (index, None)
    with pytest.raises(MsrFault) as caught:
        clock.write_msr(0, index, 5)
    assert (caught.value.index, caught.value.value) == (index, 5)


@pytest.mark.row("G-09", "E9")
def test_random_traffic_faults_or_is_served() -> None:
    """10^5 random accesses raise nothing but MsrFault and write nothing outside the registered records."""
    served = 1 << 0 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 10 | 1 << 12 | 1 << 14 | 1 << 17
    clock, backend = a_clock(vcpus=3, realtime_ns=10**18, features=served)
    source = random.Random(1)  # noqa: S311  # a sample, no secret
    indices = [0x10, 0x3B, WALL_CLOCK, SYSTEM_TIME, *range(WALL_CLOCK_NEW, WALL_CLOCK_NEW + 10), 0x1B]
    pool = [source.getrandbits(21) for _ in range(2000)]
    allowed, served_writes = bytearray(SIZE), 0
    for _ in range(100_000):
        index = source.choice(indices) if source.random() < 0.9 else source.getrandbits(32)
        value = source.choice([source.getrandbits(64), source.choice(pool), source.choice(pool) | 1])
        try:
            clock.write_msr(source.randrange(3), index, value)
            served_writes += 1
            for places in allowed_places(MsrWrite(0, index, value)):
                allowed[places.start : places.stop] = b"\1" * len(range(SIZE)[places.start : places.stop])
            clock.read_msr(source.randrange(3), index)
        except MsrFault:
            continue
        finally:
            backend.advance(ns=source.randrange(1000))
    assert not [at for at in guards_gone(clock.memory) if not allowed[at]]
    assert written(clock)
    assert sum(allowed) < SIZE // 4
    assert served_writes > 10_000


@pytest.mark.row("G-09")
@given(value=st.integers().filter(lambda value: not 0 <= value < 2**64))
def test_a_value_beyond_64_bits_is_the_callers_mistake(value: int) -> None:
    """No guest can write it, so it is a RangeError for the VMM, not a fault for the guest."""
    clock, _ = a_clock()
    with pytest.raises(RangeError):
        clock.write_msr(0, SYSTEM_TIME_NEW, value)
    with pytest.raises(RangeError):
        clock.write_msr(9, SYSTEM_TIME_NEW, 0)


@pytest.mark.row("E13")
def test_an_unknown_provider_or_option_is_named() -> None:
    """The names of providers are case-sensitive; a wrong one, or an unknown option, says what is legal."""
    for provider in ("kvm", "Xen", ""):
        with pytest.raises(ConfigError, match="choose from 'None', 'Minimal', 'HyperV', 'KVM'"):
            a_clock(provider=provider)
    with pytest.raises(ConfigError, match="colour"):
        a_clock(colour="red")


@pytest.mark.row("G-09")
def test_without_a_provider_a_guest_sees_nothing() -> None:
    """The None provider has no leaf and no MSR but the TSC's, and hides the hypervisor."""
    clock, _ = a_clock(provider="None")
    assert clock.cpuid(0x40000000) is None
    assert clock.patch_cpuid(1, 0, CpuidLeaf(ecx=0xFFFFFFFF)).ecx == 0x7FFFFFFF
    with pytest.raises(MsrFault):
        clock.write_msr(0, SYSTEM_TIME_NEW, 0x2001)
    with pytest.raises(MsrFault):
        clock.read_msr(0, SYSTEM_TIME_NEW)
    clock.write_msr(0, 0x10, 5)
    assert clock.read_msr(0, 0x10) == 5
