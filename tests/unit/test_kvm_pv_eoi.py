"""Paravirtual end of interrupt: the MSR, and who gets the bit."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock import KvmFeature, MsrFault, RangeError
from pvclock.providers.kvm import KvmProvider
from tests.unit.stub_clock import GUARD, SIZE, StubClock, a_provider, written

PV_EOI_EN = 0x4B564D04
FLAG = 0x5004


def enabled(flag: int = 0) -> tuple[KvmProvider, StubClock]:
    """A provider whose vCPU 0 has its EOI byte at FLAG, with `flag` in it."""
    provider, clock = a_provider(features=int(KvmFeature.PV_EOI))
    clock.memory.write(FLAG, bytes([flag]))
    provider.write_msr(0, PV_EOI_EN, FLAG | 1)
    return provider, clock


def byte_at(clock: StubClock, gpa: int = FLAG) -> int:
    """A byte of guest memory."""
    return clock.memory.read(gpa, 1)[0]


def guest_ends_interrupt(clock: StubClock) -> bool:
    """The guest's test-and-clear; True if it may go on without an exit."""
    old = byte_at(clock)
    clock.memory.write(FLAG, bytes([old & ~1]))
    return bool(old & 1)


@pytest.mark.row("K-31")
@pytest.mark.parametrize("value", [FLAG | 2, FLAG | 3, FLAG | 2 | 1 << 40, 2])
def test_bit_1_faults(value: int) -> None:
    """The address is 4-byte aligned, enabled or not; the old value stays."""
    provider, _ = enabled()
    with pytest.raises(MsrFault, match="aligned"):
        provider.write_msr(0, PV_EOI_EN, value)
    assert provider.read_msr(0, PV_EOI_EN) == FLAG | 1


@pytest.mark.row("K-31")
@pytest.mark.parametrize("gpa", [SIZE, 2**64 - 4])
def test_enabling_outside_of_memory_faults(gpa: int) -> None:
    """Unlike the other records this one must be there; the value is kept only on success, and 'off' is no address."""
    provider, _ = enabled()
    with pytest.raises(MsrFault, match="no memory"):
        provider.write_msr(0, PV_EOI_EN, gpa | 1)
    assert provider.read_msr(0, PV_EOI_EN) == FLAG | 1
    provider.write_msr(0, PV_EOI_EN, gpa)
    assert provider.read_msr(0, PV_EOI_EN) == gpa


@pytest.mark.row("K-31")
def test_the_last_word_of_memory_will_do() -> None:
    """The host needs one byte: the MSR takes the last aligned address that has one, and offers are made there."""
    provider, clock = enabled()
    last = SIZE - 4
    clock.memory.write(last, bytes(4))
    provider.write_msr(0, PV_EOI_EN, last | 1)
    assert provider.offer_eoi(0)
    assert clock.memory.read(last, 4) == b"\1\0\0\0"
    clock.memory.add_slot(1 << 30, bytearray(1))
    provider.write_msr(1, PV_EOI_EN, 1 << 30 | 1)
    assert provider.offer_eoi(1)


@pytest.mark.row("K-31")
def test_only_bit_0_is_the_hosts() -> None:
    """Enabling writes nothing; offers change one bit of one byte, and leave the rest of the page to the guest."""
    provider, clock = enabled(flag=0xA4)
    assert written(clock.memory) == [FLAG]
    assert provider.offer_eoi(0)
    assert byte_at(clock) == 0xA5
    assert not provider.take_eoi(0)
    assert byte_at(clock) == 0xA4
    assert clock.memory.read(FLAG - 4, 4) + clock.memory.read(FLAG + 1, 60) == bytes([GUARD]) * 64


# What each side does in turn: "offer" and "take" are the host's, "eoi" is the guest's end of interrupt.
RACES = [
    (("offer", "eoi", "take"), True, True),  # no exit: the host sees at the next one that the interrupt has ended
    (("offer", "take", "eoi"), False, False),  # the host was first: the guest finds 0 and does a real EOI
    (("eoi", "offer", "take"), False, False),  # no offer yet: a real EOI; the later offer is not used
    (("eoi", "take"), False, False),  # never offered: nothing is taken
    (("offer", "offer", "eoi", "take"), True, True),  # offered twice is offered
    (("offer", "eoi", "take", "take"), True, False),  # taken twice: told once
]


@pytest.mark.row("K-32")
@pytest.mark.parametrize(("turns", "without_exit", "told"), RACES)
def test_race_table(turns: Sequence[str], without_exit: bool, told: bool) -> None:
    """Whoever comes first gets the bit: an interrupt ends by it or by an exit, never by both or by neither (T5)."""
    provider, clock = enabled()
    ended = took = False
    for turn in turns:
        if turn == "offer":
            assert provider.offer_eoi(0)
        elif turn == "take":
            took = provider.take_eoi(0)
        else:
            ended = guest_ends_interrupt(clock)
    assert (ended, took) == (without_exit, told)
    assert byte_at(clock) == 0


@pytest.mark.row("K-32")
@given(turns=st.lists(st.sampled_from(["offer", "take", "eoi"]), max_size=30))
def test_each_interrupt_ends_once(turns: list[str]) -> None:
    """In any order of turns, the host hears of as many ends without an exit as the guest had."""
    provider, clock = enabled()
    ended = took = 0
    for turn in [*turns, "take"]:
        if turn == "offer" and took == ended:  # an interrupt at a time: the VMM takes before it offers again
            provider.offer_eoi(0)
        elif turn == "take":
            took += provider.take_eoi(0)
        elif turn == "eoi":
            ended += guest_ends_interrupt(clock)
    assert took == ended


@pytest.mark.row("K-31", "K-32")
def test_where_there_is_no_byte_there_is_no_offer() -> None:
    """Not enabled, disabled, or without memory: no offer is made, and none is found taken."""
    provider, clock = enabled()
    assert not provider.offer_eoi(1)
    provider.write_msr(0, PV_EOI_EN, FLAG)
    assert not provider.offer_eoi(0)
    provider.write_msr(0, PV_EOI_EN, FLAG | 1)
    clock.memory.remove_slot(0)
    assert not provider.offer_eoi(0)
    assert not provider.take_eoi(0)


@pytest.mark.row("K-32")
def test_an_offer_is_taken_back_where_it_was_made() -> None:
    """The guest may move its byte, or its memory may go, while an offer is out: what was offered counts."""
    provider, clock = enabled()
    provider.offer_eoi(0)
    provider.write_msr(0, PV_EOI_EN, FLAG + 8 | 1)
    assert not provider.take_eoi(0)
    assert (byte_at(clock), byte_at(clock, FLAG + 8)) == (0, GUARD)
    provider.offer_eoi(0)
    clock.memory.remove_slot(0)
    assert provider.take_eoi(0)  # as Linux: a byte that cannot be read says 0


@pytest.mark.row("K-32")
def test_there_are_no_others() -> None:
    """A vCPU that the VM does not have is a RangeError."""
    provider, _ = enabled()
    for vcpu in (-1, 2):
        with pytest.raises(RangeError):
            provider.offer_eoi(vcpu)
        with pytest.raises(RangeError):
            provider.take_eoi(vcpu)


def full(gpa: int, length: int) -> None:
    """Fail, as on_dirty may."""
    raise OSError(f"{gpa:#x}+{length}: the dirty log is full")


@pytest.mark.row("K-32", "E9")
@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("failing", ["offer", "take"])
def test_an_error_of_on_dirty_loses_no_end_of_interrupt(ends: bool, failing: str) -> None:
    """The guest has the offer all the same, and its answer is told by the next call, once."""
    provider, clock = enabled()
    clock.memory.on_dirty = full if failing == "offer" else None
    with pytest.raises(OSError, match="full") if failing == "offer" else nullcontext():
        provider.offer_eoi(0)
    clock.memory.on_dirty = None
    if ends:
        assert guest_ends_interrupt(clock)
    clock.memory.on_dirty = full if failing == "take" else None
    if failing == "take":
        with pytest.raises(OSError, match="full"):
            provider.take_eoi(0)
    assert byte_at(clock) == (0 if ends or failing == "take" else 1)
    clock.memory.on_dirty = None
    assert [provider.take_eoi(0), provider.take_eoi(0)] == [ends, False]
