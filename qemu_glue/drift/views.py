"""What `pvclock drift` shows while it goes on: a table that is redrawn, lines of JSON, or nothing yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from rich.text import Text

from pvclock.commands.screen import write
from pvclock.meter.watch.words import duration
from qemu_glue.drift.records import DriftRecords
from qemu_glue.drift.tables import live_table

__all__ = ["DriftView", "JsonView", "LiveView", "QuietView"]

NS_PER_S: Final = 1_000_000_000


class DriftView(Protocol):
    """Shows the clocks after each round of readings."""

    def show(self, at_s: float) -> None:
        """Show the newest readings, at_s after the first."""


class JsonView:
    """A line of JSON for the beginning, and one for each round."""

    def __init__(self, records: DriftRecords) -> None:
        self._records = records
        write(records.lines[0] + "\n")

    def show(self, at_s: float) -> None:
        """See DriftView."""
        write(self._records.take(at_s) + "\n")


class QuietView:
    """Nothing, in a pipe: the summary comes at the end."""

    def __init__(self, records: DriftRecords) -> None:
        self._records = records

    def show(self, at_s: float) -> None:
        """See DriftView."""
        self._records.take(at_s)


class LiveView:
    """A table of the clocks as they are; `draw` replaces what was drawn before."""

    def __init__(self, records: DriftRecords, draw: Callable[..., None]) -> None:
        self._records, self._draw = records, draw

    def show(self, at_s: float) -> None:
        """See DriftView."""
        self._records.take(at_s)
        table = live_table(self._records.clocks, self._records.plan.reference)
        self._draw(table, Text(f"measured for {duration(round(at_s * NS_PER_S))}; Ctrl-C ends", "dim"))
