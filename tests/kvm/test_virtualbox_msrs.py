"""Profile "virtualbox" on a real vCPU: which of its MSR accesses come to the engine, and what becomes of them."""

from __future__ import annotations

import pytest

from pvclock import GuestClock, Machine
from tests.kvm.msr_script import Access, outcomes_of, scripted

pytestmark = pytest.mark.kvm

SYSTEM_TIME, SYSTEM_TIME_NEW = 0x12, 0x4B564D01
NOT_SERVED = (0x4B564D02, 0x4B564D03, 0x4B564D04)
PAGE = 0x6000


def engine_of(machine: Machine) -> GuestClock:
    """The machine's clock, which is the engine's."""
    assert machine.clock is not None
    return machine.clock


@pytest.mark.row("V-10", "V-11", "V-06", "V-14")
@pytest.mark.parametrize(
    ("index", "gpa"), [(SYSTEM_TIME, PAGE), (SYSTEM_TIME_NEW, PAGE + 2), (SYSTEM_TIME_NEW, PAGE + 0xFF0)]
)
def test_registrations_come_to_the_engine(index: int, gpa: int) -> None:
    """The guest's write leaves the kernel, and the page has the TSC of that instant and ns since TSC 0, anywhere."""
    accesses = [Access(index, gpa | 1, gpa)] * 2
    with scripted(accesses, "engine", profile="virtualbox") as machine:
        hz = engine_of(machine).tsc_hz
        first, second = (outcome.page for outcome in outcomes_of(machine, 2))
    assert [(page.version, page.flags) for page in (first, second)] == [(2, 1), (4, 1)]
    assert first.tsc_timestamp < second.tsc_timestamp
    for page in (first, second):
        assert page.system_time == page.tsc_timestamp * 10**9 // (hz % 2**32)


@pytest.mark.row("V-09", "V-06")
def test_what_is_not_served_faults_and_is_told() -> None:
    """Reads and writes of the page-fault, steal-time and PV EOI MSRs are #GP, and a line each in the VMM's log."""
    accesses = [Access(index, value) for index in NOT_SERVED for value in (None, 0, 0x5001)]
    with scripted(accesses, "engine", profile="virtualbox") as machine:
        outcomes = outcomes_of(machine, len(accesses))
        told = [event.why for event in engine_of(machine).events.read().events if str(event.kind) == "refused"]
    assert [(outcome.faulted, outcome.value) for outcome in outcomes] == [
        (True, 0 if access.value is None else access.value) for access in accesses
    ]
    assert len(told) == len(accesses)
    assert all(f"{access.msr:#x}" in why for access, why in zip(accesses, told, strict=True))
