"""Tables that cut nothing: words, numbers and identifiers stay whole, and prose wraps between them.

All commands make their tables here.  rich draws them; this module decides how wide a column is, for rich would cut.
"""

from __future__ import annotations

from typing import Final

import rich.table
from rich.box import HEAVY_HEAD
from rich.cells import cell_len
from rich.table import Column
from rich.text import Text

__all__ = ["Table", "verdict"]

WORD_MAX: Final = 48
"""Cells of a word that is never folded: longer than any identifier; numbers of hundreds of digits need not fit."""
BORDER: Final = 3
"""Columns of a terminal that a column needs beside its cells: a space on either side, and a line."""


class Table:
    """Rows of cells below their headings.  A cell is a text, or rich's Text for one in colour; never markup."""

    def __init__(self, *headings: str) -> None:
        self._headings = headings
        self._rows: list[list[Text]] = []
        self._section_ends: set[int] = set()

    def add_row(self, *cells: str | Text) -> None:
        """Add a row; missing cells are empty."""
        texts = [cell if isinstance(cell, Text) else Text(cell) for cell in cells]
        self._rows.append(texts + [Text()] * (len(self._headings) - len(cells)))

    def end_section(self) -> None:
        """Draw a line below the last row."""
        self._section_ends.add(len(self._rows) - 1)

    def fitted(self, columns: int | None) -> rich.table.Table:
        """The table for a terminal of `columns`, wider only if its words are.

        None, for a pipe or a file: one line a row, however long, and no lines drawn.
        """
        rows = self._rows if columns else [list(map(_on_one_line, row)) for row in self._rows]
        widths = self._widths(rows, columns)
        headings = zip(self._headings, widths, strict=True)
        drawn = rich.table.Table(
            *(Column(Text(name), width=width, overflow="fold") for name, width in headings),
            box=HEAVY_HEAD if columns else None,
            pad_edge=columns is not None,
        )
        for number, row in enumerate(rows):
            drawn.add_row(*row, end_section=number in self._section_ends)
        return drawn

    def _widths(self, rows: list[list[Text]], columns: int | None) -> list[int]:
        cells = [[Text(heading), *column] for heading, *column in zip(self._headings, *rows, strict=True)]
        widths = [max(map(_line_width, column)) for column in cells]
        if columns is None:
            return widths
        least = [min(WORD_MAX, max(map(_word_width, column))) for column in cells]
        room = columns - BORDER * len(widths) - 1
        while sum(widths) > room and widths != least:
            widest = max(range(len(widths)), key=lambda n: widths[n] if widths[n] > least[n] else 0)
            widths[widest] = max(widths[widest] - 1, least[widest])
        return widths


def verdict(ok: bool, *, warning: bool = False) -> Text:
    """A green yes, or a red NO; a yellow no for a warning."""
    if ok:
        return Text("yes", style="green")
    return Text("no", style="yellow") if warning else Text("NO", style="red")


def _on_one_line(cell: Text) -> Text:
    return Text("; ").join(cell.split("\n"))


def _line_width(cell: Text) -> int:
    return max(map(cell_len, cell.plain.split("\n")))


def _word_width(cell: Text) -> int:
    return max(map(cell_len, cell.plain.split()), default=0)
