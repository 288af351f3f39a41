"""What a watch shows while it goes on: a table that is redrawn, a line a finding in a pipe, or JSON lines."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, Protocol

from rich.text import Text

from pvclock import HostTsc
from pvclock.commands.report import line_json
from pvclock.commands.screen import Screen, write
from pvclock.meter.watch.changes import Disagreement, FlagsChange, PageLost, Stall, Step
from pvclock.meter.watch.loop import Finding, Look, WatchLoop
from pvclock.meter.watch.page_finder import PagesFound
from pvclock.meter.watch.vm import VmEvent
from qemu_glue.watch.instants import Instants, utc_text
from qemu_glue.watch.records import finding_record, rate_records, vm_record
from qemu_glue.watch.sentences import sentences
from qemu_glue.watch.tables import vcpu_table
from qemu_glue.watch.words import duration, time_of_day

__all__ = ["JsonView", "LinesView", "LiveView", "View"]

REDRAW_S: Final = 0.5
KEPT: Final = 8
"""Findings shown below the table."""
RATES_MAX_S: Final = 60.0
RATES_FIRST_S: Final = 2.0


class View(Protocol):
    """Shows a watch while it goes on."""

    def begin(self, found: PagesFound) -> None:
        """The pages were found; the watch begins."""

    def show(self, look: Look) -> None:
        """Show what a look brought."""


class JsonView:
    """A line of JSON for each finding, and now and then one of the rates."""

    def __init__(self, loop: WatchLoop, instants: Instants) -> None:
        self._loop, self._instants = loop, instants
        self._rates_s, self._next_rates_s = 0.0, RATES_FIRST_S

    def begin(self, found: PagesFound) -> None:
        """See View."""
        self._write(finding_record(found), time.time_ns())

    def show(self, look: Look) -> None:
        """See View."""
        for finding in look.findings:
            self._write(finding_record(finding), utc_ns(finding, look, self._instants))
        now_ns = time.time_ns()
        if self._instants.since_begin_s(now_ns) >= self._next_rates_s:
            self._next_rates_s += min(self._next_rates_s, RATES_MAX_S)
            self._write({"kind": "rate", "reference": self._loop.reference, "rates": rate_records(self._loop)}, now_ns)

    def _write(self, record: dict[str, object], at_utc_ns: int) -> None:
        ...
