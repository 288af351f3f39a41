"""Profile "virtualbox": each vCPU's page has a line of its own, written at a registration and at a load only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from struct import Struct, pack

import pytest

from pvclock import (
    ClockLine,
    ClockScale,
    GuestClock,
    GuestMemory,
    GuestNs,
    GuestTsc,
    HostTsc,
    RangeError,
    SimulatedBackend,
)
from pvclock._core import TimePages, read_time_info
from pvclock._counter import SimulatedCounter
from pvclock.meter.stress import republish
from pvclock.providers.kvm import virtualbox_unit
from pvclock.timekeeping.events import EventKind
from tests import oracle
from tests.unit.test_saved_unit import FEATURES, SIZE, a_clock, a_virtualbox_unit, changed

SYSTEM_TIME, WALL_CLOCK, TSC = 0x4B564D01, 0x4B564D00, 0x10
GUEST_TSC = 1_015_000_000_007
NS_PER_S = 10**9


def time_info(clock: GuestClock, gpa: int = 0x2000) -> oracle.TimeInfo:
    """The time page at `gpa`, as the guest finds it."""
    return oracle.TimeInfo.parse(clock.memory.read(gpa, 32))


def pages_of(clock: GuestClock) -> list[oracle.TimeInfo]:
    """Both vCPUs' pages where the unit of VirtualBox has them."""
    return [time_info(clock, gpa) for gpa in (0x2000, 0x3000)]


def unit_versions(clock: GuestClock) -> list[int]:
    """Each vCPU's kept version, as the saved unit has it."""
    data = clock.interface.save_unit()
    return [Struct("<I").unpack_from(data, 12 + 37 * vcpu + 32)[0] for vcpu in range(2)]


@pytest.mark.row("V-11")
@pytest.mark.parametrize(
    ("hz", "ns"),
    [
        (2_500_000_000, 406_000_000_002),
        (2_693_508_421, 376_831_938_631),
        (5_000_000_000, 1_439_649_528_664),
        ((1 << 32) + 10**6, 1_015_000_000_007_000),
    ],
)
def test_ns_count_from_tsc_0(hz: int, ns: int) -> None:
    """ns are TSC x 10^9 / Hz, rounded down, whenever the VM was started; the frequency is cut to 32 bits (T8)."""
    backend = SimulatedBackend(hz, tsc=10**12)
    clock = GuestClock(GuestMemory(bytearray(1 << 16)), backend=backend, profile="virtualbox")
    backend.tsc = GUEST_TSC
    clock.write_msr(0, SYSTEM_TIME, 0x2001)
    assert clock.reading(0)[:2] == (GUEST_TSC, ns)


@pytest.mark.row("V-10", "V-11")
def test_a_registration_takes_the_tsc_as_it_is() -> None:
    """A guest that has set its TSC back finds the smaller value, and its ns, at the next registration of that page."""
    backend = SimulatedBackend(10**9, tsc=10**12)
    memory = GuestMemory(bytearray(1 << 16))
    clock = GuestClock(memory, 2, backend=backend, profile="virtualbox")
    clock.write_msr(0, SYSTEM_TIME, 0x2001)
    clock.write_msr(0, 0x10, 5000)
    backend.advance(ns=7)
    clock.write_msr(0, SYSTEM_TIME, 0x2001)
    clock.write_msr(1, SYSTEM_TIME, 0x3001)  # its own TSC, which was not written
    assert [read_time_info(memory, gpa)[1:3] for gpa in (0x2000, 0x3000)] == [(5007, 5007), (10**12 + 7,) * 2]


@pytest.mark.row("V-10", "V-12")
def test_bit_0_decides() -> None:
    """An address without bit 0 puts no page there, and does not change the one that was."""
    clock = a_clock(profile="virtualbox")
    clock.write_msr(0, SYSTEM_TIME, 0x3000)
    assert clock.memory.read(0, 1 << 16) == bytes(1 << 16)
    clock.write_msr(0, SYSTEM_TIME, 0x2001)
    before = clock.memory.read(0, 1 << 16)
    clock.write_msr(0, SYSTEM_TIME, 0x3000)
    assert (clock.memory.read(0, 1 << 16), clock.page(0)) == (before, None)


@pytest.mark.row("V-12", "V-48")
def test_a_disabled_page_leaves_nothing_of_its_line() -> None:
    """Of the vCPU that disables its page TSC, ns and address are saved as 0; MSRs and pages of all vCPUs stay."""
    clock = a_clock(profile="virtualbox")
    for vcpu in range(2):
        clock.write_msr(vcpu, SYSTEM_TIME, 0x2001 + 0x1000 * vcpu)
    before = clock.memory.read(0, 1 << 16)
    clock.write_msr(0, SYSTEM_TIME, 0x2000)
    clock.refresh()
    assert clock.memory.read(0, 1 << 16) == before
    first, other = virtualbox_unit.decode(clock.interface.save_unit()[8:], 2).vcpus
    assert first[:4] == (0x2000, 0, 0, 0)
    assert other[:4] == (0x3001, *read_time_info(clock.memory, 0x3000)[1:3], 0x3000)
    assert (clock.page(0), clock.page(1)) == (None, None)  # T11: the VM has none in use now
    assert [clock.read_msr(vcpu, SYSTEM_TIME) for vcpu in range(2)] == [0x2000, 0x3001]


@pytest.mark.row("V-18")
@pytest.mark.parametrize(
    ("hz", "mul", "shift"),
    [
        (1_000_000_000, 2_147_483_648, 1),
        (1_500_000_000, 2_863_311_530, 0),
        (2_000_000_000, 2_147_483_648, 0),
        (2_693_508_421, 3_189_124_833, -1),
        (4_294_967_295, 4_000_000_003, -2),
        (5_700_000_000, 3_014_012_137, -2),
    ],
)
def test_the_scale_is_that_of_the_frequency_in_hz(hz: int, mul: int, shift: int) -> None:
    """The page has the classic pair of the whole frequency, not of its kHz, nor of 32 bits of it."""
    clock = GuestClock(GuestMemory(bytearray(1 << 16)), backend=SimulatedBackend(hz), profile="virtualbox")
    clock.write_msr(0, SYSTEM_TIME, 0x2001)
    assert read_time_info(clock.memory, 0x2000)[3:5] == (mul, shift)


@pytest.mark.row("V-20", "V-38", "V-47")
def test_a_load_writes_each_page_once() -> None:
    """While the VM does not run, a load writes each page at once: saved version (even), TSC and ns, and STABLE."""
    clock = a_clock(profile="virtualbox")
    clock.pause()
    clock.memory.write(0x2000, bytes([0xA5]) * 0x1020)
    heard: list[tuple[int, int]] = []
    clock.memory.on_dirty = lambda *extent: heard.append(extent)
    clock.interface.load_unit(a_virtualbox_unit())
    lines = [(page.version, page.tsc_timestamp, page.system_time, page.flags) for page in pages_of(clock)]
    assert lines == [(8, 5 * 10**6, 7 * 10**9, 3), (20, 6 * 10**6, 8 * 10**9, 1)]
    assert [(page.pad0, page.pad) for page in pages_of(clock)] == [(0, 0)] * 2
    assert (heard, unit_versions(clock)) == ([(0x2000, 32), (0x3000, 32)], [8, 20])
    clock.resume()
    assert unit_versions(clock) == [8, 20]


@pytest.mark.row("V-20", "V-21")
def test_a_registration_raises_the_kept_version_by_2() -> None:
    """While the VM runs, each registration leaves the record even, and raises that vCPU's kept version alone."""
    clock = a_clock(profile="virtualbox")
    clock.memory.write(0x2000, bytes([0xA5]) * 32)
    for version in (2, 4, 6):
        clock.write_msr(0, SYSTEM_TIME, 0x2001)
        page = time_info(clock)
        assert (page.version, page.pad0, page.pad, page.flags) == (version, 0, 0, 1)
        assert unit_versions(clock) == [version, 0]


@pytest.mark.row("V-22", "V-16")
@pytest.mark.parametrize("gpa", [SIZE, SIZE - 30, 2**64 - 32])
def test_a_registration_without_memory_is_told_and_writes_nothing(gpa: int) -> None:
    """The event names vCPU and address, the guest gets no #GP, and no byte and no version changes."""
    clock = a_clock(profile="virtualbox")
    since = clock.events.last
    clock.write_msr(1, SYSTEM_TIME, gpa | 1)
    (told,) = clock.events.read(since=since).events
    assert told.kind is EventKind.REFUSED
    assert "vCPU 1" in told.why
    assert f"{gpa:#x}" in told.why
    assert clock.memory.read(0, SIZE) == bytes(SIZE)
    assert (clock.read_msr(1, SYSTEM_TIME), unit_versions(clock)) == (gpa | 1, [0, 0])
    clock.write_msr(1, SYSTEM_TIME, 0x3001)
    assert time_info(clock, 0x3000).version == 2


@pytest.mark.row("V-20", "V-23")
def test_a_registration_writes_its_own_page_alone() -> None:
    """While the VM runs, a registration writes that vCPU's page; what a guest has put over the other one stays."""
    backend = SimulatedBackend(10**9)
    memory = GuestMemory(bytearray(1 << 16))
    clock = GuestClock(memory, 2, backend=backend, profile="virtualbox", features=FEATURES)
    clock.write_msr(0, SYSTEM_TIME, 0x2001)
    before = bytes([0xA5]) * 0x1000
    memory.write(0x2000, before)
    backend.advance(ns=10**9)
    clock.write_msr(1, SYSTEM_TIME, 0x3001)
    assert memory.read(0x2000, 0x1000) == before
    assert time_info(clock, 0x3000).tsc_timestamp == 10**9


@pytest.mark.row("V-23", "V-20")
def test_no_operation_of_the_vmm_writes_a_page() -> None:
    """Refreshes, rates, steps, a pause and stress leave pages alone: their guest's time is its TSC's."""
    backend = SimulatedBackend(10**9)
    memory = GuestMemory(bytearray(1 << 16))
    clock = GuestClock(memory, 2, backend=backend, profile="virtualbox", features=FEATURES)
    for vcpu in range(2):
        clock.write_msr(vcpu, SYSTEM_TIME, 0x2001 + 0x1000 * vcpu)
    dirty: list[tuple[int, int]] = []
    memory.on_dirty = lambda gpa, length: dirty.append((gpa, length))
    before = memory.read(0, 1 << 16)
    clock.dilate(3)
    clock.skip(10**9)
    republish(clock, 3, [Fraction(1)])
    clock.slew(10**6)
    backend.advance(ns=10**9)
    clock.refresh()
    clock.pause()
    at_pause = clock.reading(0)
    assert (int(at_pause.tsc), int(at_pause.ns)) == (backend.tsc, backend.tsc)
    backend.advance(ns=10**9)
    assert clock.reading(0) == at_pause
    clock.resume()
    assert (memory.read(0, 1 << 16), dirty) == (before, [])
    assert [int(clock.read(vcpu)) for vcpu in range(2)] == [int(backend.tsc)] * 2


@pytest.mark.row("V-38", "V-20", "P-25")
def test_a_restored_clock_goes_on_with_its_lines() -> None:
    """A restore writes each page once, with saved version, TSC and ns, at the frequency of the host that it is on."""
    clock = a_clock(profile="virtualbox")
    clock.pause()
    clock.interface.load_unit(a_virtualbox_unit())
    saved = clock.save()
    memory = GuestMemory(bytearray(1 << 16))
    restored = GuestClock.restore(saved, memory, backend=SimulatedBackend(10**9, 10**12))
    restored.resume()
    for _ in range(2):
        pages = [restored.page(vcpu) for vcpu in range(2)]
        assert [page and (*page[:3], page.shown_khz, page.flags) for page in pages] == [
            (8, 5 * 10**6, 7 * 10**9, 10**6, 3),
            (20, 6 * 10**6, 8 * 10**9, 10**6, 1),
        ]
        restored.dilate(2)
    older = {
        name: value for name, value in saved.provider.msrs.items() if name not in ("time_page_tsc", "time_page_ns")
    }
    without = saved._replace(provider=saved.provider._replace(msrs=older))
    assert GuestClock.restore(without, memory, backend=SimulatedBackend(10**9)).save().vcpus[0].time_page_gpa == 0x2000


@pytest.mark.row("V-36")
def test_a_unit_has_the_lines_that_the_host_keeps() -> None:
    """A guest that scribbles over its page does not change the TSC and ns that are saved."""
    clock = a_clock(profile="virtualbox")
    clock.pause()
    clock.interface.load_unit(a_virtualbox_unit())
    clock.memory.write(0x2000, bytes(32))
    assert clock.interface.save_unit() == a_virtualbox_unit()


@pytest.mark.row("V-11")
def test_a_frequency_of_which_32_bits_leave_nothing() -> None:
    """Where the frequency cut to 32 bits is 0 Hz, which VirtualBox would divide by, the whole one counts."""
    backend = SimulatedBackend(1 << 32, tsc=1 << 33)
    clock = GuestClock(GuestMemory(bytearray(1 << 16)), backend=backend, profile="virtualbox")
    clock.write_msr(0, SYSTEM_TIME, 0x2001)
    assert clock.read(0) == 2 * 10**9


@pytest.mark.row("V-20", "E9")
def test_two_kinds_of_page_in_one_publish() -> None:
    """One publish writes a page with a line of its own, and every publish one with the VM's line beside it."""
    memory = GuestMemory(bytearray(1 << 12))
    pages = TimePages(memory, 2, SimulatedCounter(1000))
    line, scale = ClockLine(HostTsc(0), GuestNs(0), 0, 1, 1), ClockScale.from_hz(10**9)
    pages.set_tsc_offset(1, 7)
    pages.register(0, 0x100)
    pages.register(1, 0x200, (GuestTsc(500), GuestNs(9), scale, 6, 2))
    for version in (2, 4):
        pages.publish(line, scale, flags=1, out_of_guest=range(2))
        assert (read_time_info(memory, 0x100).version, pages.read(0)) == (version, 1000)
        assert read_time_info(memory, 0x200) == (6, 500, 9, *read_time_info(memory, 0x100)[3:5], 3)
        assert pages.reading(1)[:2] == (1007, 516)
    for version_or_flags in ((5, 0), (1 << 32, 0), (0, 256)):
        with pytest.raises(RangeError):
            pages.register(1, 0x200, (GuestTsc(0), GuestNs(0), scale, *version_or_flags))


@pytest.mark.row("V-38")
def test_a_load_passes_over_what_cannot_be_written() -> None:
    """A page without memory, or disabled, fails no load: it is not written, and the other one is."""
    unit = a_virtualbox_unit()
    second = 12 + 37
    nowhere = changed(changed(unit, second, "<Q", SIZE | 1), second + 24, "<Q", SIZE)
    disabled = unit[:second] + pack("<QQQQIB", 0x3000, 0, 0, 0, 20, 0) + unit[second + 37 :]
    for data, msr in ((nowhere, SIZE | 1), (disabled, 0x3000)):
        clock = a_clock(profile="virtualbox")
        clock.pause()
        clock.interface.load_unit(data)
        assert time_info(clock).version == 8
        clock.resume()
        clock.refresh()
        assert clock.memory.read(0x3000, 32) == bytes(32)
        assert clock.read_msr(1, SYSTEM_TIME) == msr
        assert (clock.read_msr(0, WALL_CLOCK), clock.interface.save_unit()) == (0x4000, data)


@pytest.mark.row("V-24")
@pytest.mark.parametrize("offset", [0, 10**12, -(10**6)])
def test_a_page_is_on_the_tsc_that_its_vcpu_reads(offset: int) -> None:
    """A registration changes no TSC: it has the host's rate and each vCPU's offset, and the page shows just that."""
    backend = SimulatedBackend(10**9, tsc=10**7)
    clock = GuestClock(GuestMemory(bytearray(SIZE)), 2, backend=backend, tsc_offset=offset, profile="virtualbox")
    clock.write_msr(1, TSC, 77 * 10**6)
    for vcpu, tsc in ((0, 10**7 + offset), (1, 77 * 10**6)):
        before = dict(backend.tsc_offsets)
        clock.write_msr(vcpu, SYSTEM_TIME, 0x2001 + 0x1000 * vcpu)
        page = time_info(clock, 0x2000 + 0x1000 * vcpu)
        assert (page.tsc_timestamp, page.system_time, clock.read_msr(vcpu, TSC)) == (tsc, tsc, tsc)
        assert (backend.tsc_offsets, (backend.tsc + before[vcpu]) % 2**64) == (before, tsc)
    backend.advance(ns=NS_PER_S)
    assert [clock.read_msr(vcpu, TSC) for vcpu in range(2)] == [10**9 + 10**7 + offset, 10**9 + 77 * 10**6]


@pytest.mark.row("V-26")
def test_the_wall_clock_is_the_hosts_utc_at_the_write() -> None:
    """The guest's uptime, a pause, a dilation and an earlier write are not in it; the VMM's offset is."""
    backend = SimulatedBackend(10**9, tsc=5 * 10**9, realtime_ns=1_700_000_000 * NS_PER_S + 999_999_999)
    clock = GuestClock(GuestMemory(bytearray(SIZE)), 2, backend=backend, profile="virtualbox")
    clock.write_msr(0, WALL_CLOCK, 0x3000)
    backend.advance(ns=100 * NS_PER_S)
    clock.dilate(1, 2)
    backend.advance(ns=10 * NS_PER_S)
    clock.pause()
    backend.advance(ns=1000 * NS_PER_S)
    clock.resume("freeze")
    clock.write_msr(1, WALL_CLOCK, 0x4000)
    clock.wall_clock = clock.wall_clock._replace(offset_ns=-3600 * NS_PER_S)
    clock.write_msr(0, WALL_CLOCK, 0x5000)
    shown = [Struct("<II").unpack(clock.memory.read(gpa + 4, 8)) for gpa in (0x3000, 0x4000, 0x5000)]
    assert shown == [(1_700_000_000 + after, 999_999_999) for after in (0, 1110, 1110 - 3600)]


@pytest.mark.row("V-25", "V-26")
def test_version_and_utc_are_those_of_the_rendezvous() -> None:
    """What another vCPU writes on its way out counts, UTC is read when all are out, and no byte beside is written."""
    backend = SimulatedBackend(10**9, realtime_ns=10**18)
    memory = GuestMemory(bytearray([0xA5]) * SIZE)
    records: list[tuple[int | None, bytes]] = []

    @contextmanager
    def quiesce(vcpu: int | None) -> Iterator[None]:
        memory.write(0x3000, pack("<I", 40 + len(records)))
        backend.advance(ns=5 * NS_PER_S)
        yield
        records.append((vcpu, memory.read(0x2FF8, 28)))

    clock = GuestClock(memory, 2, backend=backend, profile="virtualbox")
    backend.quiesce = quiesce  # type: ignore[method-assign]  # the VMM's
    beside = bytes([0xA5]) * 8
    for vcpu, version in ((1, 42), (0, 42)):
        clock.write_msr(vcpu, WALL_CLOCK, 0x3000)
        sec = 10**9 + 5 * len(records)
        assert records[-1] == (vcpu, beside + pack("<III", version, sec, 0) + beside)


@pytest.mark.row("V-39", "V-40")
@pytest.mark.parametrize("end", ["reset", "term"])
def test_after_a_reset_everything_begins_again(end: str) -> None:
    """MSRs, kept versions, flags, TSC and ns are 0, pages stay as they are, and the next registration is the first."""
    clock = a_clock(profile="virtualbox")
    clock.pause()
    clock.interface.load_unit(a_virtualbox_unit())
    clock.write_msr(1, SYSTEM_TIME, 0x3001)
    clock.resume()
    before = clock.memory.read(0, SIZE)
    clock.reset() if end == "reset" else clock.interface.term()
    assert clock.interface.save_unit()[8:] == pack("<I", 1) + bytes(2 * 37 + 8) + pack("<I", FEATURES)
    clock.refresh()
    assert clock.memory.read(0, SIZE) == before
    for vcpu in range(2):
        assert (clock.read_msr(vcpu, SYSTEM_TIME), clock.read_msr(vcpu, WALL_CLOCK), clock.page(vcpu)) == (0, 0, None)
        clock.write_msr(vcpu, SYSTEM_TIME, 0x5001 + 0x1000 * vcpu)
        page = time_info(clock, 0x5000 + 0x1000 * vcpu)
        assert (page.version, page.flags) == (2, 1)
    if end == "reset":
        assert [event.kind for event in clock.events.read().events].count(EventKind.RESET) == 1


@pytest.mark.row("V-27")
def test_a_pause_is_not_told() -> None:
    """No page says GUEST_STOPPED: not after a pause, not if registered in one or after it, nor after a restore."""
    clock = a_clock(profile="virtualbox")
    clock.write_msr(0, SYSTEM_TIME, 0x2001)
    clock.pause()
    clock.write_msr(1, SYSTEM_TIME, 0x3001)
    assert [page.flags for page in pages_of(clock)] == [1, 1]
    memory = GuestMemory(bytearray(SIZE))
    restored = GuestClock.restore(clock.save(), memory, backend=SimulatedBackend(10**9))
    for each in (clock, restored):
        each.resume()
        assert [page.flags for page in pages_of(each)] == [1, 1]
        each.memory.write(0x2000, b"\xff" * 32)  # what a guest leaves there says nothing of a pause either
        each.write_msr(0, SYSTEM_TIME, 0x2001)
        assert [page.flags for page in pages_of(each)] == [1, 1]
