"""Intervals as SVG: quantities below each other, each a bar from its least to its most."""

from __future__ import annotations

import math
from typing import Final

from pvclock.meter.report.axes import Scale, Span, position, scale_of, span_of
from pvclock.meter.report.escaping import clipped, escaped
from pvclock.meter.report.model import Axis, Interval, Intervals, Standing
from pvclock.meter.report.outlines import DOTS, pixels
from pvclock.meter.report.svg import shown_axis, svg_element

__all__ = ["intervals_svg", "SIGNS"]

SIGNS: Final = {Standing.GOOD: "\u2713", Standing.BAD: "\u2717", Standing.OPEN: "?", Standing.PLAIN: ""}
"""Of each standing, beside its colour."""
WIDTH: Final = 860
LEFT: Final = 230
RIGHT: Final = 26
TOP: Final = 12
ROW: Final = 30
BOTTOM: Final = 48
NAME_SHOWN_MAX: Final = 30
ROWS_MAX: Final = 200
MARGIN: Final = 0.04
TICKS_WANTED: Final = 6


def intervals_svg(intervals: Intervals, name: str) -> str:
    """Return the first 200 rows as an svg element.  name: unique in its page."""
    rows = intervals.rows[:ROWS_MAX]
    axis = shown_axis(intervals.axis)
    scale = scale_of(axis, _span(axis, rows), TICKS_WANTED)
    bottom = TOP + ROW * len(rows)
    drawn = "".join(_row(row, TOP + ROW * index + ROW // 2, scale) for index, row in enumerate(rows))
    content = _grid(scale, bottom) + drawn + _labels(scale, bottom)
    about = f"{axis.label}: {', '.join(clipped(it.name, NAME_SHOWN_MAX) for it in rows[:20])}."
    return svg_element(intervals.title, about, name, (WIDTH, bottom + BOTTOM), content)


def _span(axis: Axis, rows: tuple[Interval, ...]) -> Span:
    """All rows, and 0 where it is near: how far a quantity is from it is what is asked."""
    ends = [end for it in rows for end in (it.low, it.high, it.low if it.value is None else it.value)]
    span = span_of(ends, is_log=axis.is_log, margin=MARGIN)
    is_near = not axis.is_log and 0 < min(abs(span.least), abs(span.most)) < span.most - span.least
    return span_of([*ends, 0.0], margin=MARGIN) if is_near else span


def _x(scale: Scale, value: float) -> float:
    """Where a number is; an infinite one at the end of the axis."""
    if scale.is_log and not value > 0:
        return LEFT
    return max(min(position(scale, value, LEFT, WIDTH - RIGHT), WIDTH - RIGHT), LEFT)


def _grid(scale: Scale, bottom: int) -> str:
    down = "".join(f"M{pixels(_x(scale, it.at))} {TOP}V{bottom}" for it in scale.ticks)
    zero = pixels(_x(scale, 0.0))
    is_within = not scale.is_log and scale.span.least <= 0 <= scale.span.most
    at_zero = f'<path class="axis" d="M{zero} {TOP}V{bottom}"/>' if is_within else ""
    return f'<path class="grid" d="{down}"/>{at_zero}<path class="axis" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>'


def _row(row: Interval, y: int, scale: Scale) -> str:
    label = " ".join(filter(None, [SIGNS[row.standing], clipped(row.name, NAME_SHOWN_MAX)]))
    said = f'<text class="name row" x="{LEFT - 14}" y="{y + 4}">{escaped(label)}</text>'
    if math.isnan(row.low) or math.isnan(row.high):
        return f'{said}<text class="unknown" x="{LEFT + 8}" y="{y + 4}">unknown</text>'
    begin, end = _x(scale, row.low), _x(scale, row.high)
    begin, width = min(begin, end - 2), max(end - begin, 2.0)
    look = row.standing.value
    bar = f'<rect class="interval {look}" x="{pixels(begin)}" y="{y - 7}" width="{pixels(width)}" height="14"/>'
    places = ((begin, row.low), (begin + width, row.high))  # an end that is nowhere has no line
    ends = "".join(f"M{pixels(x)} {y - 7}v14" for x, end in places if math.isfinite(end))
    return f'{said}<g>{_title(row)}{bar}<path class="whisker {look}" d="{ends}"/>{_value(row, y, scale)}</g>'


def _title(row: Interval) -> str:
    likeliest = "" if row.value is None else f", likeliest {row.value:.6g}"
    return f"<title>{escaped(clipped(row.name, 400))}: {row.low:.6g} to {row.high:.6g}{likeliest}</title>"


def _value(row: Interval, y: int, scale: Scale) -> str:
    if row.value is None or math.isnan(row.value):
        return ""
    place = f"translate({pixels(_x(scale, row.value))} {y})"
    return f'<path class="mark {row.standing.value}" transform="{place}" d="{DOTS[0]}"/>'


def _labels(scale: Scale, bottom: int) -> str:
    ticks = "".join(
        f'<text class="tick x" x="{pixels(_x(scale, it.at))}" y="{bottom + 18}">{it.label}</text>' for it in scale.ticks
    )
    title = escaped(clipped(scale.title, 120))
    return f'{ticks}<text class="title x" x="{pixels((LEFT + WIDTH - RIGHT) / 2)}" y="{bottom + 40}">{title}</text>'
