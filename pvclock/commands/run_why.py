"""What wakes an idle guest, for `pvclock run --why`: the timers that travel went to, and a Linux's trace of its work.

A stock kernel has trace points for timers and work that run, and prints them to its console if its command line says
so; what it prints is passed on as all of its output is, and counted here.

Source: Linux's Documentation/trace/events.rst, and tp_printk, trace_event in admin-guide/kernel-parameters.txt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from pvclock.machine.time_travel import Look
from pvclock.quantities import NS_PER_S
from pvclock.timekeeping.travel import Skip

if TYPE_CHECKING:  # it takes longer to load than most runs need it
    from pvclock.commands.tables import Table

__all__ = ["TRACE_OPTIONS", "WakeCounts", "rows", "wakes_table"]

TRACE_OPTIONS: Final = "trace_event=timer:timer_expire_entry,workqueue:workqueue_execute_start tp_printk loglevel=5"
"""For a Linux's command line.  No hrtimers: its ticks are some, 250 a second while it runs, and a line may take longer
than a tick.  None of scheduler events: they are traced under locks that printing may want."""

TRACED: Final = re.compile(rb"\b(timer_expire_entry|workqueue_execute_start): .*function[ =](\S+)")
KINDS: Final = {b"timer_expire_entry": "timer", b"workqueue_execute_start": "work"}
CAUSES_MAX: Final = 1000
"""Different ones that are counted: the guest chooses their names."""


class Count(NamedTuple):
    """How often one cause came, and from when to when of guest time."""

    times: int
    first_ns: int
    last_ns: int


class WakeCounts:
    """Counts by cause.

    Thread-safety: one thread calls line(), and another may call look().
    """

    def __init__(self) -> None:
        self.timers: dict[str, Count] = {}
        """Of skips: the timer, or event, that each was for."""
        self.work: dict[str, Count] = {}
        """Of the guest's trace: "work vmstat_update", "timer process_timeout", ..."""
        self._guest_ns = 0

    def look(self, look: Look) -> None:
        """Take a decision of the travel's."""
        self._guest_ns = look.guest_ns
        if isinstance(look.decision, Skip):
            _add(self.timers, str(look.decision.wake), look.guest_ns)

    def line(self, line: bytes) -> None:
        """Take a line of the guest's console."""
        if found := TRACED.search(line):
            _add(self.work, f"{KINDS[found[1]]} {found[2].decode(errors='replace')}", self._guest_ns)

    def documented(self) -> dict[str, object]:
        """For JSON: see docs/commands.md."""
        return {"timers": _documented(self.timers), "work": _documented(self.work)}


def wakes_table(counts: WakeCounts) -> Table:
    """For people, the most frequent first."""
    from pvclock.commands.tables import Table

    table = Table("what woke it", "times", "every")
    for causes in (counts.timers, counts.work):
        for row in rows(causes):
            table.add_row(*row)
        table.end_section()
    return table


def rows(causes: Mapping[str, Count]) -> list[tuple[str, str, str]]:
    """Each cause, how often it came, and how long after the last one on average."""
    return [(cause, str(count.times), _interval(count)) for cause, count in _most_frequent(causes)]


# Inside


def _add(causes: dict[str, Count], cause: str, guest_ns: int) -> None:
    if (before := causes.get(cause)) is not None:
        causes[cause] = before._replace(times=before.times + 1, last_ns=guest_ns)
    elif len(causes) < CAUSES_MAX:
        causes[cause] = Count(1, guest_ns, guest_ns)


def _most_frequent(causes: Mapping[str, Count]) -> list[tuple[str, Count]]:
    return sorted(causes.items(), key=lambda item: -item[1].times)


def _documented(causes: Mapping[str, Count]) -> list[dict[str, object]]:
    return [
        {"cause": cause, "times": each.times, "first_s": each.first_ns / NS_PER_S, "last_s": each.last_ns / NS_PER_S}
        for cause, each in _most_frequent(causes)
    ]


def _interval(count: Count) -> str:
    if count.times < 2:
        return ""
    return f"{(count.last_ns - count.first_ns) / (count.times - 1) / NS_PER_S:.3f} s"
