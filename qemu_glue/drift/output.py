"""The files that `pvclock drift` writes: its lines of JSON, a page that draws them, and the drawing alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from pvclock.commands.whole_file import write
from pvclock.errors import PvclockError
from pvclock.meter.drift import drawing

__all__ = ["FORMATS", "write_outputs"]

FILE_MODE: Final = 0o644


def write_outputs(paths: Sequence[Path], lines: Sequence[str]) -> list[Exception]:
    """Write each by its suffix, whole or not at all; lines: as `--json` prints them.  Returns what failed."""
    return [error for path in paths if (error := _error_of(path, lines)) is not None]


def _error_of(path: Path, lines: Sequence[str]) -> Exception | None:
    try:
        write(str(path), FORMATS[path.suffix](lines).encode(), FILE_MODE)
    except (PvclockError, OSError) as error:
        return error
    return None


def _text(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


FORMATS: Final[dict[str, Callable[[Sequence[str]], str]]] = {
    ".html": drawing.page,
    ".svg": drawing.picture,
    ".jsonl": _text,
}
"""What makes the content of a file with this suffix."""
