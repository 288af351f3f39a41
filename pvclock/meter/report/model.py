"""What a report shows, before it is drawn: the one language between what was measured and how it looks.

Numbers are in base units (ns, s, ppb); axes choose how they are written.  Texts may come from a guest or a file:
every text is escaped where it is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Final, NamedTuple, TypeAlias

__all__ = [
    "Axis",
    "Intervals",
    "Interval",
    "Line",
    "Mark",
    "Plot",
    "Report",
    "Section",
    "Standing",
    "Table",
    "Unit",
]


class Unit(StrEnum):
    """What the numbers along an axis count; the value is the base unit that they are given in."""

    NS = "ns"
    S = "s"
    PPB = "ppb"
    RATE = "s/s"
    """Guest seconds in a host second."""
    NONE = ""


class Standing(StrEnum):
    """How something fared: told by a word and a sign, never by colour alone."""

    GOOD = "good"
    BAD = "bad"
    OPEN = "open"
    """Not decided."""
    PLAIN = "plain"
    """Nothing to judge."""


STANDINGS: Final = {"passed": Standing.GOOD, "broken": Standing.BAD, "undecided": Standing.OPEN}
"""How something stands by its verdict, as JSON has it."""


class Axis(NamedTuple):
    """An axis: what it shows, in which unit.  is_log: only positive numbers are along it."""

    label: str
    unit: Unit
    is_log: bool = False


class Line(NamedTuple):
    """Points of one clock or vCPU, `x` rising or equal.

    y: math.nan where nothing is known: the line is broken there.  low, high: the band that the truth is in, point by
    point; both empty if there is none.  of: how many points there were before the line was thinned; 0: it was not.
    is_stepped: each y holds until the next x (a rate), instead of a straight line to the next point.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    of: int = 0
    is_stepped: bool = False


class Mark(NamedTuple):
    """Something that happened at `x`, or from there to `until`; shown on the axis.

    kind: in a word or two ("step", "pause", "host"): marks of one kind look alike and share a row of the legend.
    size: by which the greatest ones are kept where there are too many.  stands_for: so many are
    shown by it.
    """

    x: float
    kind: str
    text: str
    standing: Standing = Standing.PLAIN
    until: float | None = None
    size: float = 0.0
    stands_for: int = 1


class Plot(NamedTuple):
    """Lines over one axis, with bands and marks.  note: a sentence below it, on how to read it or what was left out."""

    title: str
    x: Axis
    y: Axis
    lines: tuple[Line, ...]
    marks: tuple[Mark, ...] = ()
    note: str = ""


class Interval(NamedTuple):
    """A quantity that is known to be from `low` to `high`.  value: the likeliest; None: no one is likelier."""

    name: str
    low: float
    high: float
    value: float | None = None
    standing: Standing = Standing.PLAIN


class Intervals(NamedTuple):
    """Quantities of one kind below each other, each a bar from its least to its most; 0 is drawn where it is within."""

    title: str
    axis: Axis
    rows: tuple[Interval, ...]
    note: str = ""


class Table(NamedTuple):
    """Rows of texts.  standings: of each row, or none of them."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    standings: tuple[Standing, ...] = ()


Part: TypeAlias = Plot | Intervals | Table


class Section(NamedTuple):
    """What one file told.

    title: what was measured; source: the file's name.  verdict: the result in a sentence, with how it stands;
    sentences: what else is worth saying first.
    """

    title: str
    source: str
    verdict: str
    standing: Standing
    sentences: tuple[str, ...]
    parts: tuple[Part, ...]


class Report(NamedTuple):
    """A whole report.  made_at: UTC, for people; version: of pvclock."""

    title: str
    made_at: str
    version: str
    sections: tuple[Section, ...]


POINTS_MAX: Final = 4000
"""Points of a line that are drawn: more than a screen has columns, so a page of many plots stays small."""
MARKS_MAX: Final = 400
"""Marks of a plot."""
