"""What a watch shows while it goes on: a table that is redrawn, a line a finding in a pipe, or lines of JSON."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, Protocol

from rich.text import Text

from pvclock import HostTsc
from pvclock.commands.tables import Table
from pvclock.meter.watch.ahead import Ahead
from pvclock.meter.watch.changes import TOLD_STALL_NS, Disagreement, PageLost, Stall, Step
from pvclock.meter.watch.host_troubles import HostTrouble
from pvclock.meter.watch.loop import Finding, Look, VmEnded, WatchLoop
from pvclock.meter.watch.page_finder import PagesFound
from pvclock.meter.watch.sentences import addresses_in_words, sentences
from pvclock.meter.watch.vm import VmEvent
from pvclock.meter.watch.words import counted, duration, plain_ns, time_of_day
from qemu_glue.watch.instants import Instants
from qemu_glue.watch.json_lines import JsonLines
from qemu_glue.watch.records import finding_record, rate_records, reading_record, vm_record
from qemu_glue.watch.tables import vcpu_table

__all__ = ["JsonView", "LinesView", "LiveView", "View", "first_lines"]

REDRAW_S: Final = 0.5
KEPT: Final = 8
"""Findings that stay below the table."""
AROUND_ROWS: Final = 16
"""Lines of a terminal that are not the table's rows."""
AHEAD_COLUMNS: Final = 100
"""A terminal that has room for one column of the table more."""
RATES_FIRST_S, RATES_MAX_S = 2.0, 60.0
US_PER_S: Final = 1_000_000


class View(Protocol):
    """Shows a watch while it goes on."""

    def show(self, look: Look) -> None:
        """Show what a look brought."""


class ShowsLines(Protocol):
    """A screen, or one that has a VM's name before each line."""

    def show(self, *parts: Table | Text | str) -> None:
        """See Screen."""


class JsonView:
    """A line of JSON for each finding, once a second one of the readings, and now and then one of the rates.

    found: the pages, before they were first looked at, which began at `since`.
    """

    def __init__(self, loop: WatchLoop, lines: JsonLines, found: PagesFound, since: HostTsc) -> None:
        self._loop, self._lines = loop, lines
        self._begin_s = time.monotonic()
        self._next_rates_s = RATES_FIRST_S
        lines.write({**finding_record(found), **vm_record(loop)}, lines.instants.utc_ns(since))

    def show(self, look: Look) -> None:
        """See View."""
        for finding in look.findings:
            self._lines.write(finding_record(finding), _utc_ns(finding, look.poll.end, self._lines.instants))
        if look.readings:
            at_utc_ns = self._lines.instants.utc_ns(look.poll.end)
            self._lines.write(reading_record(self._loop.reference, look.readings), at_utc_ns)
        if time.monotonic() - self._begin_s >= self._next_rates_s:
            self._next_rates_s += min(self._next_rates_s, RATES_MAX_S)
            rates = rate_records(self._loop)
            self._lines.write({"kind": "rate", "reference": self._loop.reference, "rates": rates})


class LinesView:
    """A line for each finding, as it is made."""

    def __init__(self, screen: ShowsLines, instants: Instants) -> None:
        self._screen, self._instants = screen, instants

    def show(self, look: Look) -> None:
        """See View."""
        for line in _told(look, self._instants):
            self._screen.show(line)


class LiveView:
    """A table of the vCPUs as they are, and the last findings below it; `draw` replaces what was drawn before."""

    def __init__(self, loop: WatchLoop, instants: Instants, draw: Callable[..., None]) -> None:
        self._loop, self._instants, self._draw = loop, instants, draw
        self._told: deque[Text] = deque(maxlen=KEPT)
        self._last_steps: dict[int, Step] = {}
        self._readings: tuple[Ahead, ...] = ()
        self._next_draw_s = 0.0

    def show(self, look: Look) -> None:
        """See View."""
        self._told += _told(look, self._instants)
        self._readings = look.readings or self._readings
        if any(isinstance(finding, PagesFound) for finding in look.findings):
            self._last_steps, self._next_draw_s = {}, 0.0  # other pages than this look's
            return
        self._last_steps |= {finding.vcpu: finding for finding in look.findings if isinstance(finding, Step)}
        if look.findings or time.monotonic() >= self._next_draw_s:
            self._next_draw_s = time.monotonic() + REDRAW_S
            self._draw(*self._parts(look))

    def _parts(self, look: Look) -> Iterator[object]:
        columns, lines = shutil.get_terminal_size()
        rows = max(lines - AROUND_ROWS, 1)
        ahead = self._readings if columns >= AHEAD_COLUMNS else None
        yield vcpu_table(self._loop, look, self._last_steps, rows, ahead)
        hidden = len(self._loop.finder.pages) - rows
        if hidden > 0:
            yield f"and {counted(hidden, 'vCPU')} more"
        yield from self._told
        yield Text("; ".join(self._state()), "dim")

    def _state(self) -> Iterator[str]:
        summary = self._loop.watcher.summary
        yield f"watched for {duration(summary.duration_ns)}, {counted(summary.polls, 'look')}"
        yield from ["the guest is stopped"] * bool(self._loop.is_paused)
        yield from ["its pages are searched again"] * self._loop.finder.is_searching
        yield "Ctrl-C ends"


def first_lines(loop: WatchLoop, found: PagesFound) -> Iterator[Text]:
    """What is said of a VM once its pages are found: where they are, and what cannot be seen of it."""
    vm = loop.vm
    interval = plain_ns(round(loop.interval_s * US_PER_S) * 1000)
    yield Text(f"{vm.name}: watching {addresses_in_words(found.pages)}, every {interval}")
    if loop.is_paused:
        yield Text("The guest is stopped.", "yellow")
    for lacking, why in (("clock readings", vm.why_no_offsets), ("causes of steps", vm.why_no_events)):
        if why is not None:
            yield Text(f"No {lacking}: {why}", "yellow")
    if loop.finder.doubt is not None:
        yield Text(f"Perhaps not the guest's: {loop.finder.doubt}", "yellow")


def _told(look: Look, instants: Instants) -> Iterator[Text]:
    """Each finding as a line for people, with the time of day."""
    told = [each for each in look.findings if not (isinstance(each, Stall) and each.gap_ns < TOLD_STALL_NS)]
    for finding, sentence in sentences(told):
        when = time_of_day(_utc_ns(finding, look.poll.end, instants))
        yield Text.assemble((f"{when} ", "dim"), (sentence, _style(finding)))


def _utc_ns(finding: Finding, now: HostTsc, instants: Instants) -> int:
    """When it was, as far as it says; else now."""
    if isinstance(finding, VmEvent):
        return finding.utc_ns
    if isinstance(finding, PagesFound | HostTrouble | VmEnded):
        return instants.utc_ns(now)
    begin_ns = finding.least_ns if isinstance(finding, Disagreement) else 0
    return instants.utc_ns(finding.at) - begin_ns


def _style(finding: Finding) -> str:
    match finding:
        case Disagreement() | PageLost() | HostTrouble():
            return "red"
        case Step(step_ns=step_ns) if step_ns is None or abs(step_ns) > 1:
            return "yellow"
    return ""
