"""Where commands print: results on standard output, progress on standard error.

rich renders the text and this module writes it: so a failed write is an OSError that names standard output, and
nothing is left in a buffer for Python's exit.
"""

from __future__ import annotations

import io
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:  # rich takes longer to load than most commands, so it is loaded when something is drawn
    from rich.console import Console
    from rich.text import Text

    from pvclock.commands.tables import Table

__all__ = ["Screen", "write"]

UNBOUNDED: Final = 1 << 20
"""Columns, more than any line has: rich would cut longer ones."""

_TURN: Final = threading.Lock()
"""Who writes: a line of one thread is not cut by another's."""


class Screen:
    """A command's output for people.  `quiet`: nothing on standard output, where JSON goes."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._columns = _columns()

    def show(self, *parts: Table | Text | str) -> None:
        """Print tables, and texts that wrap between words.  OSError if standard output cannot be written."""
        if self._quiet:
            return
        for part in parts:
            write(_drawn(part, self._columns))

    @property
    def can_redraw(self) -> bool:
        """Is standard output a terminal on which what was drawn can be replaced, and for people?"""
        if self._quiet or not sys.stdout.isatty():
            return False
        from rich.console import Console

        return not Console(file=sys.stdout).is_dumb_terminal

    @contextmanager
    def redrawing(self) -> Iterator[Callable[..., None]]:
        """Draw on standard output what is replaced; yields a function that takes what show() takes.

        At the end nothing of it is left.  Only if can_redraw.
        """
        from rich.console import Console, Group
        from rich.live import Live

        from pvclock.commands.tables import Table

        console = Console(file=sys.stdout, markup=False, highlight=False, emoji=False)
        with Live(console=console, auto_refresh=False, transient=True) as live:

            def draw(*parts: Table | Text | str) -> None:
                columns = _columns()
                fitted = (part.fitted(columns) if isinstance(part, Table) else part for part in parts)
                live.update(Group(*fitted), refresh=True)

            yield draw

    def tell(self, text: str) -> None:
        """Print a line on standard error, with --json too."""
        print(text, file=sys.stderr, flush=True)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Show in a terminal what the command is waiting for."""
        with _aside().status(what):
            yield

    @contextmanager
    def progress(self, total: float, text: str) -> Iterator[Callable[[float, str], None]]:
        """Show in a terminal how much of `total` is done; yields a function that takes that and a text."""
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=_aside()) as bar:
            task = bar.add_task(text, total=total)
            yield lambda done, now: bar.update(task, completed=done, description=now)


def _aside() -> Console:
    """Where progress is drawn."""
    from rich.console import Console

    return Console(stderr=True, quiet=not sys.stderr.isatty())


def _drawn(part: Table | Text | str, columns: int | None) -> str:
    """`part` as rich renders it for standard output: coloured in a terminal; characters it cannot encode as escapes."""
    from rich.console import Console

    from pvclock.commands.tables import Table

    encoding = sys.stdout.encoding or "utf-8"
    paper = io.BytesIO()
    with io.TextIOWrapper(paper, encoding, errors="backslashreplace", write_through=True) as file:
        console = Console(
            file=file,
            force_terminal=sys.stdout.isatty() or None,
            width=UNBOUNDED,
            height=UNBOUNDED,  # else a dumb terminal has 80 columns
            markup=False,
            highlight=False,
            emoji=False,
        )
        if isinstance(part, Table):
            console.print(part.fitted(columns))
        else:
            console.print(part, width=columns, soft_wrap=columns is None)
        lines = paper.getvalue().decode(encoding).split("\n")
    return "\n".join(map(str.rstrip, lines))


def write(text: str) -> None:
    """Write `text` to standard output at once; OSError, which names standard output, if that fails."""
    try:
        with _TURN:
            sys.stdout.write(text)
            sys.stdout.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from None


def _columns() -> int | None:
    """The width of lines: a terminal's COLUMNS if that is a number, or its own width; None in a pipe or a file.

    COLUMNS, which a shell may export, does not count there: readers of a pipe want whole lines.
    """
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
