"""The outlines of lines, bands and shapes: path data in pixels, from points in pixels; drawing.js makes the same."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final, TypeAlias

__all__ = ["Point", "band_path", "line_path", "pixels", "stepped", "DOTS", "SHAPES"]

Point: TypeAlias = tuple[float, float]

DOTS: Final = (
    "M-3 0A3 3 0 1 1 3 0A3 3 0 1 1 -3 0Z",
    "M-3 -3H3V3H-3Z",
    "M0 -4L3.6 2.6H-3.6Z",
    "M0 -4L4 0L0 4L-4 0Z",
    "M0 4L3.6 -2.6H-3.6Z",
    "M-4 -1.3H-1.3V-4H1.3V-1.3H4V1.3H1.3V4H-1.3V1.3H-4Z",
)
"""Of the points of lines that have few."""

SHAPES: Final = (
    "M0 -5L4.6 3.6H-4.6Z",
    "M0 -5L5 0L0 5L-5 0Z",
    "M-3.8 -3.8H3.8V3.8H-3.8Z",
    "M-4.4 0A4.4 4.4 0 1 1 4.4 0A4.4 4.4 0 1 1 -4.4 0Z",
    "M0 5L4.6 -3.6H-4.6Z",
    "M-5 -1.6H-1.6V-5H1.6V-1.6H5V1.6H1.6V5H-1.6V1.6H-5Z",
    "M-5 -3L-3 -5L0 -2L3 -5L5 -3L2 0L5 3L3 5L0 2L-3 5L-5 3L-2 0Z",
    "M-1.6 -5H1.6V5H-1.6Z",
)
"""Of marks, one for each kind."""


def pixels(number: float) -> str:
    """A coordinate to a tenth of a pixel."""
    rounded = math.floor(number * 10 + 0.5) / 10
    return str(int(rounded)) if rounded == int(rounded) else repr(rounded)


def line_path(points: Sequence[Point]) -> str:
    """A line through points, broken where one is NaN; a point that is alone is a dot."""
    path = []
    for run in _runs(points):
        path += ["M" + "L".join(f"{pixels(x)} {pixels(y)}" for x, y in run), "h0" if len(run) == 1 else ""]
    return "".join(path)


def band_path(lows: Sequence[Point], highs: Sequence[Point]) -> str:
    """The areas between two lines of the same x, where both are known; a point that is alone is two pixels wide."""
    both = [(low[0], low[1] + high[1]) for low, high in zip(lows, highs, strict=True)]
    path, begin = [], 0
    for run in _runs(both):
        begin = next(
            it for it in range(begin, len(both)) if not math.isnan(both[it][1]) and not math.isnan(both[it][0])
        )
        end = begin + len(run)
        forth, back = list(highs[begin:end]), list(reversed(lows[begin:end]))
        if len(run) == 1:
            (x, high), (_, low) = forth[0], back[0]
            forth, back = [(x - 1, high), (x + 1, high)], [(x + 1, low), (x - 1, low)]
        path.append("M" + "L".join(f"{pixels(x)} {pixels(y)}" for x, y in forth + back) + "Z")
        begin = end
    return "".join(path)


def _runs(points: Sequence[Point]) -> Iterator[list[Point]]:
    """Give the pieces of a line between those points that are NaN."""
    run: list[Point] = []
    for point in points:
        if math.isnan(point[0]) or math.isnan(point[1]):
            if run:
                yield run
            run = []
        else:
            run.append(point)
    if run:
        yield run


def stepped(points: Sequence[Point]) -> list[Point]:
    """Points so that each y holds until the next x."""
    if not points:
        return []
    steps = [points[0]]
    for before, after in pairwise(points):
        steps += [(after[0], before[1]), after]
    return steps
