"""Threads that work at rounds of items."""

from __future__ import annotations

import queue
import threading
import time

import pytest

from pvclock.clock.tick_workers import Workers
from tests.waiting import HANG_S


@pytest.mark.row("E11", "E9")
def test_a_round_that_was_cut_short_is_not_in_the_way_of_the_next() -> None:
    """What a dismissed thread had not come to is not worked at later, and the next round is begun at once."""
    entered, hold, done = threading.Event(), threading.Event(), queue.SimpleQueue[int]()

    def work(item: int) -> None:
        if item == 1:
            entered.set()
            assert hold.wait(HANG_S)
        done.put(item)

    workers = Workers(work)
    workers.begin()
    workers.hand_out([1, 2])
    assert entered.wait(HANG_S)
    left = workers.dismiss()
    workers.begin()
    workers.hand_out([1, 3])
    assert done.get(timeout=HANG_S) == 3
    left |= workers.dismiss()
    hold.set()
    assert workers.wait(left, time.monotonic() + HANG_S) == ()
    assert done.get(timeout=HANG_S) == 1
    assert done.empty()
