"""The files that `pvclock drift` writes: its lines of JSON, a page that draws them, and the drawing alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

__all__ = ["FORMATS", "write_outputs"]

FORMATS: Final = (".html", ".svg", ".jsonl")


def write_outputs(paths: Sequence[Path], lines: Sequence[str]) -> None:
    """Write all of them; OSError."""
    for path in paths:
        path.write_text("".join(f"{line}\n" for line in lines), encoding="ascii")
