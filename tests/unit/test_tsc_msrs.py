"""IA32_TSC, IA32_TSC_ADJUST and TSC_AUX as a GuestClock serves them, also where the host honours no TSC offset."""

from __future__ import annotations

from typing import Final

import pytest

from pvclock import CpuidLeaf, GuestClock, GuestMemory, HostTsc, MsrFault, SimulatedBackend
from pvclock.errors import TscOffsetNotHonoured
from pvclock.state.clock_state import from_json, to_json
from pvclock.timekeeping.events import EventCause, EventKind
from pvclock.tsc.emulation import rdtscp
from tests.unit.clocks import SYSTEM_TIME, page_of

HZ: Final = 2_500_000_000
TSC, ADJUST, AUX = 0x10, 0x3B, 0xC0000103


def a_vm(*, honours_tsc_offset: bool = True) -> tuple[GuestClock, SimulatedBackend]:
    """A VM of two vCPUs on a host whose TSC is 10^12."""
    backend = SimulatedBackend(HZ, tsc=10**12, honours_tsc_offset=honours_tsc_offset)
    clock = GuestClock(GuestMemory(bytearray(1 << 16)), 2, backend=backend)
    for vcpu in range(2):
        clock.write_msr(vcpu, SYSTEM_TIME, 0x2001 + 64 * vcpu)
    return clock, backend


@pytest.mark.row("P-03", "P-17", "J-07")
@pytest.mark.parametrize("value", [0, 1, 0xFFFF_FFFF])
def test_a_guest_sets_its_tsc_aux(value: int) -> None:
    """32 bits, of its own vCPU alone; RDTSCP returns it, and it is saved and restored."""
    clock, backend = a_vm()
    clock.write_msr(1, AUX, value)
    assert [clock.read_msr(vcpu, AUX) for vcpu in range(2)] == [0, value]
    assert rdtscp(clock.tsc(1), backend.tsc).rcx == value
    state = from_json(to_json(clock.save()))
    assert [vcpu.tsc_aux for vcpu in state.vcpus] == [0, value]
    restored = GuestClock.restore(state, clock.memory, backend=backend)
    assert restored.read_msr(1, AUX) == value
    restored.resume()
    assert restored.read_msr(1, AUX) == value


@pytest.mark.row("P-17")
@pytest.mark.parametrize("value", [1 << 32, 2**64 - 1])
def test_tsc_aux_beyond_32_bits_is_gp(value: int) -> None:
    """MsrFault, with the value that was there kept, and the clock none the worse."""
    clock, _ = a_vm()
    clock.write_msr(0, AUX, 7)
    with pytest.raises(MsrFault):
        clock.write_msr(0, AUX, value)
    assert clock.read_msr(0, AUX) == 7
    clock.refresh()


@pytest.mark.row("P-17")
def test_tsc_aux_moves_neither_tsc_nor_page() -> None:
    """It has nothing to do with time."""
    clock, backend = a_vm()
    page, offsets = page_of(clock), dict(backend.tsc_offsets)
    clock.write_msr(0, AUX, 7)
    clock.host_write_msr(0, AUX, 8)
    assert clock.read_msr(0, AUX) == 8
    assert (page_of(clock), backend.tsc_offsets) == (page, offsets)
    assert (clock.read_msr(0, TSC), clock.read_msr(0, ADJUST)) == (10**12, 0)


@pytest.mark.row("J-05", "J-03")
@pytest.mark.parametrize("value", [1, 99, 2**64 - 1])
def test_a_guests_adjust_is_stored_where_offsets_are_not_honoured(value: int) -> None:
    """As the kernel does: ADJUST reads back, the TSC stays the host's, the page stays; it is told as the guest's."""
    clock, backend = a_vm(honours_tsc_offset=False)
    page = page_of(clock)
    clock.write_msr(0, ADJUST, value)
    assert clock.read_msr(0, ADJUST) == value
    assert clock.read_msr(1, ADJUST) == 0
    assert clock.read_msr(0, TSC) == backend.tsc
    assert page_of(clock) == page
    (event,) = (event for event in clock.events.read().events if event.kind is EventKind.REFUSED)
    assert event.cause is EventCause.GUEST
    clock.refresh()
    assert abs(clock.read(0) - clock.now()) <= 1


@pytest.mark.row("J-05", "J-03")
def test_a_guests_tsc_write_where_offsets_are_not_honoured() -> None:
    """ADJUST moves by as much as was asked for, as in the kernel; the TSC stays the host's."""
    clock, backend = a_vm(honours_tsc_offset=False)
    clock.write_msr(0, TSC, 5)
    assert clock.read_msr(0, TSC) == backend.tsc
    assert clock.read_msr(0, ADJUST) == (5 - 10**12) % 2**64


@pytest.mark.row("J-05", "J-06")
def test_a_vmm_is_told_what_the_host_cannot() -> None:
    """host_write_msr() of a TSC raises and changes nothing; of ADJUST and AUX it needs no offset."""
    clock, backend = a_vm(honours_tsc_offset=False)
    with pytest.raises(TscOffsetNotHonoured):
        clock.host_write_msr(0, TSC, 5)
    assert (clock.read_msr(0, TSC), clock.read_msr(0, ADJUST)) == (backend.tsc, 0)
    clock.host_write_msr(0, ADJUST, 11)
    clock.host_write_msr(0, AUX, 12)
    assert [clock.read_msr(0, index) for index in (TSC, ADJUST, AUX)] == [backend.tsc, 11, 12]


@pytest.mark.row("J-06", "J-07")
def test_what_a_vmm_writes_before_the_resume_of_a_restored_clock_stays() -> None:
    """TSC and ADJUST of host_write_msr(), in either order, are read at once, saved, and gone on from."""
    source, _ = a_vm()
    source.write_msr(0, ADJUST, 44)
    source.pause()
    state = source.save()
    for order in ((TSC, ADJUST), (ADJUST, TSC)):
        backend = SimulatedBackend(HZ, tsc=77)
        clock = GuestClock.restore(state, source.memory, backend=backend)
        assert (
            clock.read_msr(0, TSC) == clock.guest_tsc(0, backend.tsc) == clock.tsc(0).read(backend.tsc) == 10**12 + 44
        )
        assert clock.read_msr(0, ADJUST) == 44
        backend.advance(ns=1000)
        assert clock.read_msr(0, TSC) == 10**12 + 44
        for index in order:
            clock.host_write_msr(0, index, {TSC: 5_000_000, ADJUST: 1234}[index])
        assert (clock.read_msr(0, TSC), clock.read_msr(0, ADJUST)) == (5_000_000, 1234)
        saved = clock.save().vcpus[0]
        assert (saved.guest_tsc, saved.tsc_adjust) == (5_000_000, 1234)
        clock.resume("freeze")
        assert (clock.read_msr(0, TSC), clock.read_msr(0, ADJUST)) == (5_000_000, 1234)
        assert clock.read_msr(1, TSC) == 10**12
        backend.advance(ns=1000)
        assert clock.read_msr(0, TSC) == 5_000_000 + 2500


# CPUID, and what each vCPU has


@pytest.mark.row("J-01")
@pytest.mark.parametrize("host_ebx", [0, 0xFFFF_FFFF])
@pytest.mark.parametrize("offered", [True, False])
def test_cpuid_says_whether_there_is_adjust(host_ebx: int, offered: bool) -> None:
    """Bit 1 of leaf 7's EBX, in subleaf 0 alone, is what the VMM offers, whatever the host's CPU has."""
    clock = GuestClock(GuestMemory(), backend=SimulatedBackend(HZ), offer_tsc_adjust=offered)
    registers = CpuidLeaf(1, host_ebx, 3, 4)
    assert clock.patch_cpuid(7, 0, registers) == registers._replace(ebx=(host_ebx & ~2) | 2 * offered)
    assert clock.patch_cpuid(7, 1, registers) == registers


@pytest.mark.row("J-02")
@pytest.mark.parametrize("tsc_offset", [0, 5, 2**64 - 10**9, None])
def test_each_vcpu_has_64_bits_of_its_own(tsc_offset: int | None) -> None:
    """ADJUST is 0 at first, whatever the VMM's offset; then what that vCPU's guest wrote, and 0 after a reset."""
    clock = GuestClock(GuestMemory(), 3, backend=SimulatedBackend(HZ, tsc=10**12), tsc_offset=tsc_offset)
    assert [clock.read_msr(vcpu, ADJUST) for vcpu in range(3)] == [0, 0, 0]
    written = [2**64 - 1, 0x8000_0001_0000_0002, 1]
    for vcpu, value in enumerate(written):
        clock.write_msr(vcpu, ADJUST, value)
    assert [clock.read_msr(vcpu, ADJUST) for vcpu in range(3)] == written
    begun = 10**12 + (tsc_offset or 0)
    assert [clock.read_msr(vcpu, TSC) for vcpu in range(3)] == [(begun + value) % 2**64 for value in written]
    clock.reset()
    assert [clock.read_msr(vcpu, ADJUST) for vcpu in range(3)] == [0, 0, 0]


# What the host adds


@pytest.mark.row("J-05", "J-03")
def test_the_hosts_offset_has_adjust_in_it() -> None:
    """What the host is told to add to RDTSC is the VMM's offset and ADJUST; saved and resumed elsewhere, too."""
    backend = SimulatedBackend(HZ, tsc=10**12)
    memory = GuestMemory(bytearray(1 << 16))
    clock = GuestClock(memory, 2, backend=backend, tsc_offset=7)
    clock.write_msr(1, ADJUST, 10**9)
    assert backend.tsc_offsets == {0: 7, 1: 7 + 10**9}
    clock.write_msr(1, ADJUST, 2**64 - 10**9)
    assert backend.tsc_offsets == {0: 7, 1: 2**64 + 7 - 10**9}
    clock.pause()
    elsewhere = SimulatedBackend(HZ, tsc=99)
    moved = GuestClock.restore(clock.save(), memory, backend=elsewhere)
    moved.resume("freeze")
    assert [(99 + elsewhere.tsc_offsets[vcpu]) % 2**64 for vcpu in range(2)] == [10**12 + 7, 10**12 + 7 - 10**9]


@pytest.mark.row("J-05")
def test_no_write_of_tsc_or_adjust_reaches_a_register() -> None:
    """Writes of 0x10 and 0x3b come to the clock, so that neither kernel nor CPU sees them; reads of 0x3b, too."""
    clock, _ = a_vm()
    covering = {index: [each for each in clock.msr_ranges if each.base == index] for index in (TSC, ADJUST)}
    assert [(each.length, each.writes, each.kept) for each in covering[TSC]] == [(1, True, ())]
    assert [(each.length, each.reads, each.writes, each.kept) for each in covering[ADJUST]] == [(1, True, True, ())]


@pytest.mark.row("J-10", "J-05")
@pytest.mark.parametrize("step", [-(10**11), -(10**12)])
def test_a_hosts_own_adjust_is_not_the_guests(step: int) -> None:
    """A host that moves its own TSC leaves the guest's TSC, ADJUST and further writes as they were: sums stay sums."""
    clock, backend = a_vm()
    clock.write_msr(1, ADJUST, 500)
    backend.tsc = HostTsc(backend.tsc + step)
    clock.tick()
    assert [clock.read_msr(vcpu, ADJUST) for vcpu in range(2)] == [0, 500]
    assert backend.tsc_offsets == {0: -step, 1: 500 - step}
    assert [clock.read_msr(vcpu, TSC) for vcpu in range(2)] == [10**12, 10**12 + 500]
    clock.write_msr(1, ADJUST, 700)
    assert (clock.read_msr(1, TSC), clock.tsc(1).base_offset) == (10**12 + 700, -step)


# What the host writes, and saves


@pytest.mark.row("J-06", "J-07")
@pytest.mark.parametrize("order", [(TSC, ADJUST), (ADJUST, TSC)])
def test_host_writes_in_either_order(order: tuple[int, int]) -> None:
    """A VMM's write of one, while time runs, leaves the other alone, so the order does not matter to the guest."""
    clock, _ = a_vm()
    clock.write_msr(1, ADJUST, 44)
    values = {TSC: 5_000_000, ADJUST: 2**64 - 1234}
    expected = {TSC: 10**12 + 44, ADJUST: 44}
    for index in order:
        clock.host_write_msr(1, index, values[index])
        expected[index] = values[index]
        assert {each: clock.read_msr(1, each) for each in (TSC, ADJUST)} == expected
    assert [clock.read_msr(0, each) for each in (TSC, ADJUST)] == [10**12, 0]


@pytest.mark.row("J-07")
@pytest.mark.parametrize("adjusts", [(1, 2**64 - 1), (2**63, 0), (2**64 - 10**12, 10**12)])
def test_adjust_comes_back_from_a_file(adjusts: tuple[int, int]) -> None:
    """Whatever 64 bits each vCPU had, they are in the saved text, and its guest reads them again after the resume."""
    clock, _ = a_vm()
    for vcpu, value in enumerate(adjusts):
        clock.write_msr(vcpu, ADJUST, value)
    tscs = [clock.read_msr(vcpu, TSC) for vcpu in range(2)]
    clock.pause()
    text = to_json(clock.save())
    moved = GuestClock.restore(from_json(text), clock.memory, backend=SimulatedBackend(HZ, tsc=3))
    for resume in (lambda: None, lambda: moved.resume("freeze")):
        resume()
        assert tuple(moved.read_msr(vcpu, ADJUST) for vcpu in range(2)) == adjusts
        assert [moved.read_msr(vcpu, TSC) for vcpu in range(2)] == tscs
