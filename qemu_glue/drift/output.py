"""The files that `pvclock drift` writes: its lines of JSON, a page that draws them, and the drawing alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TypeAlias

from pvclock import __version__
from pvclock.meter.report import html, svg
from pvclock.meter.report.from_drift import drift_sections
from pvclock.meter.report.model import Plot, Report, Section

__all__ = ["FORMATS", "write_outputs"]

Lines: TypeAlias = Sequence[str]

SOURCE: Final = "pvclock drift"


def write_outputs(paths: Sequence[Path], lines: Lines) -> None:
    """Write each, by its suffix; lines: as `--json` prints them.  OSError."""
    for path in paths:
        path.write_text(FORMATS[path.suffix](lines), encoding="utf-8")


def _page(lines: Lines) -> str:
    sections = _sections(lines)
    made_at = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return html.document(Report(sections[0].title, made_at, __version__, tuple(sections)))


def _picture(lines: Lines) -> str:
    """The first plot: how far ahead each clock was."""
    parts = (part for section in _sections(lines) for part in section.parts)
    return svg.standalone(next(part for part in parts if isinstance(part, Plot)))


def _sections(lines: Lines) -> list[Section]:
    return drift_sections(SOURCE, enumerate(map(json.loads, lines), 1))


def _text(lines: Lines) -> str:
    return "".join(f"{line}\n" for line in lines)


FORMATS: Final[dict[str, Callable[[Lines], str]]] = {".html": _page, ".svg": _picture, ".jsonl": _text}
"""What makes the content of a file with this suffix."""
