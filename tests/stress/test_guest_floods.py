"""A guest that causes events as fast as it can: the VMM's are all there, and the VMM waits for nobody."""

from __future__ import annotations

import threading
from collections import Counter
from fractions import Fraction

import pytest

from pvclock.clock.event_log import GUEST_BURST
from pvclock.timekeeping.events import Event, EventCause, EventKind
from tests.unit.clocks import a_clock
from tests.waiting import HANG_S

pytestmark = pytest.mark.stress

HZ = 10**9
WRITES = 100_000
OPERATIONS = 100


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
