"""Intervals as a list of names and bars: what is drawn, and where."""

import math
import re
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock.meter.report.intervals import ROWS_MAX, bars
from pvclock.meter.report.model import Axis, Interval, Intervals, Unit
from tests.report_examples import HOSTILE, promises

pytestmark = pytest.mark.row("E10")

NAN = math.nan


def drawn(*rows: Interval, is_log: bool = False) -> ET.Element:
    """Return intervals in ns as XML."""
    return ET.fromstring(bars(Intervals("it", Axis("it", Unit.NS, is_log), rows)))  # noqa: S314 - ours


def of_look(root: ET.Element, look: str) -> list[ET.Element]:
    """Return the elements that have a class."""
    return [it for it in root.iter() if look in it.get("class", "").split()]


def percent(element: ET.Element, name: str) -> float:
    """Return a place or a size in % of a bar's room."""
    return float(element.get(name, "").removesuffix("%"))


def places_of(root: ET.Element, look: str) -> list[float]:
    """Return where the shapes of a look were put, in %."""
    return [
        percent(it, "x") for it in root.iter("svg") for shape in it.findall("path") if look in shape.get("class", "")
    ]


def test_each_row_is_a_bar() -> None:
    """From its least to its most, with its whole name, its likeliest value and how it stands; 0 is drawn."""
    root = drawn(*promises().rows)
    names = [it.text for it in of_look(root, "name") if it.text]
    assert names == [
        "\u2713 vCPU 0 against vCPU 1",
        "\u2717 pvclock against KVM",
        "? a name that is longer than there is room for it",
        "TSC",
    ]
    good, bad, _, _ = of_look(root, "interval")
    scale = percent(good, "width") / 21
    assert percent(bad, "width") / scale == pytest.approx(27, abs=0.1)
    assert (percent(bad, "x") - percent(good, "x")) / scale == pytest.approx(16, abs=0.1)
    value, _ = places_of(root, "mark")
    assert (value - percent(good, "x")) / scale == pytest.approx(11, abs=0.1)
    assert places_of(root, "whisker")[:2] == pytest.approx(
        [percent(good, "x"), percent(good, "x") + 21 * scale], abs=0.02
    )
    assert len(of_look(root, "axis")) == 4 + 1


def test_intervals_without_ends() -> None:
    """An end that is infinite has no line and is at the end of the axis; an interval that is unknown is said to be."""
    root = drawn(Interval("open", -1.0, math.inf, 0.0), Interval("unknown", NAN, NAN), Interval("known", 0.0, 9.0))
    assert len(of_look(root, "whisker")) == 1 + 2
    first, _ = of_look(root, "interval")
    assert percent(first, "x") + percent(first, "width") == pytest.approx(94)
    assert [it.text for it in of_look(root, "unknown")] == ["unknown"]
    assert of_look(drawn(), "interval") == []


@pytest.mark.parametrize(
    ("interval", "said"),
    [
        (Interval("it", -12.0, 9.0, -1.25), "-12 to 9 ns, likeliest -1.25"),
        (Interval("it", -3.6e13 - 23, -3.6e13 + 23), "-36000000000023 to -35999999999977 ns"),
        (Interval("it", 2.0, 2.0), "2 to 2 ns"),
        (Interval("it", -math.inf, 1 / 3), "-inf to 0.333333 ns"),
        (Interval("it", NAN, 1.0), "unknown"),
    ],
)
def test_what_a_bar_says(interval: Interval, said: str) -> None:
    """Its ends in the base unit, with the digits in which they differ: to who points at it, or cannot see it."""
    (bar,) = (it for it in drawn(interval).iter("svg") if it.get("role") == "img")
    assert (bar.get("aria-label"), bar.findtext("g/title")) == (said, said)


@given(st.lists(st.tuples(st.floats(), st.floats(), st.one_of(st.none(), st.floats())), max_size=4), st.booleans())
def test_any_interval_has_a_place(rows: list[tuple[float, float, float | None]], is_log: bool) -> None:
    """Whatever the numbers, no coordinate is outside or is none."""
    root = drawn(*(Interval(HOSTILE, min(a, b), max(a, b), value) for a, b, value in rows), is_log=is_log)
    coordinates = [each.get(name, "0") for each in root.iter() for name in ("x", "x1", "x2", "width")]
    assert all(re.fullmatch(r"\d+(\.\d+)?%?", it) for it in coordinates)
    assert all(0 <= float(it.removesuffix("%")) <= 100 for it in coordinates)


def test_no_more_rows_than_a_page_has_room_for() -> None:
    """The first 200."""
    assert len(of_look(drawn(*[Interval("it", 0.0, 1.0)] * (ROWS_MAX + 5)), "interval")) == ROWS_MAX
