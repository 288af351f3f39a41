"""What is shown of a fleet: each VM's findings with its name, as lines or as JSON, and a row a VM at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Final

from rich.text import Text

from pvclock import HostTsc
from pvclock.commands.screen import Screen
from pvclock.commands.tables import Table
from pvclock.meter.watch.budgets import Verdict
from pvclock.meter.watch.host_troubles import HostTrouble
from pvclock.meter.watch.loop import Look, WatchLoop
from pvclock.meter.watch.page_finder import PagesFound
from pvclock.meter.watch.words import about_ns, counted, duration, time_of_day
from qemu_glue.watch.instants import Instants
from qemu_glue.watch.json_lines import JsonLines
from qemu_glue.watch.records import finding_record
from qemu_glue.watch.tables import rates_in_words
from qemu_glue.watch.verdict import verdict_in_words
from qemu_glue.watch.views import JsonView, LinesView, View, first_lines

__all__ = ["FleetView", "NamedScreen", "VmView", "fleet_row", "fleet_table", "verdict_lines"]

HEADINGS: Final = ("VM", "watched for", "new lines", "greatest step", "disagreements", "rate", "verdict")


class NamedScreen:
    """A screen on which each line begins with a VM's name."""

    def __init__(self, screen: Screen, name: str) -> None:
        self._screen, self._name = screen, name

    def show(self, *parts: Table | Text | str) -> None:
        """As Screen.show(); tables have no name before them."""
        for part in parts:
            self._screen.show(part if isinstance(part, Table) else Text.assemble((f"{self._name}: ", "bold"), part))


class FleetView:
    """What is said of the fleet as a whole.  fails: told of an error of standard output, in any thread."""

    def __init__(
        self, screen: Screen, instants: Instants, fails: Callable[[OSError], None], *, is_json: bool = False
    ) -> None:
        self.instants = instants
        self._screen, self._fails, self._is_json = screen, fails, is_json

    def of(self, name: str) -> VmView:
        """A VM's view."""
        return VmView(self, self._screen, name, is_json=self._is_json)

    def do(self, show: Callable[[], object]) -> None:
        """Show something; an error of that is the fleet's and not the VM's whose thread it came in."""
        try:
            show()
        except OSError as error:
            self._fails(error)

    def left(self, name: str, why: str) -> None:
        """A VM is watched no more, or cannot be."""
        if self._is_json:
            self.do(lambda: JsonLines(self.instants, name).write({"kind": "left", "why": why}))
        else:
            told = Text.assemble((f"{self._time_of_day()} ", "dim"), (f"left: {why}", "red"))
            self.do(lambda: NamedScreen(self._screen, name).show(told))

    def host(self, trouble: HostTrouble) -> None:
        """Something is wrong with the host's clocks."""
        if self._is_json:
            self.do(lambda: JsonLines(self.instants).write({**finding_record(trouble), "vm": None}))
        else:
            told = Text.assemble((f"{self._time_of_day()} ", "dim"), (f"the host: {trouble.why}", "red"))
            self.do(lambda: self._screen.show(told))

    def waits(self) -> None:
        """There is no VM, and that is no error."""
        if not self._is_json:
            self.do(lambda: self._screen.show("no VM yet: waiting for one"))

    def _time_of_day(self) -> str:
        return time_of_day(time.time_ns())


class VmView:
    """One VM's findings, with its name."""

    def __init__(self, fleet: FleetView, screen: Screen, name: str, *, is_json: bool) -> None:
        self._fleet, self._name, self._is_json = fleet, name, is_json
        self._screen = NamedScreen(screen, name)
        self._view: View | None = None

    def begin(self, loop: WatchLoop, found: PagesFound, first: Look) -> View:
        """See Shows."""
        self._fleet.do(lambda: self._begin(loop, found, first.poll.begin))
        return self

    def show(self, look: Look) -> None:
        """See View."""
        if self._view is not None:
            view = self._view
            self._fleet.do(lambda: view.show(look))

    def _begin(self, loop: WatchLoop, found: PagesFound, since: HostTsc) -> None:
        if self._is_json:
            self._view = JsonView(loop, JsonLines(self._fleet.instants, self._name), found, since)
            return
        self._screen.show(*first_lines(loop, found))
        self._view = LinesView(self._screen, self._fleet.instants)


def fleet_row(name: str, loop: WatchLoop, verdict: Verdict | None) -> list[str | Text]:
    """A VM's row: what its watch came to."""
    summary = loop.watcher.summary
    steps = [step.step_ns or 0 for step in (summary.forward, summary.backward) if step is not None]
    greatest = max(steps, key=abs, default=None)
    return [
        name,
        f"{duration(summary.duration_ns)}, {counted(summary.polls, 'look')}",
        f"{summary.lines:,}",
        "none" if greatest is None else about_ns(greatest),
        f"{summary.disagreements:,}",
        rates_in_words(loop.rates()),
        "-" if verdict is None else verdict.status.value,
    ]


def fleet_table(rows: Iterable[list[str | Text]]) -> Table:
    """A row a VM."""
    table = Table(*HEADINGS)
    for row in rows:
        table.add_row(*row)
    return table


def verdict_lines(name: str, verdict: Verdict | None) -> list[Text]:
    """What a VM's verdict rests on, with its name."""
    return [Text.assemble((f"{name}: ", "bold"), line) for line in verdict_in_words(verdict)]
