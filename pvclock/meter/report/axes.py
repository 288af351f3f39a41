"""What of an axis is shown, and where its ticks stand: round numbers of a unit that people read.

scales.js has the same rules for a part of a plot; a test in the browser holds it to the same drawing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final, NamedTuple

from pvclock.meter.report.model import Axis, Unit

__all__ = ["Scale", "Span", "Tick", "UNITS", "position", "scale_of", "span_of"]


class Span(NamedTuple):
    """The part of an axis that is shown, in the axis' base unit; most > least."""

    least: float
    most: float


class Tick(NamedTuple):
    """A round number along an axis: where it is, in the base unit, and how it is written."""

    at: float
    label: str


class Scale(NamedTuple):
    """A span with its ticks and the axis' title, which has the unit that the labels are in."""

    span: Span
    is_log: bool
    ticks: tuple[Tick, ...]
    title: str


class ShownUnit(NamedTuple):
    """A unit that numbers are written in.

    factor: in base units.  since: the least magnitude, in base units, that it is for.  exponent: of the power of ten
    that factor is; None: it is none.
    """

    factor: float
    since: float
    name: str
    exponent: int | None


UNITS: Final[dict[Unit, tuple[ShownUnit, ...]]] = {
    Unit.NS: (
        ShownUnit(1.0, 0.0, "ns", 0),
        ShownUnit(1e3, 1e3, "us", 3),
        ShownUnit(1e6, 1e6, "ms", 6),
        ShownUnit(1e9, 1e9, "s", 9),
        ShownUnit(60e9, 300e9, "min", None),
        ShownUnit(3600e9, 10_800e9, "h", None),
        ShownUnit(86_400e9, 259_200e9, "days", None),
    ),
    Unit.S: (
        ShownUnit(1e-9, 0.0, "ns", -9),
        ShownUnit(1e-6, 1e-6, "us", -6),
        ShownUnit(1e-3, 1e-3, "ms", -3),
        ShownUnit(1.0, 1.0, "s", 0),
        ShownUnit(60.0, 300.0, "min", None),
        ShownUnit(3600.0, 10_800.0, "h", None),
        ShownUnit(86_400.0, 259_200.0, "days", None),
    ),
    Unit.PPB: (ShownUnit(1.0, 0.0, "ppb", 0), ShownUnit(1e3, 1e4, "ppm", 3)),
    Unit.RATE: (ShownUnit(1.0, 0.0, "s/s", 0),),
    Unit.NONE: (ShownUnit(1.0, 0.0, "", 0),),
}

MAGNITUDE_MAX: Final = 1e300
"""Beyond it the difference of two numbers may be infinite, and below its inverse a step may be 0."""
GRAIN: Final = 1e-14
"""The least width of a span, of its greatest number: two ticks must be two numbers of 53 bits."""
DIGITS_MAX: Final = 1e5
"""Steps that the greatest number may be: where labels would need more digits they count from a round number."""
LABEL_MAX: Final = 1e7
LABEL_STEP_MIN: Final = 0.99e-5
"""Labels above one, or in steps below the other, are in a power of ten of the unit."""
NARROW_SPACE: Final = "\u202f"
MINUS: Final = "\u2212"
SUPERSCRIPTS: Final = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")
HOURS: Final = (1.0, 2.0, 3.0, 6.0, 12.0, 24.0)


def span_of(values: Iterable[float], *, is_log: bool = False, margin: float = 0.0) -> Span:
    """The span that shows these numbers: of one alone some room around it, of none at all 0 to 1.

    margin: the part of the width that is left free at each end.  NaN and infinities are left out; is_log: so is what
    is not positive.
    """
    known = [it for it in values if math.isfinite(it) and (it > 0 or not is_log)]
    if not known:
        return Span(1.0, 10.0) if is_log else Span(0.0, 1.0)
    least, most = (_bounded(it, is_log=is_log) for it in (min(known), max(known)))
    if is_log:
        room = (most / least) ** margin if most > least * 1.01 else 10.0
        return Span(_bounded(least / room, is_log=True), _bounded(most * room, is_log=True))
    greatest = max(abs(least), abs(most))
    if most - least <= greatest * GRAIN:
        room = greatest * 0.1 if most == least else greatest * GRAIN * 10
        room = room or 1.0
    else:
        room = (most - least) * margin
    return Span(_bounded(least - room), _bounded(most + room))


def _bounded(number: float, *, is_log: bool = False) -> float:
    """A number whose differences and steps are numbers, too."""
    number = max(min(number, MAGNITUDE_MAX), -MAGNITUDE_MAX)
    if is_log:
        return max(number, 1 / MAGNITUDE_MAX)
    return number if abs(number) >= 1 / MAGNITUDE_MAX else 0.0


def position(scale: Scale, value: float, begin: float, end: float) -> float:
    """Where a number is between the span's two ends, which are drawn at begin and end; NaN: nowhere on this axis."""
    least, most = scale.span
    if scale.is_log:
        if not value > 0:
            return math.nan
        least, most, value = math.log10(least), math.log10(most), math.log10(value)
    return begin + (value - least) / (most - least) * (end - begin)


def scale_of(axis: Axis, span: Span, wanted: int) -> Scale:
    """An axis with about as many ticks as wanted, two at least."""
    if axis.is_log:
        ticks = _log_ticks(axis.unit, span, wanted)
        if len(ticks) > 1:
            return Scale(span, True, ticks, _titled(axis.label, axis.unit if axis.unit == Unit.RATE else ""))
    ticks, unit = _linear_ticks(axis.unit, span, wanted)
    return Scale(span, axis.is_log, ticks, _titled(axis.label, unit))


def _titled(label: str, unit: str) -> str:
    return f"{label} ({unit})" if unit and label else label or unit


def _linear_ticks(unit: Unit, span: Span, wanted: int) -> tuple[tuple[Tick, ...], str]:
    """Ticks at multiples of a round step, and what the title says of the unit."""
    least, most = span
    width = most - least
    greatest = max(abs(least), abs(most))
    shown = _shown_unit(unit, greatest, width / wanted)
    step = _round_step(width / shown.factor / wanted, shown.name)
    base = 0.0
    if greatest / shown.factor / step > DIGITS_MAX:
        grain = _power_of_ten(_exponent(width) + 1)
        base = math.floor((least / 2 + most / 2) / grain + 0.5) * grain
        greatest = max(abs(least - base), abs(most - base))
        shown = _shown_unit(unit, greatest, width / wanted)
        step = _round_step(width / shown.factor / wanted, shown.name)
    if greatest / shown.factor >= LABEL_MAX or step < LABEL_STEP_MIN:
        shown = _in_power_of_ten(shown, _exponent(greatest / shown.factor))
        step = _round_step(width / shown.factor / wanted, shown.name)
    places = max(0, -_exponent(step))
    begin, end = (least - base) / shown.factor / step, (most - base) / shown.factor / step
    counts = range(math.ceil(begin - 1e-6), math.floor(end + 1e-6) + 1)
    ticks = tuple(Tick(base + it * step * shown.factor, _decimal(it * step, places)) for it in counts)
    if len(ticks) < 2:
        return _linear_ticks(unit, span, wanted * 2)
    return ticks, " ".join(filter(None, [shown.name, f"from {_plain(unit, base)}" if base else ""]))


def _shown_unit(unit: Unit, greatest: float, step: float) -> ShownUnit:
    """The largest unit that a magnitude reaches and of which a step is no small part, unless it is a power of ten."""
    fitting = [
        it for it in UNITS[unit] if greatest >= it.since and (it.exponent is not None or step >= 0.08 * it.factor)
    ]
    return fitting[-1] if fitting else UNITS[unit][0]


def _in_power_of_ten(shown: ShownUnit, exponent: int) -> ShownUnit:
    name = " ".join(filter(None, ["10" + str(exponent).translate(SUPERSCRIPTS), shown.name]))
    return ShownUnit(shown.factor * _power_of_ten(exponent), 0.0, name, None)


def _round_step(least: float, unit_name: str) -> float:
    """The least of 1, 2 and 5 times a power of ten, of hours 1, 2, 3, 6, 12 and 24, that is not less than this."""
    if unit_name == "h" and 0.5 < least <= HOURS[-1]:
        return next(it for it in HOURS if it >= least * 0.999999)
    power = _power_of_ten(_exponent(least))
    return next(it for it in (power, 2 * power, 5 * power, 10 * power) if it >= least * 0.999999)


def _exponent(number: float) -> int:
    """Of the greatest power of ten that is no more than a positive number."""
    return math.floor(math.log10(number) + 1e-9)


def _power_of_ten(exponent: int) -> float:
    """The number next to a power of ten, which a product of tens may miss."""
    return float(f"1e{exponent}")


def _decimal(number: float, places: int) -> str:
    """A number with so many places, in groups of three digits from 10 000 on."""
    digits = f"{abs(number):.{places}f}"
    whole, _, rest = digits.partition(".")
    if len(whole) > 4:
        whole = f"{int(whole):,}".replace(",", NARROW_SPACE)
    sign = MINUS if number < 0 and digits.strip("0.") else ""
    return sign + whole + (f".{rest}" if rest else "")


def _plain(unit: Unit, number: float) -> str:
    """A round number with its unit, such as -1 s, in as few digits as say all of it, 15 at most."""
    decimal_units = [it for it in UNITS[unit] if it.exponent is not None]
    shown = [it for it in decimal_units if abs(number) >= it.since] or decimal_units[:1]
    value = number / shown[-1].factor
    if abs(value) >= 1e15:
        text = f"{value:.14e}"
        mantissa, _, exponent = text.partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".").replace("-", MINUS)
        return f"{mantissa}\u00d710{str(int(exponent)).translate(SUPERSCRIPTS)} {shown[-1].name}".rstrip()
    places = max(0, 14 - max(_exponent(abs(value)), 0))
    text = _decimal(value, places)
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} {shown[-1].name}".rstrip()


def _log_ticks(unit: Unit, span: Span, wanted: int) -> tuple[Tick, ...]:
    """Ticks at powers of ten, and at 2 and 5 times these where there are few."""
    begin = math.ceil(math.log10(span.least) - 1e-9)
    end = math.floor(math.log10(span.most) + 1e-9)
    if end - begin >= 2:
        every = max(1, math.ceil((end - begin) / wanted))
        exponents = range(math.ceil(begin / every) * every, end + 1, every)
        pairs = [(1, exponent) for exponent in exponents]
    else:
        pairs = [(mantissa, exponent) for exponent in range(begin - 1, end + 1) for mantissa in (1, 2, 5)]
    ticks = (
        Tick(mantissa * _power_of_ten(exponent), _log_label(unit, mantissa, exponent)) for mantissa, exponent in pairs
    )
    return tuple(it for it in ticks if span.least * 0.999999 <= it.at <= span.most * 1.000001)


def _log_label(unit: Unit, mantissa: int, exponent: int) -> str:
    """A number as mantissa times a power of ten of the base unit, in the unit that is next below it."""
    decimal_units = [it for it in UNITS[unit] if it.exponent is not None]
    reached = [it for it in decimal_units if it.exponent is not None and it.exponent <= exponent]
    shown = (reached or decimal_units)[-1 if reached else 0]
    zeros = exponent - (shown.exponent or 0)
    if 0 <= zeros <= 4:
        number = f"{mantissa}{'0' * zeros}"
    elif -3 <= zeros < 0:
        number = f"0.{'0' * (-zeros - 1)}{mantissa}"
    else:
        power = "10" + str(zeros).translate(SUPERSCRIPTS)
        number = power if mantissa == 1 else f"{mantissa}\u00d7{power}"
    return number if unit in {Unit.RATE, Unit.NONE} else f"{number} {shown.name}"
