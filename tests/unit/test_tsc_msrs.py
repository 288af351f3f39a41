"""IA32_TSC, IA32_TSC_ADJUST and TSC_AUX as a GuestClock serves them, also where the host honours no TSC offset."""

from __future__ import annotations

from typing import Final

import pytest

from pvclock import GuestClock, GuestMemory, MsrFault, SimulatedBackend
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
