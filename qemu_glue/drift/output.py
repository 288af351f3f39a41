"""The files that `pvclock drift` writes: its lines of JSON, a page that draws them, and the drawing alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from pvclock.meter import drift_drawing

__all__ = ["FORMATS", "write_outputs"]


def write_outputs(paths: Sequence[Path], lines: Sequence[str]) -> None:
    """Write each, by its suffix; lines: as `--json` prints them.  OSError."""
    for path in paths:
        path.write_text(FORMATS[path.suffix](lines), encoding="utf-8")


def _text(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


FORMATS: Final[dict[str, Callable[[Sequence[str]], str]]] = {
    ".html": drift_drawing.page,
    ".svg": drift_drawing.picture,
    ".jsonl": _text,
}
"""What makes the content of a file with this suffix."""
