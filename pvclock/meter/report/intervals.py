"""Intervals as HTML: quantities below each other, each a name and a bar from its least to its most, at any width."""

from __future__ import annotations

import math
from typing import Final

from pvclock.meter.report.axes import Scale, Span, position, scale_of, span_of
from pvclock.meter.report.escaping import clipped, escaped
from pvclock.meter.report.model import Axis, Interval, Intervals, Standing
from pvclock.meter.report.outlines import DOTS
from pvclock.meter.report.svg import shown_axis

__all__ = ["ROWS_MAX", "SIGNS", "bars"]

SIGNS: Final = {Standing.GOOD: "\u2713", Standing.BAD: "\u2717", Standing.OPEN: "?", Standing.PLAIN: ""}
"""Of each standing, beside its colour."""
LEFT: Final = 6.0
RIGHT: Final = 94.0
"""Where the axis begins and ends, in % of a bar's room: half a label is beyond."""
NAME_MAX: Final = 400
ROWS_MAX: Final = 200
MARGIN: Final = 0.04
TICKS_WANTED: Final = 5
TITLE_SHOWN_MAX: Final = 50
DIGITS: Final = 6
"""Of a number beside the pointer, where its interval does not ask for more."""


def bars(intervals: Intervals) -> str:
    """Return the first 200 rows as a list, which ends with their axis."""
    rows = intervals.rows[:ROWS_MAX]
    axis = shown_axis(intervals.axis)
    scale = scale_of(axis, _span(axis, rows), TICKS_WANTED)
    grid = _grid(scale)
    drawn = "".join(_row(row, axis, scale, grid) for row in rows)
    return f'<ul class="bars">\n{drawn}{_labels(scale)}</ul>\n'


def _span(axis: Axis, rows: tuple[Interval, ...]) -> Span:
    """All rows, and 0 where it is near: how far a quantity is from it is what is asked."""
    ends = [end for it in rows for end in (it.low, it.high, it.low if it.value is None else it.value)]
    span = span_of(ends, is_log=axis.is_log, margin=MARGIN)
    is_near = not axis.is_log and 0 < min(abs(span.least), abs(span.most)) < span.most - span.least
    return span_of([*ends, 0.0], margin=MARGIN) if is_near else span


def _x(scale: Scale, value: float) -> float:
    """Where a number is, in %; an infinite one at the end of the axis."""
    if scale.is_log and not value > 0:
        return LEFT
    return max(min(position(scale, value, LEFT, RIGHT), RIGHT), LEFT)


def _grid(scale: Scale) -> str:
    """The lines behind each bar: at the ticks, and at 0."""
    zero = [0.0] if not scale.is_log and scale.span.least <= 0 <= scale.span.most else []
    places = [*(("grid", it.at) for it in scale.ticks), *(("axis", it) for it in zero)]
    return "".join(f'<line class="{look}" {_across(_x(scale, at))} y1="0" y2="100%"/>' for look, at in places)


def _across(x: float) -> str:
    return f'x1="{x:.2f}%" x2="{x:.2f}%"'


def _row(row: Interval, axis: Axis, scale: Scale, grid: str) -> str:
    label = " ".join(filter(None, [SIGNS[row.standing], clipped(row.name, NAME_MAX)]))
    said = "unknown" if math.isnan(row.low) or math.isnan(row.high) else _in_words(row, axis)
    drawn = f'<text class="unknown" x="{LEFT}%" y="50%" dy="4">unknown</text>' if said == "unknown" else ""
    drawn = drawn or _bar(row, scale)
    about = f'role="img" aria-label="{escaped(said)}"'
    svg = f'<svg class="plot-drawing" {about}>{grid}<g><title>{escaped(said)}</title>{drawn}</g></svg>'
    return f'<li><span class="name">{escaped(label)}</span><div class="bar">{svg}</div></li>\n'


def _bar(row: Interval, scale: Scale) -> str:
    look = row.standing.value
    begin, end = _x(scale, row.low), _x(scale, row.high)
    place = f'x="{begin:.2f}%" y="50%" width="{end - begin:.2f}%" height="14" transform="translate(0 -7)"'
    places = ((begin, row.low), (end, row.high))  # an end that is nowhere has no line
    ends = "".join(_at(x, f"whisker {look}", "M0 -7v14") for x, end in places if math.isfinite(end))
    is_known = row.value is not None and not math.isnan(row.value)
    value = _at(_x(scale, row.value), f"mark {look}", DOTS[0]) if row.value is not None and is_known else ""
    return f'<rect class="interval {look}" {place}/>{ends}{value}'


def _at(x: float, look: str, outline: str) -> str:
    """A shape at a place along the axis, in the middle of its row."""
    return f'<svg x="{x:.2f}%" y="50%" overflow="visible"><path class="{look}" d="{outline}"/></svg>'


def _in_words(row: Interval, axis: Axis) -> str:
    """Return an interval in the axis' base unit, to a thousandth of its width."""
    numbers = [it for it in (row.low, row.high, row.value) if it is not None]
    width, greatest = row.high - row.low, max(map(abs, numbers))
    is_narrow = 0 < width < greatest < math.inf
    digits = max(DIGITS, min(math.ceil(math.log10(greatest) - math.log10(width)) + 3, 17)) if is_narrow else DIGITS
    low, high, *value = (f"{it:.{digits}g}" for it in numbers)
    said = f"{low} to {high} {axis.unit.value}".rstrip()
    return f"{said}, likeliest {value[0]}" if value else said


def _labels(scale: Scale) -> str:
    ticks = "".join(f'<text class="tick x" x="{_x(scale, it.at):.2f}%" y="18">{it.label}</text>' for it in scale.ticks)
    title = f'<text class="title x" x="50%" y="40">{escaped(clipped(scale.title, TITLE_SHOWN_MAX))}</text>'
    axis = f'<line class="axis" x1="{LEFT}%" x2="{RIGHT}%" y1="0.5" y2="0.5"/>'
    svg = f'<svg class="plot-drawing" aria-hidden="true">{axis}{ticks}{title}</svg>'
    return f'<li class="scale"><span class="name"></span><div class="bar">{svg}</div></li>\n'
