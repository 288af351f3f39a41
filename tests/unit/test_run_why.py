"""What `pvclock run --why` counts: skips by what they went to, and the lines of a Linux's trace."""

from __future__ import annotations

import pytest

from pvclock.commands.run_why import CAUSES_MAX, WakeCounts, rows
from pvclock.machine.time_travel import Look
from pvclock.quantities import NS_PER_S
from pvclock.timekeeping.travel import IdleForever, Skip, Wake, WakeKind

pytestmark = pytest.mark.row("E17")


def look(guest_s: int, vcpu: int = 0) -> Look:
    """A skip to a vCPU's deadline."""
    return Look(guest_s * NS_PER_S, Skip(10, Wake(10, WakeKind.TSC_DEADLINE, vcpu)), 0)


def test_causes_are_counted() -> None:
    """Each with the guest times of its first and last one; the most frequent first."""
    counts = WakeCounts()
    counts.look(look(1, vcpu=1))
    for second in (2, 4, 6):
        counts.look(look(second))
        counts.line(b"[  2.5] workqueue_execute_start: work struct 00000000f1: function vmstat_update\r\n")
    counts.line(b"timer_expire_entry: timer=00000000e1 function=process_timeout now=4294967295 baseclk=4294967295\n")
    counts.look(Look(9, IdleForever(), 0))
    assert counts.documented() == {
        "timers": [
            {"cause": "vCPU 0's TSC deadline", "times": 3, "first_s": 2.0, "last_s": 6.0},
            {"cause": "vCPU 1's TSC deadline", "times": 1, "first_s": 1.0, "last_s": 1.0},
        ],
        "work": [
            {"cause": "work vmstat_update", "times": 3, "first_s": 2.0, "last_s": 6.0},
            {"cause": "timer process_timeout", "times": 1, "first_s": 6.0, "last_s": 6.0},
        ],
    }


def test_other_lines_are_none() -> None:
    """What a guest prints else is no wake, and a guest cannot fill the memory with names of its own."""
    counts = WakeCounts()
    for line in (
        b"hello\n",
        b"function=x\n",
        b"timer_expire_exit: timer=1\n",
        b"hrtimer_expire_entry: hrtimer=1 function=f now=1\n",
        b"\xff\n",
    ):
        counts.line(line)
    assert counts.work == {}
    for number in range(CAUSES_MAX + 10):
        counts.line(b"timer_expire_entry: timer=1 function=f%d now=1\n" % number)
    assert len(counts.work) == CAUSES_MAX


def test_the_intervals() -> None:
    """One that came once has no interval."""
    counts = WakeCounts()
    for second in (10, 13, 14):
        counts.look(look(second))
    counts.line(b"timer_expire_entry: timer=1 function=\xff now=1\n")
    assert rows(counts.timers) == [("vCPU 0's TSC deadline", "3", "2.000 s")]
    assert rows(counts.work) == [("timer \N{REPLACEMENT CHARACTER}", "1", "")]
