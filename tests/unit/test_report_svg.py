"""Plots as SVG: what is drawn, and where."""

import math
import re
from importlib import resources
from itertools import pairwise
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvclock.meter.report.model import (
    MARKS_MAX,
    POINTS_MAX,
    Axis,
    Line,
    Mark,
    Plot,
    Standing,
    Unit,
)
from pvclock.meter.report.outlines import DOTS, SHAPES, band_path, line_path, pixels, stepped
from pvclock.meter.report.svg import LAYOUT, description, layout_of, mark_text, plot_svg, ready_to_draw, standalone
from tests.report_examples import AHEAD, HOSTILE, TIME, deviations, rates, watched

pytestmark = pytest.mark.row("E10")

NAN = math.nan
RIGHT = LAYOUT.width - LAYOUT.right
BOTTOM = LAYOUT.top + LAYOUT.height


def drawn(plot: Plot) -> ET.Element:
    """Return a plot's SVG as XML, without the namespace."""
    return ET.fromstring(plot_svg(ready_to_draw(plot), "it").replace('xmlns="http://www.w3.org/2000/svg" ', ""))  # noqa: S314 - ours


def of_look(svg: ET.Element, look: str) -> list[ET.Element]:
    """Return the elements that have a class."""
    return [it for it in svg.iter() if look in it.get("class", "").split()]


def points_of(path: str) -> list[tuple[float, float]]:
    """Return the points of a path of moves and straight lines."""
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](\S+) ([^MLZh]+)", path)]


def place_of(shape: ET.Element) -> tuple[float, float]:
    """Return where a shape was put."""
    x, y = re.findall(r"-?[\d.]+", shape.get("transform", ""))
    return float(x), float(y)


def simple(*lines: Line, marks: tuple[Mark, ...] = ()) -> Plot:
    """Return a plot of lines over seconds."""
    return Plot("it", TIME, AHEAD, lines, marks)


def test_a_line_is_where_its_points_are() -> None:
    """The x axis is as wide as the points; above and below them is a margin of a 22nd of the height."""
    (line,) = of_look(drawn(simple(Line("it", [0, 5, 10], [-100, 0, 100]))), "line")
    places = points_of(line.get("d", ""))
    assert [x for x, _ in places] == [LAYOUT.left, (LAYOUT.left + RIGHT) / 2, RIGHT]
    assert [y for _, y in places] == pytest.approx([BOTTOM - 300 / 22, BOTTOM - 150, LAYOUT.top + 300 / 22], abs=0.1)


def test_paths_of_lines() -> None:
    """A line is broken at each unknown point, and a point that is alone is a dot."""
    assert line_path([(0, 1), (2, 3.25), (NAN, 3), (4, NAN), (5, 6), (7, NAN), (8, 9), (9, 9)]) == (
        "M0 1L2 3.3M5 6h0M8 9L9 9"
    )
    assert line_path([]) == line_path([(NAN, NAN)]) == ""


def test_paths_of_bands() -> None:
    """A band goes along the highs and back along the lows, where both are known; one point has a width."""
    lows, highs = [(0.0, 9.0), (1.0, 9.0), (2.0, NAN), (3.0, 8.0)], [(0.0, 1.0), (1.0, 2.0), (2.0, 3.0), (3.0, 4.0)]
    assert band_path(lows, highs) == "M0 1L1 2L1 9L0 9ZM2 4L4 4L4 8L2 8Z"


def test_steps() -> None:
    """A stepped line holds each y until the next x."""
    assert stepped([(0, 1), (2, 5), (3, 0)]) == [(0, 1), (2, 1), (2, 5), (3, 5), (3, 0)]
    assert stepped([]) == []
    (line,) = of_look(drawn(simple(Line("it", [0, 5, 10], [0, 1, 2], is_stepped=True))), "line")
    assert all(a[0] == b[0] or a[1] == b[1] for a, b in pairwise(points_of(line.get("d", ""))))


@given(st.floats(-1e7, 1e7))
def test_pixels(number: float) -> None:
    """A coordinate is told to a tenth, as short as that can be."""
    assert abs(float(pixels(number)) - number) <= 0.0501
    assert re.fullmatch(r"-?\d+(\.[1-9])?", pixels(number))


def test_bands_and_zero() -> None:
    """A band is drawn around its line, and 0 is drawn where it is within."""
    svg = drawn(watched())
    assert [it.get("class") for it in of_look(svg, "band")] == ["band colour-0", "band colour-1"]
    assert len(of_look(svg, "zero")) == 1
    assert of_look(drawn(simple(Line("it", [0, 1], [5, 6]))), "zero") == []
    assert of_look(drawn(deviations()), "zero") == []


def test_the_first_wide_bounds_do_not_flatten_the_rest() -> None:
    """A band's widest tenth may lie outside the plot, and its line never does."""
    labels = [it.text or "" for it in of_look(drawn(rates()), "tick") if "y" in it.get("class", "")]
    assert max(float(it.replace("\u2212", "-")) for it in labels) < 500
    bound = [1e6, *[1.0] * 19]
    plot = simple(Line("it", list(range(20)), [0.0] * 19 + [9e6], [-it for it in bound], bound))
    (line,) = of_look(drawn(plot), "line")
    assert all(LAYOUT.top < y < BOTTOM for _, y in points_of(line.get("d", "")))


def test_infinite_bounds_reach_beyond_the_plot() -> None:
    """A band without a bound is as high as the plot, and so is one to 0 on a logarithmic axis."""
    plot = simple(Line("it", [0, 1, 2], [0, 1, 2], [-1, -math.inf, 1], [1, math.inf, 3]))
    heights = [y for _, y in points_of(of_look(drawn(plot), "band")[0].get("d", ""))]
    assert min(heights) < LAYOUT.top
    assert max(heights) > BOTTOM
    log = Plot("it", TIME, Axis("it", Unit.NONE, is_log=True), (Line("it", [0, 1], [1, 2], [0, 0], [3, 3]),))
    assert max(y for _, y in points_of(of_look(drawn(log), "band")[0].get("d", ""))) > BOTTOM


def test_lines_are_told_apart_without_colour() -> None:
    """The first 35 lines differ in colour and dash together, neighbours in each alone; few points have shapes."""
    svg = drawn(simple(*(Line(str(it), [0, 1], [it, it]) for it in range(35))))
    looks = [it.get("class", "").split()[1:] for it in of_look(svg, "line")]
    assert len({tuple(it) for it in looks}) == 35
    assert all(a[0] != b[0] and a[1] != b[1] for a, b in pairwise(looks))
    assert len({it.get("d") for it in of_look(svg, "dot")}) == len(DOTS)


def test_only_few_points_have_dots() -> None:
    """Up to 60 known points are shown by a dot each, more by the line alone."""
    few = simple(Line("it", list(range(61)), [NAN, *range(60)]))
    many = simple(Line("it", list(range(61)), list(range(61))))
    assert (len(of_look(drawn(few), "dot")), len(of_look(drawn(many), "dot"))) == (60, 0)


def test_nothing_to_draw() -> None:
    """A plot without points and marks has its axes, and a note that there are no data."""
    assert ready_to_draw(simple(Line("it", [], []))).note == "There are no data."
    assert len(of_look(drawn(simple()), "tick")) >= 4
    assert ready_to_draw(simple(Line("it", [0], [NAN]))).note == ""


def test_numbers_are_as_long_as_they_are_of_use() -> None:
    """A line keeps 13 digits of its numbers: the last one of an hour is a ns."""
    line = ready_to_draw(simple(Line("it", [0.1 + 0.2], [-1e9 - 1 / 3], [-math.inf], [NAN]))).lines[0]
    assert (line.x, line.y, line.low) == ([0.3], [-1000000000.333], [-math.inf])
    assert math.isnan(line.high[0])


@pytest.mark.parametrize("paused_ns", [3.6e13, 2.6e14, 3e15])
def test_a_band_is_as_wide_after_a_long_pause(paused_ns: float) -> None:
    """23 ns to each side of a guest that was paused for 10 hours, three days or a month, in the data and drawn."""
    y = [-paused_ns + it for it in range(40)]
    low, high = [it - 23 for it in y], [it + 23 for it in y]
    plot = simple(Line("it", list(range(40)), y, low, high))
    line = ready_to_draw(plot).lines[0]
    assert (line.y, line.low, line.high) == (y, low, high)
    places = points_of(of_look(drawn(plot), "band")[0].get("d", ""))
    heights = {x: abs(y - there) for (x, y), (_, there) in zip(places[:40], reversed(places[40:]), strict=True)}
    assert min(heights.values()) > 100


@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=9), st.floats(0, 1e6), st.sampled_from(Unit))
def test_rounding_never_narrows_a_band(y: list[float], bound: float, unit: Unit) -> None:
    """The low end is rounded down, the high end up, whatever the magnitudes; the point stays between."""
    y.sort()
    low, high = [it - bound for it in y], [it + bound for it in y]
    plot = Plot("it", TIME, Axis("it", unit), (Line("it", list(range(len(y))), y, low, high),))
    line = ready_to_draw(plot).lines[0]
    assert all(it <= exact for it, exact in zip(line.low, low, strict=True))
    assert all(it >= exact for it, exact in zip(line.high, high, strict=True))
    assert all(low <= it <= high for low, it, high in zip(line.low, line.y, line.high, strict=True))


def test_marks_have_a_row_and_a_shape_for_each_kind() -> None:
    """Marks of one kind are of one shape on one row, below the lines, at their x; each says what it is."""
    svg = drawn(watched())
    assert [it.text for it in of_look(svg, "kind")] == ["step", "pause", "page"]
    step, later_step = (it for it in of_look(svg, "mark") if it.get("d") == SHAPES[0])
    assert place_of(step) == pytest.approx((LAYOUT.left + (RIGHT - LAYOUT.left) * 120 / 600, BOTTOM + 10), abs=0.1)
    assert (step.get("class"), later_step.get("class")) == ("mark bad", "mark open")
    assert step.findtext("title") == "bad: vCPU 1 stepped by +38 ns, within 2 ns"
    (pause,) = (it for it in svg.iter("rect") if "mark" in it.get("class", ""))
    assert float(pause.get("width", "")) == pytest.approx((RIGHT - LAYOUT.left) * 30 / 600, abs=0.1)


def test_long_names_of_kinds_have_room() -> None:
    """The margin is as wide as the longest kind, which is cut beyond a limit; a short one makes it no narrower."""
    marks = tuple(Mark(it, kind, "it") for it, kind in enumerate(("disagreement", "a", "unknown step", "k" * 99)))
    widths = [LAYOUT.left, 104, 104, 134]
    assert [layout_of(simple(marks=marks[begin:end])).left for begin, end in ((1, 2), (0, 1), (1, 3), (0, 4))] == widths
    svg = drawn(simple(marks=marks))
    assert [it.text for it in of_look(svg, "kind")] == ["disagreement", "a", "unknown step", "k" * 15 + "\u2026"]
    assert place_of(of_look(svg, "mark")[0])[0] == 134
    assert of_look(svg, "kind")[0].get("x") == "122"


def test_marks_alone_make_a_plot() -> None:
    """A plot without a line is as wide as its marks reach."""
    svg = drawn(simple(marks=(Mark(3.0, "step", "it"), Mark(5.0, "pause", "it", until=13.0))))
    (step,) = (it for it in of_look(svg, "mark") if it.get("transform"))
    assert place_of(step)[0] == LAYOUT.left
    (pause,) = (it for it in svg.iter("rect") if "mark" in it.get("class", ""))
    assert float(pause.get("x", "")) + float(pause.get("width", "")) == pytest.approx(RIGHT, abs=0.1)


def test_what_a_mark_says() -> None:
    """How it stands in words, its text, and how many it stands for."""
    assert mark_text(Mark(0, "step", "here", Standing.OPEN, stands_for=1234)) == (
        "not decided: here (and 1,233 more up to the next)"
    )
    assert mark_text(Mark(0, "step", "here")) == "here"


def test_it_is_described_in_words() -> None:
    """Who does not see a plot is told its title, axes, lines and marks."""
    svg = drawn(watched())
    assert svg.get("role") == "img"
    assert svg.get("aria-labelledby") == "it-title it-about"
    assert svg.findtext("title") == "Guest ahead of the reference"
    assert (
        svg.findtext("desc")
        == description(watched())
        == ("ahead of the reference over time: vCPU 0, vCPU 1. Marks: step 2, pause 1, page 1.")
    )


def test_long_lines_are_thinned_and_it_is_said() -> None:
    """A plot has no more points and marks than a page can have, and its note says how many there were."""
    count = 3 * POINTS_MAX
    line = Line("it", list(range(count)), [it % 91 for it in range(count)])
    plot = ready_to_draw(simple(line, marks=tuple(Mark(it, "step", "") for it in range(count))))
    assert (len(plot.lines[0].x) <= POINTS_MAX, len(plot.marks)) == (True, MARKS_MAX)
    assert "of 12,000 points are drawn" in plot.note
    assert "400 of 12,000 marks are drawn" in plot.note
    fleet = ready_to_draw(simple(*[Line("it", list(range(2000)), [0.0] * 2000)] * 200))
    assert sum(len(it.x) for it in fleet.lines) <= 10 * POINTS_MAX


NUMBERS = st.lists(st.floats(), max_size=8)
TEXTS = st.text(max_size=30)


@settings(max_examples=60)
@given(NUMBERS, NUMBERS, TEXTS, st.booleans(), st.booleans())
def test_any_plot_is_sound_svg(x: list[float], y: list[float], text: str, is_log: bool, is_stepped: bool) -> None:
    """Whatever the numbers and the texts, the file is XML and has no coordinate that is not a number."""
    count = min(len(x), len(y))
    x, y = sorted(it for it in x[:count] if not math.isnan(it)), y[:count]
    y = y[: len(x)]
    line = Line(text, x, y, y, y, is_stepped=is_stepped)
    marks = tuple(Mark(it, text, text, until=it + 1) for it in x)
    file = standalone(Plot(text, Axis(text, Unit.S, is_log), Axis(text, Unit.NS, is_log), (line,), marks, text))
    svg = ET.fromstring(file)  # noqa: S314 - ours
    assert svg.tag == "{http://www.w3.org/2000/svg}svg"
    numbers = " ".join(each.get(name, "") for each in svg.iter() for name in ("d", "x", "y", "width", "transform"))
    assert re.findall(r"nan|inf|\de", numbers) == []


def test_a_file_of_its_own() -> None:
    """A stand-alone plot has its title, legend, note and style, and asks for nothing from elsewhere."""
    file = standalone(watched())
    texts = [it.text for it in ET.fromstring(file).iter("{http://www.w3.org/2000/svg}text")]  # noqa: S314 - ours
    assert {"Guest ahead of the reference", "vCPU 0", "vCPU 1", watched().note} <= set(texts)
    assert "prefers-color-scheme: dark" in file
    assert re.findall(r"https?://[^\"]+", file) == ["http://www.w3.org/2000/svg"]
    assert "<script" not in standalone(watched()._replace(title=HOSTILE, note=HOSTILE))


def colours(scheme: str) -> dict[str, str]:
    """Return the colours of the style sheet, by their names."""
    css = resources.files("pvclock.meter.report").joinpath("plot.css").read_text(encoding="utf-8")
    light, _, dark = css.partition("@media screen and (prefers-color-scheme: dark)")
    return dict(re.findall(r"--([\w-]+): (#\w{6});", light if scheme == "light" else dark))


def luminance(colour: str) -> float:
    """Return the relative luminance of a colour, as WCAG 2.2 defines it."""
    parts = [int(colour[it : it + 2], 16) / 255 for it in (1, 3, 5)]
    red, green, blue = (it / 12.92 if it <= 0.04045 else ((it + 0.055) / 1.055) ** 2.4 for it in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of two colours, 1 to 21."""
    less, more = sorted((luminance(one), luminance(other)))
    return (more + 0.05) / (less + 0.05)


def test_contrast_is_as_wcag_has_it() -> None:
    """The measure itself: black on white is 21, and #767676 is the lightest grey that is 4.5."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") >= 4.5 > contrast("#777777", "#ffffff")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme: str) -> None:
    """On the paper of both schemes texts have a contrast of 4.5 and lines of 3 at least."""
    found = colours(scheme)
    texts = {
        it: contrast(found[it], found["paper"]) for it in ("ink", "quiet", "good", "bad", "open", "plain", "line-0")
    }
    lines = {it: contrast(found[it], found["paper"]) for it in ("rule-strong", *(f"line-{it}" for it in range(7)))}
    assert {name: ratio for name, ratio in texts.items() if ratio < 4.5} == {}
    assert {name: ratio for name, ratio in lines.items() if ratio < 3} == {}
    assert len({found[f"line-{it}"] for it in range(7)}) == 7
