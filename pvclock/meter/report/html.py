"""A report as one HTML file that needs nothing else: styles, drawings, their data and the program that zooms them."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from importlib import resources
from itertools import count
from typing import Final

from pvclock.meter.report.axes import UNITS
from pvclock.meter.report.escaping import clipped, escaped, json_in_script, json_numbers, showable
from pvclock.meter.report.intervals import ROWS_MAX, SIGNS, bars
from pvclock.meter.report.model import Axis, Intervals, Line, Part, Plot, Report, Section, Standing, Table
from pvclock.meter.report.outlines import DOTS, SHAPES
from pvclock.meter.report.svg import (
    LAYOUT,
    LIMITS,
    layout_of,
    legend_sample,
    mark_text,
    plot_svg,
    ready_to_draw,
    style_of_plots,
)

__all__ = ["document"]

PROGRAM: Final = ("scales.js", "drawing.js", "pointer.js", "views.js")
"""Hover, zoom and pan: the files of one function, in this order."""
WORDS: Final = {Standing.GOOD: "good", Standing.BAD: "bad", Standing.OPEN: "not decided", Standing.PLAIN: ""}
NARROW_BELOW: Final = 608
"""Pixels that a plot has room for below which it is drawn anew; report.css has it as the least width without that."""
TABLE_ROWS_MAX: Final = 2000
NAME_MAX: Final = 120
TITLE_MAX: Final = 240
SENTENCE_MAX: Final = 4000
CELL_MAX: Final = 1000
NUMBER_MAX: Final = 18
SHORT_MAX: Final = 24
NUMBER: Final = ' class="number"'
NO_VALUE: Final = ("", "-")
"""What stands in a cell that has none."""


def document(report: Report) -> str:
    """Return a report as a self-contained HTML document."""
    style = style_of_plots() + _resource("report.css")
    script = f'"use strict";\n(() => {{\n{"".join(map(_resource, PROGRAM))}}})();\n'
    names = (f"plot-{number}" for number in count(1))
    is_alone = [it.title for it in report.sections] == [report.title]
    numbered = enumerate(report.sections, start=1)
    sections = "".join(_section(it, number, names, is_titled=not is_alone) for number, it in numbered)
    title = _title(report.title)
    made = f"{escaped(report.made_at)}, by pvclock {escaped(report.version)}"
    contents = _contents(report.sections) if len(report.sections) > 1 else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_policy(style, script)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1 id="title">{title}</h1>
<p class="made">{made}</p>
</header>
{contents}<main>
{sections}</main>
<script type="application/json" id="drawing-rules">{_drawing_rules()}</script>
<script>{script}</script>
</body>
</html>
"""


def _title(text: str) -> str:
    return escaped(clipped(text, TITLE_MAX))


def _sentence(text: str) -> str:
    return escaped(clipped(text, SENTENCE_MAX))


def _resource(name: str) -> str:
    return resources.files("pvclock.meter.report").joinpath(name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Nothing is loaded, sent or run but this page's own style and program, known by their hashes."""
    return (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _contents(sections: tuple[Section, ...]) -> str:
    items = "".join(
        f'<li><a href="#section-{number}">{_title(it.title)}</a> {_badge(it.standing)}'
        f'<span class="source">{_title(it.source)}</span></li>\n'
        for number, it in enumerate(sections, start=1)
    )
    return f'<nav aria-label="Contents">\n<ol>\n{items}</ol>\n</nav>\n'


def _badge(standing: Standing) -> str:
    """How something fared: a sign and a word."""
    if standing == Standing.PLAIN:
        return ""
    sign = f'<span aria-hidden="true">{SIGNS[standing]}</span>'
    return f'<span class="badge {standing.value}">{sign} {WORDS[standing]}</span> '


def _section(section: Section, number: int, names: Iterator[str], *, is_titled: bool) -> str:
    """Return a section.  is_titled: False if the page's own title is its title, too."""
    heading = f"heading-{number}" if is_titled else "title"
    title = f'<h2 id="{heading}">{_title(section.title)}</h2>\n' if is_titled else ""
    verdict = (
        f'<p class="verdict">{_badge(section.standing)}{_sentence(section.verdict)}</p>\n' if section.verdict else ""
    )
    sentences = "".join(f"<p>{_sentence(it)}</p>\n" for it in section.sentences)
    parts = "".join(_part(it, next(names)) for it in section.parts)
    source = f'<p class="source">{_title(section.source)}</p>\n' if section.source else ""
    return (
        f'<section id="section-{number}" aria-labelledby="{heading}">\n'
        f"{title}{source}{verdict}{sentences}{parts}</section>\n"
    )


def _part(part: Part, name: str) -> str:
    match part:
        case Plot():
            return _plot(part, name)
        case Intervals():
            return _intervals(part)
        case Table():
            return _table(part)


def _plot(plot: Plot, name: str) -> str:
    plot = ready_to_draw(plot)
    legend = "".join(
        f'<li><svg class="plot-drawing" width="36" height="14" viewBox="0 0 36 14" aria-hidden="true">'
        f"{legend_sample(line, index)}</svg><span>{escaped(clipped(line.name, NAME_MAX))}</span></li>"
        for index, line in enumerate(plot.lines)
    )
    return (
        f'<figure class="plot">\n<h3>{_title(plot.title)}</h3>\n'
        + (f'<ul class="legend">{legend}</ul>\n' if legend else "")
        + f'<div class="chart">{plot_svg(plot, name)}</div>\n{_note(plot.note)}'
        + f'<script type="application/json" class="data">{_plot_data(plot)}</script>\n</figure>\n'
    )


def _note(note: str) -> str:
    return f"<figcaption>{_sentence(note)}</figcaption>\n" if note else ""


def _plot_data(plot: Plot) -> str:
    """Return what views.js draws a plot from."""
    lines = ",".join(map(_line_data, plot.lines))
    marks = [
        {
            "x": mark.x,
            "until": mark.until,
            "kind": mark.kind,
            "text": mark_text(mark),
            "look": mark.standing.value,
        }
        for mark in plot.marks
    ]
    axes = f'"x":{_axis_data(plot.x)},"y":{_axis_data(plot.y)}'
    return f'{{{axes},"left":{layout_of(plot).left},"lines":[{lines}],"marks":{json_in_script(marks)}}}'


def _axis_data(axis: Axis) -> str:
    return json_in_script({"label": axis.label, "unit": axis.unit.value, "isLog": axis.is_log})


def _line_data(line: Line) -> str:
    columns = ",".join(f'"{name}":{json_numbers(getattr(line, name))}' for name in ("x", "y", "low", "high"))
    name = json_in_script(clipped(showable(line.name), NAME_MAX))
    return f'{{"name":{name},"isStepped":{json_in_script(line.is_stepped)},{columns}}}'


def _drawing_rules() -> str:
    """Return what the page's program has to know to draw as svg.py does."""
    units = {unit.value: [it._asdict() for it in shown] for unit, shown in UNITS.items()}
    rules = {"layout": LAYOUT._asdict(), "limits": LIMITS, "units": units, "dots": DOTS, "shapes": SHAPES}
    return json_in_script({**rules, "narrowBelow": NARROW_BELOW})


def _intervals(intervals: Intervals) -> str:
    left_out = len(intervals.rows) - ROWS_MAX
    note = " ".join(filter(None, [intervals.note, f"{left_out:,} more are not shown." if left_out > 0 else ""]))
    return f'<figure class="intervals">\n<h3>{_title(intervals.title)}</h3>\n{bars(intervals)}{_note(note)}</figure>\n'


def _table(table: Table) -> str:
    standings = table.standings or (Standing.PLAIN,) * len(table.rows)
    of_numbers = [_is_of_numbers(table, column) for column in range(len(table.headings))]
    headings = "".join(
        f'<th scope="col"{NUMBER * is_number}>{_title(it)}</th>'
        for it, is_number in zip(table.headings, of_numbers, strict=True)
    )
    has_signs = any(it != Standing.PLAIN for it in standings)
    if has_signs:
        headings = f'<th scope="col"><span class="unseen">how it stands</span></th>{headings}'
    shown = list(zip(table.rows, standings, strict=True))[:TABLE_ROWS_MAX]
    body = "".join(
        _row(row, of_numbers, f"<td>{_badge(standing)}</td>" if has_signs else "") for row, standing in shown
    )
    left_out = len(table.rows) - len(shown)
    note = f"<p>{left_out:,} more rows are not shown.</p>\n" if left_out else ""
    return (
        f"<h3>{_title(table.title)}</h3>\n"
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escaped(clipped(table.title, NAME_MAX))}">'
        f"<table><thead><tr>{headings}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n{note}"
    )


def _row(row: tuple[str, ...], of_numbers: list[bool], sign: str) -> str:
    cells = "".join(
        f"<td{_look(it) if is_of_numbers else ''}>{escaped(clipped(it, CELL_MAX))}</td>"
        for it, is_of_numbers in zip(row, of_numbers, strict=True)
    )
    return f"<tr>{sign}{cells}</tr>\n"


def _look(cell: str) -> str:
    """Of a cell in a column of numbers: what is short is at the right, a number on one line too; a long text wraps."""
    return ' class="whole number"' if _is_number(cell) else NUMBER if len(cell) < SHORT_MAX else ""


def _is_of_numbers(table: Table, column: int) -> bool:
    """Are most cells of a column numbers, so that their digits are to be below each other?"""
    cells = [row[column] for row in table.rows if row[column] not in NO_VALUE]
    return sum(map(_is_number, cells)) * 2 > len(cells)


def _is_number(text: str) -> bool:
    """Is this a number, perhaps with a unit?"""
    return text.lstrip("+-\u2212")[:1].isdigit() and len(text) < NUMBER_MAX
