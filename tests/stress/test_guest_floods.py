"""A guest that does one thing as fast as it can: the VMM's events are all there, and the VMM waits for nobody."""

from __future__ import annotations

import threading
import time
from collections import Counter
from fractions import Fraction
from itertools import product

import pytest

from pvclock import GuestClock, GuestMemory, HostBackend, SimulatedBackend
from pvclock._guest_budget import GUEST_BURST
from pvclock.clock.timer_thread import REST_NS, TimerThread
from pvclock.timekeeping.events import Event, EventCause, EventKind
from tests.unit.clocks import a_clock
from tests.unit.stub_clock import NotedVmm
from tests.waiting import HANG_S, wait_until

pytestmark = pytest.mark.stress

HZ = 10**9
WRITES = 100_000
OPERATIONS = 100

HV_X64_MSR_RESET = 0x40000003
HV_X64_MSR_TIME_REF_COUNT = 0x40000020
HV_X64_MSR_REFERENCE_TSC = 0x40000021
HV_X64_MSR_STIMER0_CONFIG = 0x400000B0
HV_X64_MSR_CRASH_P0 = 0x40000100
HV_X64_MSR_CRASH_CTL = 0x40000105
DIRECT_PERIODIC = 1 << 12 | 1 << 1 | 1 << 0


@pytest.mark.row("E15", "E9")
def test_a_flood_of_wrmsr_beside_a_blocked_subscriber() -> None:
    """100,000 WRMSR 0x3b: each of 100 dilations is recorded, told and not waited for; the guest's are counted."""
    clock, _, _ = a_clock(HZ)
    entered, hold, told = threading.Event(), threading.Event(), list[Event]()

    def block(event: Event) -> None:
        entered.set()
        assert hold.wait(HANG_S)
        told.append(event)

    unsubscribe = clock.events.subscribe(block)
    for number in range(WRITES):
        clock.write_msr(0, 0x3B, number + 1)
        if number % (WRITES // OPERATIONS) == 0:
            clock.dilate(number + 1, WRITES)
            assert entered.wait(HANG_S)
    assert not told
    batch = clock.events.read()
    rates = [event.rate_after for event in batch.events if event.kind is EventKind.DILATE]
    assert rates == [Fraction(1000 * each + 1, WRITES) for each in range(OPERATIONS)]
    assert Counter(event.cause for event in batch.events)[EventCause.GUEST] == GUEST_BURST
    guests_page = 1
    assert clock.events.suppressed == guests_page + WRITES - GUEST_BURST
    assert batch.lost == 0
    hold.set()
    assert clock.events.flush(HANG_S)
    assert told == [event for event in batch.events if event.sequence >= told[0].sequence]
    assert sum(event.kind is EventKind.DILATE for event in told) == OPERATIONS
    assert clock.read_msr(0, 0x3B) == WRITES
    unsubscribe()


@pytest.mark.row("H-22", "H-70", "E9", "E15")
def test_a_flood_of_crash_reports_and_resets() -> None:
    """10,000 of each: the VMM is asked for each reset, 20 reports are recorded, and each of its dilations is."""
    vmm, reports, operations = NotedVmm(), 10_000, 50
    backend = SimulatedBackend(HZ, 1 << 50)
    clock = GuestClock(GuestMemory(bytearray(1 << 14)), 1, "HyperV", backend=backend, vmm=vmm)
    for number in range(reports):
        clock.write_msr(0, HV_X64_MSR_CRASH_P0, number)
        clock.write_msr(0, HV_X64_MSR_CRASH_CTL, 1 << 63)
        clock.write_msr(0, HV_X64_MSR_RESET, 1)
        if number % (reports // operations) == 0:
            clock.dilate(number + 1, reports)
    kinds = Counter(event.kind for event in clock.events.read().events)
    assert (kinds[EventKind.DILATE], kinds[EventKind.CRASH]) == (operations, 20)
    assert len(clock.events) <= clock.events.capacity
    assert vmm.notes == [("request_reset",)] * reports


@pytest.mark.row("H-35", "H-54", "E9", "E11")
def test_a_flood_of_counter_reads_beside_a_vmm() -> None:
    """Two vCPUs that do nothing but read the counter: it never goes back, and dilations beside them come to an end."""
    clock = GuestClock(GuestMemory(bytearray(1 << 14)), 2, "HyperV", backend=HostBackend())
    clock.write_msr(0, HV_X64_MSR_REFERENCE_TSC, 0x1001)
    over, least_step, reads = threading.Event(), [0, 0], [0, 0]

    def flood(vcpu: int) -> None:
        last = 0
        while not over.is_set():
            units = clock.read_msr(vcpu, HV_X64_MSR_TIME_REF_COUNT)
            least_step[vcpu] = min(least_step[vcpu], units - last)
            last, reads[vcpu] = units, reads[vcpu] + 1

    threads = [threading.Thread(target=flood, args=(vcpu,), daemon=True) for vcpu in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: min(reads) > 0)
    for number in range(OPERATIONS):
        clock.dilate(number + 1, OPERATIONS)
    flooded = max(reads)
    wait_until(lambda: min(reads) > flooded + OPERATIONS)  # so each has read before and after them
    over.set()
    for thread in threads:
        thread.join(HANG_S)
    assert least_step == [0, 0]
    assert sum(event.kind is EventKind.DILATE for event in clock.events.read().events) == OPERATIONS


@pytest.mark.row("H-42", "E9", "E11")
def test_a_flood_of_timers_of_100_ns() -> None:
    """Eight timers that are always due: periods that have ended are one expiry, and the VMM's operations come through.

    Between two expiries the thread rests, so it takes the clock's lock so many times a second at most.
    """
    vmm = NotedVmm()
    clock = GuestClock(GuestMemory(bytearray(1 << 14)), 2, "HyperV", backend=HostBackend(), vmm=vmm)
    for vcpu, timer in product(range(2), range(4)):
        clock.write_msr(vcpu, HV_X64_MSR_STIMER0_CONFIG + 2 * timer, DIRECT_PERIODIC | (0x20 + timer) << 4)
        clock.write_msr(vcpu, HV_X64_MSR_STIMER0_CONFIG + 2 * timer + 1, 1)
    every = [("inject", vcpu, 0x20 + timer) for vcpu, timer in product(range(2), range(4))]
    begun_ns = time.monotonic_ns()
    with TimerThread(clock) as timers:
        for _ in range(OPERATIONS):
            clock.skip(10**9)
            time.sleep(0.0005)
        wait_until(lambda: min(map(vmm.notes.count, every)) > OPERATIONS // 10)
        clock.pause()
        assert timers.settle(HANG_S)
        told = len(vmm.notes)
        time.sleep(0.01)
        assert len(vmm.notes) == told, "an interrupt after the pause"
    passed_ns = time.monotonic_ns() - begun_ns
    raised = Counter(vmm.notes)
    assert set(raised) == set(every)
    assert not timers.failures
    assert max(raised.values()) <= 2 * (passed_ns // REST_NS + OPERATIONS)
