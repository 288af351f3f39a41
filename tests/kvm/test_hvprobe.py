"""hvprobe on real vCPUs reads Hyper-V's reference time: by page and by counter, while the clock changes, and broken.

A round of hvprobe is a batch of readings of the page and then page, counter, page.  What it finds it counts, and the
last part of this file shows that each of its counters counts.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import pytest

from pvclock import HostTsc, Machine
from pvclock.payloads import probe
from pvclock.payloads.hyperv_probe import HYPERCALL_PAGE, NO_RESULT, REFERENCE_PAGE, violations
from tests import oracle
from tests.kvm.hyperv_guest import (
    OPERATIONS,
    assert_no_violations,
    block_of,
    clock_of,
    finish,
    hyperv_machine,
    operate,
    reading_guest,
    records_of,
    refresh,
    wait_for,
)
from tests.waiting import HANG_S

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("tsc_is_trusted")]  # else there is no page to read

UNIT_NS: Final = 100
HOUR: Final = 3600 * 10**7
"""In units: for however long a vCPU has no CPU, what is an hour off is off."""
TRIPLES: Final = 300
"""On each of two vCPUs, during each operation; on an emulated CPU that both share a triple takes 10 ms and more."""
MANY_TRIPLES: Final = 100_000
BOUND_UNITS: Final = 2
"""Design 5.1: how far a page may be from the timeline."""
SUCCESS: Final = 0
ACCESS_DENIED: Final = 6
RESERVED_SEQUENCE: Final = 0xFFFFFFFF
SHARED_LAST: Final = 0x200040
"""The word that all vCPUs raise to their readings (probe_layout.s)."""


# What the guest finds


@pytest.mark.row("H-11", "H-30", "H-36", "H-50", "H-51")
def test_what_a_guest_finds_and_enables() -> None:
    """The guest finds the interface, enables the page as it asked, and computes the page's line from its layout."""
    with reading_guest() as machine:
        records, block = finish(machine), block_of(machine)
        page = oracle.ReferenceTscPage.parse(machine.memory.read(REFERENCE_PAGE, 24))
    assert block.reference_tsc == REFERENCE_PAGE | 1
    assert block.guest_os_id == 1 << 63 | 1
    assert (block.hypercall, block.call_result) == (0, NO_RESULT)
    assert page.is_valid
    for record in records:
        assert record.max_leaf >= 0x40000005
        assert record.vp_index == record.apic_id
        assert (record.sequence, record.scale, record.offset) == (page.sequence, page.scale, page.offset)
        assert record.page_units == page.read(record.page_tsc)
        assert record.fallbacks == 0


@pytest.mark.row("H-31", "H-60", "H-68")
@pytest.mark.parametrize(("enforce_cpuid", "status"), [(False, SUCCESS), (True, ACCESS_DENIED)])
def test_a_guest_makes_a_hypercall(enforce_cpuid: bool, status: int) -> None:
    """A guest that calls its hypercall page comes back with a result: a spin wait is denied if CPUID forbids it."""
    with hyperv_machine("call=1 rounds=10", 1, enforce_cpuid=enforce_cpuid) as machine:
        machine.start()
        assert machine.wait(HANG_S) == probe.EXIT_FINE
        block = block_of(machine)
    assert block.hypercall == HYPERCALL_PAGE | 1
    assert block.call_result & 0xFFFF == status


@pytest.mark.row("H-54")
@pytest.mark.parametrize("order", [0, 3])
def test_a_page_under_sequence_0_sends_the_guest_to_the_counter(order: int) -> None:
    """In either order of reading: while the sequence is 0 each reading is the counter's, and none goes back."""
    with reading_guest(f"order={order} batch=1") as machine:
        wait_for(machine, "triples", 100)
        sequence = machine.memory.read(REFERENCE_PAGE, 4)
        machine.memory.write(REFERENCE_PAGE, bytes(4))
        wait_for(machine, "rounds", 2)
        before = records_of(machine)
        wait_for(machine, "fallbacks", 300)
        for record, was in zip(records_of(machine), before, strict=True):
            assert record.triples == was.triples
        machine.memory.write(REFERENCE_PAGE, sequence)
        wait_for(machine, "triples", 100)
        assert_no_violations(finish(machine))


# While the clock changes


@pytest.mark.row("H-35", "H-36", "H-54", "E4")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_page_and_counter_agree_while_the_clock_changes(operation: Callable[[Machine], None]) -> None:
    """On two vCPUs page <= counter <= page throughout, no reading goes back, and sequences are legal and new."""
    with reading_guest() as machine:
        operate(machine, operation, TRIPLES)
        wait_for(machine, "triples", 2)  # the last of them after the last operation: a vCPU may have slept through all
        records = finish(machine)
    assert_no_violations(records)
    assert all(record.triples >= TRIPLES for record in records)
    if operation is refresh:
        assert all(record.sequences == 0 for record in records)
    else:
        assert all(record.sequences > 0 for record in records)


@pytest.mark.stress
@pytest.mark.long
@pytest.mark.row("H-35", "H-36", "H-54", "E4")
def test_a_hundred_thousand_triples_while_the_clock_changes() -> None:
    """10^5 readings of page, counter, page on two vCPUs during all operations in turn: no violation."""
    with reading_guest() as machine:
        turn = 0
        while sum(record.triples for record in records_of(machine)) < MANY_TRIPLES:
            operate(machine, OPERATIONS[turn % len(OPERATIONS)], 500)
            turn += 1
        records = finish(machine)
    assert_no_violations(records)
    assert all(record.sequences > 0 for record in records)


@pytest.mark.row("E4", "H-51")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_guest_reads_what_the_timeline_says(operation: Callable[[Machine], None]) -> None:
    """After changes each vCPU's last reading of the page is within 2 units of the clock's timeline at its TSC."""
    with reading_guest() as machine:
        for _ in range(20):
            operation(machine)
        wait_for(machine, "triples", 50)
        clock = clock_of(machine)
        for vcpu, record in enumerate(finish(machine)):
            tsc = HostTsc((record.page_tsc - clock.tsc(vcpu).offset) % 2**64)
            assert abs(record.page_units - clock.at(tsc) / UNIT_NS) <= BOUND_UNITS


@pytest.mark.row("H-36", "H-54", "E4")
def test_a_guest_that_boots_on_a_restored_clock_reads_on() -> None:
    """In another machine with the saved clock, a guest reads nothing below what the first one's vCPUs have read."""
    with reading_guest() as machine:
        wait_for(machine, "triples", 50)
        machine.pause()
        state, newest = machine.save(), block_of(machine).shared_last
        sequence = max(record.sequence for record in records_of(machine))
    with hyperv_machine("rounds=200", restore=state) as again:
        again.start()
        assert again.wait(HANG_S) == probe.EXIT_FINE
        records = records_of(again)
    assert_no_violations(records)
    for record in records:
        assert record.first_units >= newest
        assert record.first_sequence > sequence


# Broken on purpose: the probe is no rubber stamp


@contextmanager
def guest_to_deceive() -> Iterator[Machine]:
    """A guest of one vCPU that has found nothing wrong, and has more than an hour of guest time behind it."""
    with reading_guest(vcpus=1) as machine:
        clock_of(machine).skip(2 * HOUR * UNIT_NS)
        wait_for(machine, "triples", 10)
        assert_no_violations(records_of(machine))
        yield machine


def change_page(machine: Machine, *, sequence: int = 1, units: int = 0) -> None:
    """Add to the page's sequence and to its offset while no vCPU reads, as no publish may."""
    with machine.runner.quiesce():
        page = oracle.ReferenceTscPage.parse(machine.memory.read(REFERENCE_PAGE, 24))
        changed = ((page.sequence + sequence) % 2**32, page.reserved, page.scale, page.offset + units)
        machine.memory.write(REFERENCE_PAGE, struct.pack("<IIQq", *changed))


def turn_back(machine: Machine) -> None:
    """The page goes back by an hour."""
    change_page(machine, units=-HOUR)


def put_ahead(machine: Machine) -> None:
    """The page goes on an hour ahead of the counter."""
    change_page(machine, units=HOUR)


def change_without_sequence(machine: Machine) -> None:
    """The line changes, and its sequence stays."""
    change_page(machine, sequence=0, units=1)


def repeat_sequence(machine: Machine) -> None:
    """An earlier sequence comes back."""
    change_page(machine, sequence=4)
    wait_for(machine, "rounds", 5)
    change_page(machine, sequence=-2)


def use_reserved_sequence(machine: Machine) -> None:
    """The page shows the sequence that the TLFS reserves."""
    machine.memory.write(REFERENCE_PAGE, RESERVED_SEQUENCE.to_bytes(4, "little"))


BROKEN: Final = [
    (turn_back, "backward_own"),
    (turn_back, "counter_above_page"),
    (put_ahead, "page_above_counter"),
    (change_without_sequence, "torn"),
    (repeat_sequence, "sequence_back"),
    (use_reserved_sequence, "sequence_reserved"),
]


@pytest.mark.row("H-54", "E4")
@pytest.mark.parametrize(("sabotage", "kind"), BROKEN)
def test_hvprobe_sees_a_broken_page(sabotage: Callable[[Machine], None], kind: str) -> None:
    """Each kind of broken page is counted, and was not before it was broken."""
    with guest_to_deceive() as machine:
        sabotage(machine)
        wait_for(machine, "rounds", 20)
        (record,) = finish(machine)
    assert violations(record)[kind] > 0


@pytest.mark.row("E4")
def test_hvprobe_sees_vcpus_that_disagree() -> None:
    """A vCPU counts readings below the newest of all vCPUs' (here put an hour ahead), though its own go forward."""
    with reading_guest() as machine:
        wait_for(machine, "triples", 10)
        assert_no_violations(records_of(machine))
        with machine.runner.quiesce():
            ahead = block_of(machine).shared_last + HOUR
            machine.memory.write(SHARED_LAST, ahead.to_bytes(8, "little"))
        wait_for(machine, "rounds", 5)
        records = finish(machine)
    for record in records:
        assert record.backward_cross > 0
        assert record.backward_own == 0
        assert 0 < record.worst_back <= HOUR
        assert record.back_from == ahead


@pytest.mark.row("H-54")
@pytest.mark.parametrize(("order", "uses_it"), [(0, True), (3, False)])
def test_the_reserved_sequence_in_either_order(order: int, uses_it: bool) -> None:
    """Linux uses a page under 0xffffffff; by the TLFS, and so in Windows, it is not valid, and the counter is read."""
    with reading_guest(f"order={order}", vcpus=1) as machine:
        use_reserved_sequence(machine)
        wait_for(machine, "rounds", 2)
        (before,) = records_of(machine)
        wait_for(machine, "rounds", 20)
        (after,) = finish(machine)
    assert after.sequence_reserved > before.sequence_reserved
    assert (after.triples > before.triples) == uses_it
    assert (after.fallbacks > before.fallbacks) == (not uses_it)


@pytest.mark.row("H-35")
@pytest.mark.parametrize(("units", "kind"), [(-HOUR, "page_above_counter"), (HOUR, "counter_above_page")])
def test_hvprobe_sees_a_broken_counter(monkeypatch: pytest.MonkeyPatch, units: int, kind: str) -> None:
    """A counter that is an hour behind the page, or ahead of it, is counted."""
    with guest_to_deceive() as machine:
        read_msr = machine.clock_service.read_msr
        monkeypatch.setattr(machine.clock_service, "read_msr", lambda vcpu, index: read_msr(vcpu, index) + units)
        wait_for(machine, "rounds", 20)
        (record,) = finish(machine)
    assert violations(record)[kind] > 0
