"""Plots as SVG: inline in a page, and as a file of its own.

Everything whose place depends on what part of the plot is shown is in the group `drawing`: drawing.js draws it again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context, Decimal
from importlib import resources
from itertools import chain
from typing import Final, NamedTuple

from pvclock.meter.report.axes import Scale, Span, position, scale_of, span_of
from pvclock.meter.report.escaping import clipped, escaped, showable
from pvclock.meter.report.model import MARKS_MAX, POINTS_MAX, Axis, Line, Mark, Plot, Standing, Unit
from pvclock.meter.report.outlines import DOTS, SHAPES, Point, band_path, line_path, pixels, stepped
from pvclock.meter.report.thinning import thinned, thinned_marks

__all__ = [
    "LAYOUT",
    "description",
    "kinds_of",
    "layout_of",
    "legend_sample",
    "mark_text",
    "plot_svg",
    "ready_to_draw",
    "shown_axis",
    "standalone",
    "style_of_plots",
    "svg_element",
]


class Layout(NamedTuple):
    """Where the parts of a plot are, in pixels of an SVG that is `width` wide.

    left, right, top: room beside the area of the lines, more on the left where kinds of marks have long names; height:
    of that area; lane: of a row of marks below it; bottom: room for the labels of the x axis.  x_tick, y_tick: for each
    tick so much is wanted.
    """

    width: int = 860
    left: int = 92
    right: int = 26
    top: int = 34
    height: int = 300
    lane: int = 20
    bottom: int = 48
    x_tick: int = 72
    y_tick: int = 38


LAYOUT: Final = Layout()
COLOURS: Final = 7
DASHES: Final = 5
DOTTED_MAX: Final = 60
"""Points of a line up to which each is shown by a dot."""
DOT_ROOM: Final = 5
"""Pixels that a dot at the end of a line reaches beyond it."""
HAIRLINES_MAX: Final = 40
"""Marks up to which each has a line through the plot."""
TRIMMED: Final = 0.1
"""The part of a band's bounds that may lie outside the plot: those of a first, short while would flatten all else."""
FAR_OUT: Final = 2.5
"""So many times higher the plot would be with them."""
MARGIN: Final = 0.05
LOG_MIN: Final = 1e-300
POINTS_ALL_MAX: Final = 10 * POINTS_MAX
"""Points of all lines of a plot."""
DIGITS: Final = 13
"""A number keeps so many at least; and, however great it is, those after the point that its unit has in PLACES."""
PLACES: Final = {Unit.NS: 3, Unit.S: 9, Unit.PPB: 3, Unit.RATE: 15, Unit.NONE: 15}
ALL_DIGITS: Final = Context(prec=700)
KIND_SHOWN_MAX: Final = 16
KIND_CHARACTER: Final = 7.6
"""The width of a character of most kinds, in pixels; KIND_ROOM: between a kind and its row."""
KIND_ROOM: Final = 12
TITLE_CHARACTER: Final = 7
NAME_SHOWN_MAX: Final = 60
TEXT_MAX: Final = 400
KIND_MAX: Final = 60
LABEL_MAX: Final = 80
LIMITS: Final = {
    "colours": COLOURS,
    "dashes": DASHES,
    "dottedMax": DOTTED_MAX,
    "dotRoom": DOT_ROOM,
    "hairlinesMax": HAIRLINES_MAX,
    "trimmed": TRIMMED,
    "farOut": FAR_OUT,
    "margin": MARGIN,
    "kindShownMax": KIND_SHOWN_MAX,
    "kindRoom": KIND_ROOM,
    "titleCharacter": TITLE_CHARACTER,
}
"""What drawing.js draws by, too."""
LEGEND_CHARACTER: Final = 6.6
"""About the width of a character of a legend, in pixels."""


def ready_to_draw(plot: Plot) -> Plot:
    """Return a plot with no more points and marks than are drawn, and a note if some were left out."""
    points_max = max(min(POINTS_MAX, POINTS_ALL_MAX // max(len(plot.lines), 1)), 8)
    lines = tuple(_rounded(thinned(line, points_max, is_log=plot.x.is_log), plot) for line in plot.lines)
    placed = [it for it in plot.marks if it.x > 0 or not plot.x.is_log]
    marks = thinned_marks([it._replace(kind=clipped(showable(it.kind), KIND_MAX)) for it in placed], MARKS_MAX)
    shown, of = sum(len(it.x) for it in lines), sum(it.of or len(it.x) for it in lines)
    notes = [plot.note] if plot.note else []
    if shown < of:
        notes.append(
            f"{shown:,} of {of:,} points are drawn, the extremes among them, with the widest band of those around."
        )
    if len(marks) < len(plot.marks):
        notes.append(
            f"{len(marks):,} of {len(plot.marks):,} marks are drawn, of each kind the bad ones and the greatest."
        )
    if not of and not marks:
        notes.append("There are no data.")
    return Plot(plot.title, shown_axis(plot.x), shown_axis(plot.y), lines, marks, " ".join(notes))


def _rounded(line: Line, plot: Plot) -> Line:
    """Return a line whose numbers have no more digits than are of use, and whose band is no narrower for it.

    All digits would make a page a third longer.  A clock that was paused for hours has as narrow a band as any.
    """
    x, y = (_shortened(each, unit) for each, unit in ((line.x, plot.x.unit), (line.y, plot.y.unit)))
    low, high = _shortened(line.low, plot.y.unit, ROUND_FLOOR), _shortened(line.high, plot.y.unit, ROUND_CEILING)
    return line._replace(x=x, y=y, low=low, high=high)


def _shortened(numbers: Sequence[float], unit: Unit, rounding: str = ROUND_HALF_EVEN) -> list[float]:
    return [_short(it, PLACES[unit], rounding) if it and math.isfinite(it) else float(it) for it in numbers]


def _short(number: float, places: int, rounding: str) -> float:
    exact = Decimal(number)
    last = min(exact.adjusted() + 1 - DIGITS, -places)
    return float(exact.quantize(Decimal((0, (1,), last)), rounding, ALL_DIGITS))


def shown_axis(axis: Axis) -> Axis:
    """Return an axis with a label for which there is room."""
    return axis._replace(label=clipped(showable(axis.label), LABEL_MAX))


def plot_svg(plot: Plot, name: str) -> str:
    """Return a plot that is ready to draw as an svg element.  name: unique in its page."""
    layout = layout_of(plot)
    content = f"{_clip(name, layout)}{_drawing(plot, name, layout)}"
    return svg_element(plot.title, description(plot), name, (layout.width, plot_height(plot, layout)), content)


def standalone(plot: Plot) -> str:
    """Return a plot as an SVG file, with title, legend, note and a style for light and dark."""
    plot = ready_to_draw(plot)
    legend, legend_height = _legend(plot)
    begin = 34 + legend_height
    height = begin + plot_height(plot, LAYOUT) + (26 if plot.note else 0)
    title = f'<text class="heading" x="0" y="18">{escaped(clipped(plot.title, 100))}</text>'
    note = f'<text class="note" x="0" y="{height - 8}">{escaped(clipped(plot.note, 150))}</text>' if plot.note else ""
    layout = layout_of(plot)
    inner = f'<g transform="translate(0 {begin})">{_clip("plot", layout)}{_drawing(plot, "plot", layout)}</g>'
    style = f'<style>{style_of_plots()}</style><rect class="paper" x="-16" y="-12" width="100%" height="100%"/>'
    box = f"-16 -12 {LAYOUT.width + 32} {height + 24}"
    body = style + title + legend + inner + note
    return svg_element(plot.title, description(plot), "plot", (LAYOUT.width + 32, height + 24), body, box) + "\n"


def style_of_plots() -> str:
    """Return the style sheet that plots need, in a page and alone."""
    return resources.files("pvclock.meter.report").joinpath("plot.css").read_text(encoding="utf-8")


def svg_element(title: str, about: str, name: str, size: tuple[int, int], content: str, box: str = "") -> str:
    """Return an svg element that says in words what it shows.  size: width and height; box: the viewBox, if another."""
    width, height = size
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plot-drawing" id="{name}" role="img" '
        f'viewBox="{box or f"0 0 {width} {height}"}" width="{width}" height="{height}" '
        f'aria-labelledby="{name}-title {name}-about">'
        f'<title id="{name}-title">{escaped(clipped(title, TEXT_MAX))}</title>'
        f'<desc id="{name}-about">{escaped(about)}</desc>{content}</svg>'
    )


def description(plot: Plot) -> str:
    """Return in words what a plot shows, for those who do not see it."""
    lines = ", ".join(clipped(line.name, NAME_SHOWN_MAX) for line in plot.lines[:20]) or "no lines"
    said = f"{clipped(plot.y.label, NAME_SHOWN_MAX)} over {clipped(plot.x.label, NAME_SHOWN_MAX)}: {lines}."
    counts: dict[str, int] = {}
    for mark in plot.marks:
        counts[mark.kind] = counts.get(mark.kind, 0) + mark.stands_for
    marks = ", ".join(f"{clipped(kind, NAME_SHOWN_MAX)} {count:,}" for kind, count in counts.items())
    return f"{said} Marks: {marks}." if marks else said


def kinds_of(plot: Plot) -> list[str]:
    """Return the kinds of a plot's marks, in the order of their rows."""
    return list(dict.fromkeys(mark.kind for mark in plot.marks))


def layout_of(plot: Plot) -> Layout:
    """Return where the parts of a plot are, with room for the names of its marks' kinds."""
    longest = max((min(len(it), KIND_SHOWN_MAX) for it in kinds_of(plot)), default=0)
    return LAYOUT._replace(left=max(LAYOUT.left, math.ceil(longest * KIND_CHARACTER) + KIND_ROOM))


def plot_height(plot: Plot, layout: Layout) -> int:
    """Return the height of a plot's SVG, in pixels."""
    return layout.top + layout.height + layout.lane * len(kinds_of(plot)) + layout.bottom


def x_span(plot: Plot) -> Span:
    """Return what is shown of the x axis: all of it."""
    marks = chain.from_iterable((it.x, it.x if it.until is None else it.until) for it in plot.marks)
    return span_of(chain(chain.from_iterable(it.x for it in plot.lines), marks), is_log=plot.x.is_log)


def y_span(plot: Plot) -> Span:
    """Return what is shown of the y axis: every point, and the bands, without their widest tenth if that is far out."""
    whole = _y_span(plot, 0.0)
    most = _y_span(plot, TRIMMED)
    return most if _width(whole, plot.y) > FAR_OUT * _width(most, plot.y) else whole


def _y_span(plot: Plot, trimmed: float) -> Span:
    bounds = chain.from_iterable((*_trimmed(it.low, trimmed, 0), *_trimmed(it.high, 0, trimmed)) for it in plot.lines)
    return span_of(chain(chain.from_iterable(it.y for it in plot.lines), bounds), is_log=plot.y.is_log, margin=MARGIN)


def _width(span: Span, axis: Axis) -> float:
    return math.log10(span.most / span.least) if axis.is_log else span.most - span.least


def _trimmed(bounds: Sequence[float], least: float, greatest: float) -> list[float]:
    """Return a band's bounds in order, without so great a part at the ends."""
    known = sorted(it for it in bounds if math.isfinite(it))
    return known[math.floor(len(known) * least) : len(known) - math.floor(len(known) * greatest)]


class Frame(NamedTuple):
    """The area of the lines, with both axes: from numbers to pixels."""

    layout: Layout
    x: Scale
    y: Scale

    @property
    def right(self) -> int:
        """Where the area ends."""
        return self.layout.width - self.layout.right

    @property
    def bottom(self) -> int:
        """Where the area ends, and the rows of marks begin."""
        return self.layout.top + self.layout.height

    def x_pixel(self, value: float) -> float:
        """Where an x is."""
        return position(self.x, value, self.layout.left, self.right)

    def y_pixel(self, value: float) -> float:
        """Where a y is; what is far outside is somewhere outside."""
        return _within(position(self.y, value, self.bottom, self.layout.top))

    def points(self, xs: Sequence[float], ys: Sequence[float], *, is_stepped: bool) -> list[Point]:
        """Where points are."""
        points = [(self.x_pixel(x), self.y_pixel(y)) for x, y in zip(xs, ys, strict=True)]
        return stepped(points) if is_stepped else points


def _within(pixel: float) -> float:
    return pixel if math.isnan(pixel) else max(min(pixel, 5000.0), -5000.0)


def _frame(plot: Plot, layout: Layout) -> Frame:
    width = layout.width - layout.left - layout.right
    x = scale_of(plot.x, x_span(plot), max(2, width // layout.x_tick))
    y = scale_of(plot.y, y_span(plot), max(2, layout.height // layout.y_tick))
    return Frame(layout, x, y)


def _clip(name: str, layout: Layout) -> str:
    left, width = layout.left - DOT_ROOM, layout.width - layout.left - layout.right + 2 * DOT_ROOM
    area = f'<rect x="{left}" y="{layout.top}" width="{width}" height="{layout.height}"/>'
    return f'<clipPath id="{name}-area">{area}</clipPath>'


def _drawing(plot: Plot, name: str, layout: Layout) -> str:
    """Return all of a plot's inside, from back to front."""
    frame = _frame(plot, layout)
    bands = "".join(_band(line, index, frame) for index, line in enumerate(plot.lines) if len(line.low))
    lines = "".join(_line(line, index, frame) for index, line in enumerate(plot.lines))
    inside = f'<g clip-path="url(#{name}-area)">{bands}{_hairlines(plot, frame)}{lines}</g>'
    return f'<g class="drawing">{_grid(frame)}{inside}{_axes(frame)}{_lanes(plot, frame)}{_labels(plot, frame)}</g>'


def _grid(frame: Frame) -> str:
    left, right, top, bottom = frame.layout.left, frame.right, frame.layout.top, frame.bottom
    across = "".join(f"M{left} {pixels(frame.y_pixel(it.at))}H{right}" for it in frame.y.ticks)
    down = "".join(f"M{pixels(frame.x_pixel(it.at))} {top}V{bottom}" for it in frame.x.ticks)
    return f'<path class="grid" d="{across}{down}"/>'


def _axes(frame: Frame) -> str:
    """The x axis below the area, and the line at y = 0."""
    axis = f'<path class="axis" d="M{frame.layout.left} {frame.bottom}H{frame.right}"/>'
    least, most = frame.y.span
    if frame.y.is_log or not least < 0 < most:
        return axis
    return f'<path class="zero" d="M{frame.layout.left} {pixels(frame.y_pixel(0.0))}H{frame.right}"/>{axis}'


def _band(line: Line, index: int, frame: Frame) -> str:
    least = LOG_MIN if frame.y.is_log else -math.inf  # a bound of 0 is at the bottom of a logarithmic axis
    lows = frame.points(line.x, [max(it, least) for it in line.low], is_stepped=line.is_stepped)
    highs = frame.points(line.x, line.high, is_stepped=line.is_stepped)
    return f'<path class="band colour-{index % COLOURS}" d="{band_path(lows, highs)}"/>'


def _line(line: Line, index: int, frame: Frame) -> str:
    colour = f"colour-{index % COLOURS}"
    points = frame.points(line.x, line.y, is_stepped=line.is_stepped)
    path = f'<path class="line {colour} dash-{index % DASHES}" d="{line_path(points)}"/>'
    known = [(x, y) for x, y in zip(line.x, line.y, strict=True) if not math.isnan(y)]
    if len(known) > DOTTED_MAX:
        return path
    places = ((frame.x_pixel(x), frame.y_pixel(y)) for x, y in known)
    dots = "".join(_shape(f"dot {colour}", DOTS[index % len(DOTS)], x, y) for x, y in places if not math.isnan(x + y))
    return path + dots


def _shape(look: str, outline: str, x: float, y: float, title: str = "") -> str:
    path = f'<path class="{look}" transform="translate({pixels(x)} {pixels(y)})" d="{outline}"'
    return f"{path}><title>{escaped(title)}</title></path>" if title else f"{path}/>"


def _hairlines(plot: Plot, frame: Frame) -> str:
    """A line through the plot at each mark, where they are few."""
    marks = [it for it in plot.marks if _is_placed(it, frame)]
    if not 0 < len(marks) <= HAIRLINES_MAX:
        return ""
    down = "".join(f"M{pixels(frame.x_pixel(it.x))} {frame.layout.top}V{frame.bottom}" for it in marks)
    return f'<path class="hairline" d="{down}"/>'


def _is_placed(mark: Mark, frame: Frame) -> bool:
    return not math.isnan(frame.x_pixel(mark.x))


def _lanes(plot: Plot, frame: Frame) -> str:
    """A row for each kind of marks, below the x axis."""
    return "".join(_lane(plot, kind, row, frame) for row, kind in enumerate(kinds_of(plot)))


def _lane(plot: Plot, kind: str, row: int, frame: Frame) -> str:
    layout = frame.layout
    y = frame.bottom + layout.lane * row + layout.lane // 2
    marks = (it for it in plot.marks if it.kind == kind and _is_placed(it, frame))
    drawn = "".join(_mark(it, SHAPES[row % len(SHAPES)], y, frame) for it in marks)
    name = escaped(clipped(kind, KIND_SHOWN_MAX))
    label = f'<text class="kind" x="{layout.left - KIND_ROOM}" y="{y + 4}">{name}</text>'
    return f'{label}<path class="lane" d="M{layout.left} {y}H{frame.right}"/>{drawn}'


def _mark(mark: Mark, outline: str, y: float, frame: Frame) -> str:
    look = f"mark {mark.standing.value}"
    begin = max(frame.x_pixel(mark.x), frame.layout.left)
    if mark.until is None:
        return _shape(look, outline, begin, y, mark_text(mark))
    end = min(frame.x_pixel(mark.until), frame.right)
    width = pixels(max(end - begin, 3.0))
    place = f'x="{pixels(begin)}" y="{pixels(y - 4)}" width="{width}" height="8" rx="2"'
    return f'<rect class="{look}" {place}><title>{escaped(mark_text(mark))}</title></rect>'


def mark_text(mark: Mark) -> str:
    """Return what a mark says, with how many others it stands for and how it stands."""
    others = f" (and {mark.stands_for - 1:,} more up to the next)" if mark.stands_for > 1 else ""
    standing = {Standing.PLAIN: "", Standing.GOOD: "good: ", Standing.BAD: "bad: ", Standing.OPEN: "not decided: "}
    return f"{standing[mark.standing]}{clipped(showable(mark.text), TEXT_MAX)}{others}"


def _labels(plot: Plot, frame: Frame) -> str:
    """The labels of both axes, and their titles."""
    layout = frame.layout
    beside = "".join(
        f'<text class="tick y" x="{layout.left - 10}" y="{pixels(frame.y_pixel(it.at) + 4)}">{it.label}</text>'
        for it in frame.y.ticks
    )
    below_lanes = frame.bottom + layout.lane * len(kinds_of(plot))
    below = "".join(
        f'<text class="tick x" x="{pixels(frame.x_pixel(it.at))}" y="{below_lanes + 18}">{it.label}</text>'
        for it in frame.x.ticks
    )
    middle = pixels((layout.left + frame.right) / 2)
    x_room = frame.right - layout.left + 2 * layout.right
    x_title = f'<text class="title x" x="{middle}" y="{below_lanes + 40}">{_title(frame.x, x_room)}</text>'
    return f'{beside}{below}<text class="title y" x="0" y="16">{_title(frame.y, layout.width)}</text>{x_title}'


def _title(scale: Scale, room: int) -> str:
    return escaped(clipped(scale.title, room // TITLE_CHARACTER))


def legend_sample(line: Line, index: int) -> str:
    """Return the drawing that stands for a line in a legend, 36 by 14 pixels."""
    colour = f"colour-{index % COLOURS}"
    band = f'<rect class="band {colour}" x="0" y="1" width="36" height="12"/>' if len(line.low) else ""
    dot = _shape(f"dot {colour}", DOTS[index % len(DOTS)], 18, 7) if _is_dotted(line) else ""
    return f'{band}<path class="line {colour} dash-{index % DASHES}" d="M1 7H35"/>{dot}'


def _is_dotted(line: Line) -> bool:
    return sum(not math.isnan(it) for it in line.y) <= DOTTED_MAX


def _legend(plot: Plot) -> tuple[str, int]:
    """Return the legend of a file of its own, below the title, and its height in pixels."""
    drawn, x, y = [], 0.0, 0
    for index, line in enumerate(plot.lines):
        name = clipped(line.name, NAME_SHOWN_MAX)
        width = 44 + len(name) * LEGEND_CHARACTER + 24
        if x and x + width > LAYOUT.width:
            x, y = 0.0, y + 20
        place = f'<g transform="translate({pixels(x)} {34 + y})">'
        drawn.append(f'{place}{legend_sample(line, index)}<text class="name" x="44" y="11">{escaped(name)}</text></g>')
        x += width
    return "".join(drawn), y + 24 if drawn else 0
