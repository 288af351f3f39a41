"""What of an axis is shown, where its ticks stand and how they are written."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvclock.meter.report.axes import Scale, Span, Tick, position, scale_of, span_of
from pvclock.meter.report.model import Axis, Unit

pytestmark = pytest.mark.row("E10")

MINUS = "\u2212"
UNITS = st.sampled_from(list(Unit))
ANY_NUMBERS = st.lists(st.floats(), max_size=6)
POSITIVE = st.floats(min_value=1e-290, max_value=1e290)


def shown(unit: Unit, least: float, most: float, wanted: int = 5, *, is_log: bool = False) -> tuple[str, list[str]]:
    """Return an axis' title and its labels, with the minus sign of a keyboard."""
    scale = scale_of(Axis("it", unit, is_log), Span(least, most), wanted)
    return scale.title.replace(MINUS, "-"), [it.label.replace(MINUS, "-") for it in scale.ticks]


@pytest.mark.parametrize(
    ("unit", "least", "most", "title", "labels"),
    [
        (Unit.NS, 0, 10, "it (ns)", ["0", "2", "4", "6", "8", "10"]),
        (Unit.NS, -1.2, 1.2, "it (ns)", ["-1.0", "-0.5", "0.0", "0.5", "1.0"]),
        (Unit.NS, 0, 2_500_000, "it (ms)", ["0.0", "0.5", "1.0", "1.5", "2.0", "2.5"]),
        (Unit.NS, -1e9, 0, "it (s)", ["-1.0", "-0.8", "-0.6", "-0.4", "-0.2", "0.0"]),
        (Unit.S, 0, 0.004, "it (ms)", ["0", "1", "2", "3", "4"]),
        (Unit.S, 0, 60, "it (s)", ["0", "20", "40", "60"]),
        (Unit.S, 0, 1800, "it (min)", ["0", "10", "20", "30"]),
        (Unit.S, 0, 86_400, "it (h)", ["0", "6", "12", "18", "24"]),
        (Unit.S, 0, 10 * 86_400, "it (days)", ["0", "2", "4", "6", "8", "10"]),
        (Unit.PPB, -40, 40, "it (ppb)", ["-40", "-20", "0", "20", "40"]),
        (Unit.PPB, 0, 50_000, "it (ppm)", ["0", "10", "20", "30", "40", "50"]),
        (Unit.NONE, 0, 50_000, "it", ["0", "10\u202f000", "20\u202f000", "30\u202f000", "40\u202f000", "50\u202f000"]),
    ],
)
def test_units_and_labels(unit: Unit, least: float, most: float, title: str, labels: list[str]) -> None:
    """Numbers are written in the unit that fits them, at round steps, with the digits that the step has."""
    assert shown(unit, least, most) == (title, labels)


@pytest.mark.parametrize(
    ("unit", "least", "most", "title", "first"),
    [
        (Unit.NS, -1e9 - 15, -1e9 + 15, "it (ns from -1 s)", "-10"),
        (Unit.RATE, 1 - 3e-9, 1 + 3e-9, "it (10⁻⁹ s/s from 1 s/s)", "-2"),
        (Unit.S, 3600, 3600.02, "it (ms from 3600 s)", "0"),
        (Unit.NS, 1e17, 5e17, "it (days)", "2000"),
        (Unit.NONE, 0, 4e-20, "it (10⁻²⁰)", "0"),
        (Unit.NONE, 0, 4e20, "it (10²⁰)", "0"),
        (Unit.S, 1.7e9, 1.7e9 + 10, "it (s from 1\u202f700\u202f000\u202f000 s)", "0"),
    ],
)
def test_numbers_that_labels_have_no_room_for(unit: Unit, least: float, most: float, title: str, first: str) -> None:
    """Where labels would need many digits they count from a round number, or in a power of ten."""
    assert (shown(unit, least, most)[0], shown(unit, least, most)[1][0]) == (title, first)


@pytest.mark.parametrize(
    ("unit", "least", "most", "title", "labels"),
    [
        (Unit.S, 1, 2000, "it", ["1 s", "10 s", "100 s", "1000 s"]),
        (Unit.NS, 1, 1e7, "it", ["1 ns", "100 ns", "10 us", "1 ms"]),
        (Unit.NONE, 1e-11, 3e-9, "it", ["10⁻¹¹", "10⁻¹⁰", "10⁻⁹"]),
        (Unit.NONE, 1, 30, "it", ["1", "2", "5", "10", "20"]),
        (Unit.NONE, 0.002, 0.02, "it", ["0.002", "0.005", "0.01", "0.02"]),
        (Unit.RATE, 1e-9, 1e-7, "it (s/s)", ["10⁻⁹", "10⁻⁸", "10⁻⁷"]),
        (Unit.S, 3.1, 3.9, "it (s)", ["3.2", "3.4", "3.6", "3.8"]),
    ],
)
def test_logarithmic_axes(unit: Unit, least: float, most: float, title: str, labels: list[str]) -> None:
    """Powers of ten, each in its own unit; 2 and 5 times these, or round steps, where there would be few."""
    assert shown(unit, least, most, is_log=True) == (title, labels)


@given(ANY_NUMBERS, UNITS, st.booleans(), st.integers(2, 12))
def test_any_numbers_give_an_axis(numbers: list[float], unit: Unit, is_log: bool, wanted: int) -> None:
    """Whatever is to be shown, an axis has a width, and from two ticks to about as many as wanted, all different."""
    span = span_of(numbers, is_log=is_log, margin=0.05)
    scale = scale_of(Axis("it", unit, is_log), span, wanted)
    assert -math.inf < span.least < span.most < math.inf
    assert 2 <= len(scale.ticks) <= 3 * wanted + 3
    assert len({it.label for it in scale.ticks}) == len(scale.ticks) == len({it.at for it in scale.ticks})
    room = (span.most - span.least) * 1e-4
    assert all(span.least - room <= it.at <= span.most + room for it in scale.ticks)
    assert all(len(it.label) <= 14 for it in scale.ticks)


@given(st.floats(-1e250, 1e250), st.floats(1e-9, 1e9), UNITS)
def test_ticks_are_at_equal_steps(least: float, width: float, unit: Unit) -> None:
    """The steps between ticks differ by rounding alone, and so do those of the labels."""
    span = span_of([least, least + width])
    ticks = scale_of(Axis("", unit), span, 6).ticks
    steps = [after.at - before.at for before, after in pairwise(ticks)]
    grain = max(abs(span.least), abs(span.most)) * 1e-15
    assert max(steps) - min(steps) <= 4 * grain + 1e-9 * max(steps)
    numbers = [written(it) for it in ticks]
    written_steps = [after - before for before, after in pairwise(numbers)]
    assert max(written_steps) - min(written_steps) <= 1e-6 * max(written_steps)


def written(tick: Tick) -> float:
    """Return the number that a label says."""
    return float(tick.label.replace(MINUS, "-").replace("\u202f", ""))


@pytest.mark.parametrize("nothing", [[], [math.nan], [math.inf, -math.inf]])
def test_nothing_to_show(nothing: list[float]) -> None:
    """Of no number at all an axis shows 0 to 1, or 1 to 10."""
    assert (span_of(nothing), span_of(nothing, is_log=True)) == (Span(0.0, 1.0), Span(1.0, 10.0))
    assert span_of([0.0, -3.0], is_log=True) == Span(1.0, 10.0)


@pytest.mark.parametrize(("number", "span"), [(0.0, (-1, 1)), (10.0, (9, 11)), (-10.0, (-11, -9)), (5e-324, (-1, 1))])
def test_one_number_has_room_around_it(number: float, span: tuple[float, float]) -> None:
    """A single number is in the middle of its axis."""
    assert span_of([number, math.nan]) == span


def test_margins() -> None:
    """The margin is a part of the width at each end, on a logarithmic axis a part of its decades."""
    assert span_of([0.0, 100.0], margin=0.05) == Span(-5.0, 105.0)
    assert span_of([1.0, 100.0], is_log=True, margin=0.5) == pytest.approx((0.1, 1000.0))


@given(POSITIVE, POSITIVE, POSITIVE)
def test_positions(least: float, most: float, value: float) -> None:
    """The ends of a span are at the ends of the axis, on a logarithmic one too, and what is between is between."""
    for is_log in (False, True):
        span = span_of([least, most], is_log=is_log)
        scale = Scale(span, is_log, (), "")
        assert position(scale, span.least, 100, 900) == pytest.approx(100)
        assert position(scale, span.most, 100, 900) == pytest.approx(900)
        between = min(max(value, span.least), span.most)
        assert 99.9999 <= position(scale, between, 100, 900) <= 900.0001


def test_what_is_not_positive_is_nowhere_on_a_logarithmic_axis() -> None:
    """0 and negative numbers have no place there; a tenth of a decade is a tenth."""
    scale = Scale(Span(1.0, 10.0), True, (), "")
    assert all(math.isnan(position(scale, it, 0, 1)) for it in (0.0, -1.0, math.nan))
    assert position(scale, 10**0.1, 0, 1) == pytest.approx(0.1)
