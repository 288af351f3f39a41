"""What a drift's lines of JSON look like: a page of all they tell, or a picture of how far ahead each clock was."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import compress
from operator import not_
from typing import Final

from pvclock.meter.report import html, svg
from pvclock.meter.report.escaping import clipped, escaped
from pvclock.meter.report.from_drift import drift_sections
from pvclock.meter.report.model import Axis, Line, Plot, Report, Section, Unit

__all__ = ["page", "picture", "stacked"]

SOURCE: Final = "pvclock drift"
HIDDEN_BELOW: Final = 10
"""A line that goes so many times less far than another one looks like a flat one beside it."""
MARGIN: Final = 16
HEADING: Final = 30
LEGEND: Final = 24
GAP: Final = 18
TITLE_MAX: Final = 100
NAME_MAX: Final = 40
NO_READINGS: Final = Plot("No readings", Axis("Time", Unit.S), Axis("Ahead", Unit.NS), ())
"""Of a guest that had ended before its first one."""


def page(lines: Sequence[str]) -> str:
    """All of it as a self-contained HTML document."""
    from pvclock import __version__

    sections = _sections(lines)
    made_at = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return html.document(Report(sections[0].title, made_at, __version__, tuple(sections)))


def picture(lines: Sequence[str]) -> str:
    """The first plot as an SVG file, and below it the clocks that look flat in it, once more by themselves."""
    found = (part for section in _sections(lines) for part in section.parts if isinstance(part, Plot))
    plot = next(found, NO_READINGS)
    near, far = _near_and_far(plot)
    if not near:
        return svg.standalone(plot)
    names = " and ".join(line.name for line in near)
    # In the same order, so that a clock has its colour in both.
    return stacked([plot._replace(lines=near + far), plot._replace(title=f"{names}, closer", lines=near)])


# Inside


def _near_and_far(plot: Plot) -> tuple[tuple[Line, ...], tuple[Line, ...]]:
    """The lines that look flat beside the one that goes furthest, and the others."""
    furthest_ns = max(map(_extent_ns, plot.lines), default=0.0)
    is_near = [_extent_ns(line) * HIDDEN_BELOW < furthest_ns for line in plot.lines]
    near, far = (tuple(compress(plot.lines, chosen)) for chosen in (is_near, map(not_, is_near)))
    return near, far


def _extent_ns(line: Line) -> float:
    known = [ns for ns in line.y if not math.isnan(ns)]
    return max(known) - min(known) if known else 0.0


def stacked(plots: Sequence[Plot]) -> str:
    """Plots below each other as one SVG file, each with its title and its legend."""
    drawn: list[str] = []
    y = 0
    for place, each in enumerate(plots):
        plot = svg.ready_to_draw(each)
        drawn.append(f'<g transform="translate(0 {y})">{_heading(plot)}{_legend(plot)}')
        drawn.append(f'<g transform="translate(0 {HEADING + LEGEND})">{svg.plot_svg(plot, f"plot-{place}")}</g></g>')
        y += HEADING + LEGEND + svg.plot_height(plot, svg.LAYOUT) + GAP
    size = (svg.LAYOUT.width + 2 * MARGIN, y + MARGIN)
    paper = f'<rect class="paper" x="-{MARGIN}" y="-{MARGIN}" width="100%" height="100%"/>'
    about = " ".join(map(svg.description, plots))
    box = f"-{MARGIN} -{MARGIN} {size[0]} {size[1]}"
    content = f"<style>{svg.style_of_plots()}</style>{paper}{''.join(drawn)}"
    return svg.svg_element(plots[0].title, about, "drift", size, content, box) + "\n"


def _heading(plot: Plot) -> str:
    return f'<text class="heading" x="0" y="16">{escaped(clipped(plot.title, TITLE_MAX))}</text>'


def _legend(plot: Plot) -> str:
    names = [clipped(line.name, NAME_MAX) for line in plot.lines]
    columns = svg.LAYOUT.width // max(len(names), 1)
    return "".join(
        f'<g transform="translate({place * columns} {HEADING})">{svg.legend_sample(plot.lines[place], place)}'
        f'<text class="name" x="44" y="11">{escaped(name)}</text></g>'
        for place, name in enumerate(names)
    )


def _sections(lines: Sequence[str]) -> list[Section]:
    return drift_sections(SOURCE, enumerate(map(json.loads, lines), 1))
