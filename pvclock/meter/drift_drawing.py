"""What a drift's lines of JSON look like: a page of all they tell, or a picture of how far ahead each clock was."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from pvclock.meter.report import html, svg
from pvclock.meter.report.from_drift import drift_sections
from pvclock.meter.report.model import Plot, Report, Section

__all__ = ["page", "picture"]

SOURCE: Final = "pvclock drift"


def page(lines: Sequence[str]) -> str:
    """All of it as a self-contained HTML document."""
    from pvclock import __version__

    sections = _sections(lines)
    made_at = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return html.document(Report(sections[0].title, made_at, __version__, tuple(sections)))


def picture(lines: Sequence[str]) -> str:
    """The first plot as an SVG file."""
    parts = (part for section in _sections(lines) for part in section.parts)
    return svg.standalone(next(part for part in parts if isinstance(part, Plot)))


def _sections(lines: Sequence[str]) -> list[Section]:
    return drift_sections(SOURCE, enumerate(map(json.loads, lines), 1))
