"""The APIC's registers as MSRs, and the virtual processor assist page."""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock import ConfigError, MsrFault
from pvclock.providers.hyperv.apic import ApicMsrs
from pvclock.providers.hyperv.features import Privilege
from pvclock.providers.interface import ApicServices
from tests.unit.stub_clock import GUARD, SIZE, NotedVmm, StubClock

EOI, ICR, TPR, ASSIST_PAGE = 0x40000070, 0x40000071, 0x40000072, 0x40000073
ENABLED, PAGE = 1, 0x8000
U64: Final = st.integers(0, 2**64 - 1)


class NotedApic:
    """Two APICs that keep what is written to them, and note the ends of interrupts."""

    def __init__(self) -> None:
        self.icr, self.tpr, self.ended = [0, 0], [0, 0], list[int]()

    def end_interrupt(self, vcpu: int) -> None:
        """Note it."""
        self.ended.append(vcpu)

    def read_icr(self, vcpu: int) -> int:
        """What was written."""
        return self.icr[vcpu]

    def write_icr(self, vcpu: int, value: int) -> None:
        """Keep it."""
        self.icr[vcpu] = value

    def read_tpr(self, vcpu: int) -> int:
        """What was written."""
        return self.tpr[vcpu]

    def write_tpr(self, vcpu: int, value: int) -> None:
        """Keep it."""
        self.tpr[vcpu] = value


def an_apic(**options: bool) -> tuple[ApicMsrs, NotedApic, StubClock]:
    """The part, its APICs, and its clock with guest memory full of guard bytes."""
    clock, apic = StubClock(2), NotedApic()
    return ApicMsrs(clock, 2, apic, **options), apic, clock


def read(part: ApicMsrs, index: int, vcpu: int = 0) -> int:
    """RDMSR."""
    serve = part.msrs[index].read
    if serve is None:
        raise MsrFault(index)
    return serve(vcpu)


def write(part: ApicMsrs, index: int, value: int, vcpu: int = 0) -> None:
    """WRMSR."""
    serve = part.msrs[index].write
    assert serve is not None
    serve(vcpu, value)


def page(clock: StubClock) -> bytes:
    """The page at PAGE, with 64 bytes before and after it."""
    return clock.memory.read(PAGE - 64, 4096 + 128)


@pytest.mark.row("H-38")
def test_who_has_an_apic_to_offer() -> None:
    """A VMM with all of the services; the MSRs belong to the privilege of that name."""
    assert isinstance(NotedApic(), ApicServices)
    assert not isinstance(NotedVmm(), ApicServices)
    part, _, _ = an_apic()
    assert set(part.msrs) == {EOI, ICR, TPR, ASSIST_PAGE}
    assert {msr.privilege for msr in part.msrs.values()} == {Privilege.APIC}


@pytest.mark.row("H-38")
@given(value=U64 | st.integers(0, 2**33), vcpu=st.integers(0, 1))
def test_eoi_is_written_only(value: int, vcpu: int) -> None:
    """Each write ends an interrupt of that vCPU, whatever the value, but a wide one is #GP; so is a read."""
    part, apic, _ = an_apic()
    with pytest.raises(MsrFault):
        read(part, EOI, vcpu)
    if value >= 2**32:
        with pytest.raises(MsrFault, match="32 bits"):
            write(part, EOI, value, vcpu)
    else:
        write(part, EOI, value, vcpu)
    assert apic.ended == ([] if value >= 2**32 else [vcpu])


@pytest.mark.row("H-38")
@given(value=U64, vcpu=st.integers(0, 1))
def test_icr_is_the_vmms(value: int, vcpu: int) -> None:
    """All 64 bits, both ways."""
    part, apic, _ = an_apic()
    write(part, ICR, value, vcpu)
    assert apic.icr[vcpu] == read(part, ICR, vcpu) == value
    assert read(part, ICR, 1 - vcpu) == 0


@pytest.mark.row("H-38")
@given(value=U64 | st.integers(0, 2**33), vcpu=st.integers(0, 1))
def test_tpr_has_8_bits(value: int, vcpu: int) -> None:
    """The others of its 32 are ignored, as on KVM; a wider value is #GP, with the priority as it was."""
    part, apic, _ = an_apic()
    write(part, TPR, 0x20, vcpu)
    if value >= 2**32:
        with pytest.raises(MsrFault, match="32 bits"):
            write(part, TPR, value, vcpu)
    else:
        write(part, TPR, value, vcpu)
    assert apic.tpr[vcpu] == read(part, TPR, vcpu) == (0x20 if value >= 2**32 else value & 0xFF)
    assert read(part, TPR, 1 - vcpu) == 0


@pytest.mark.row("H-39")
@pytest.mark.parametrize("zeroed_bytes", [4, 4096])
def test_enabling_the_assist_page_zeroes_the_apics_word(zeroed_bytes: int) -> None:
    """On VirtualBox the whole page; disabling it is stored and writes nothing."""
    part, _, clock = an_apic(assist_page_is_zeroed=zeroed_bytes == 4096)
    write(part, ASSIST_PAGE, PAGE, 1)
    assert page(clock) == bytes([GUARD]) * (4096 + 128)
    write(part, ASSIST_PAGE, PAGE | ENABLED, 1)
    guard = bytes([GUARD])
    assert page(clock) == guard * 64 + bytes(zeroed_bytes) + guard * (4096 - zeroed_bytes + 64)
    assert (read(part, ASSIST_PAGE, 1), read(part, ASSIST_PAGE)) == (PAGE | ENABLED, 0)
    write(part, ASSIST_PAGE, PAGE, 1)
    assert read(part, ASSIST_PAGE, 1) == PAGE


@pytest.mark.row("H-39")
@pytest.mark.parametrize("gpa", [SIZE, 2**64 - 4096])
def test_an_assist_page_has_to_be_in_memory(gpa: int) -> None:
    """Enabling another one is #GP, and the old one stays."""
    part, _, clock = an_apic()
    write(part, ASSIST_PAGE, PAGE | ENABLED)
    with pytest.raises(MsrFault, match="memory"):
        write(part, ASSIST_PAGE, gpa | ENABLED)
    assert read(part, ASSIST_PAGE) == PAGE | ENABLED
    assert clock.memory.read(SIZE - 4096, 4096) == bytes([GUARD]) * 4096


@pytest.mark.row("H-39")
@pytest.mark.parametrize(("value", "faults"), [(PAGE, True), (SIZE | ENABLED, True), (PAGE | ENABLED, False)])
def test_virtualboxs_assist_page_is_stored_and_faults(value: int, faults: bool) -> None:
    """A read is #GP, and so is a write that does not enable a page in memory; the value is there all the same."""
    part, _, _ = an_apic(assist_page_faults=True)
    with pytest.raises(MsrFault):
        read(part, ASSIST_PAGE)
    if faults:
        with pytest.raises(MsrFault):
            write(part, ASSIST_PAGE, value)
    else:
        write(part, ASSIST_PAGE, value)
    assert part.save() == {"vp_assist_page": (value, 0)}


@pytest.mark.row("H-72", "H-74")
def test_the_assist_page_is_saved_and_reset() -> None:
    """Loading it writes no page; a reset forgets it."""
    part, _, clock = an_apic()
    part.checked({"vp_assist_page": [PAGE | ENABLED, 5]})()
    assert part.save() == {"vp_assist_page": (PAGE | ENABLED, 5)}
    assert page(clock) == bytes([GUARD]) * (4096 + 128)
    part.reset()
    assert part.save() == {"vp_assist_page": (0, 0)}


@pytest.mark.row("H-72")
@pytest.mark.parametrize("saved", [(1,), (1, 2, 3), (1, -1), (1, 2**64), (1, True), "12", None])
def test_what_was_never_saved_is_refused(saved: object) -> None:
    """With an error that names it, and nothing changed."""
    part, _, _ = an_apic()
    write(part, ASSIST_PAGE, PAGE | ENABLED)
    with pytest.raises(ConfigError, match="vp_assist_page"):
        part.checked({"vp_assist_page": saved})
    assert read(part, ASSIST_PAGE) == PAGE | ENABLED
