"""The files that `pvclock drift` writes: its lines of JSON, a page that draws them, and the drawing alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Final

from pvclock.commands.probe_files import write
from pvclock.errors import PvclockError
from pvclock.meter.drift import drawing

__all__ = ["FORMATS", "why_not_writable", "write_outputs"]

FILE_MODE: Final = 0o644


def why_not_writable(path: Path) -> str | None:
    """Why a file cannot be written whole or not at all, as far as that can be tried; None if it can."""
    try:
        target = Path(os.path.realpath(path))
        if os.path.lexists(target) and not target.is_file():
            return "it is there, and is no file"
        with TemporaryFile(dir=target.parent):
            return None
    except OSError as error:
        return f"in its folder: {error.strerror}"


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
