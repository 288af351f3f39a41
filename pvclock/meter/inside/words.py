"""Bounds in words: rounded outwards, so that what is said of a bound is true of it, too."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import ceil, floor
from typing import Final

__all__ = [
    "at_least",
    "between",
    "cpus_in_words",
    "far_end",
    "floor_in_words",
    "hz_in_words",
    "listed",
    "ppm_between",
    "rate_in_words",
    "signed_between",
]

UNITS: Final = ((10**9, "s"), (10**6, "ms"), (10**3, "us"), (1, "ns"))
DIGITS: Final = 4
TENTH: Final = Fraction(1, 10)
RATE_UNITS: Final = (
    (10**7, 10**7, "%", Fraction(1, 1000)),
    (10_000, 1000, "ppm", TENTH),
    (0, 1, "ppb", TENTH),
)
"""From how many ppb on a rate is told in a unit, how many ppb that is, its name, and its finest grain."""


def at_least(ns: Fraction) -> str:
    """A length of time, rounded down to four digits."""
    return _length(_rounded(abs(ns), up=False))


def floor_in_words(ns: Fraction) -> str:
    """A length of time, rounded up to four digits."""
    return _length(_rounded(abs(ns), up=True))


def between(low: Fraction, high: Fraction) -> str:
    """A length of time by its bounds, both of one sign, without it."""
    near, far = sorted((abs(low), abs(high)))
    digits = _digits_for(near, far)
    low_text, high_text = _length(_rounded(near, digits, up=False)), _length(_rounded(far, digits, up=True))
    return low_text if low_text == high_text else f"{low_text} to {high_text}"


def far_end(low: Fraction, high: Fraction) -> str:
    """The greater of two bounds of a length, as between() has it."""
    near, far = sorted((abs(low), abs(high)))
    return _length(_rounded(far, _digits_for(near, far), up=True))


def signed_between(low: Fraction, high: Fraction) -> str:
    """A difference by its bounds, signed, with the digits that between() and floor_in_words() have."""
    digits = _digits_for(*sorted((abs(low), abs(high)))) if low * high > 0 else DIGITS
    low_text, high_text = _signed_length(low, digits, up=False), _signed_length(high, digits, up=True)
    return low_text if low_text == high_text else f"{low_text} to {high_text}"


def ppm_between(low: Fraction, high: Fraction) -> str:
    """A rate in ppb by its bounds, rounded outwards, in ppb, ppm or % as fits; signed."""
    size, unit, grain = _rate_unit(max(abs(low), abs(high)))
    low_text, high_text = _signed(low / size, grain, up=False), _signed(high / size, grain, up=True)
    return f"{low_text} {unit}" if low_text == high_text else f"{low_text} to {high_text} {unit}"


def rate_in_words(ppb: Fraction) -> str:
    """A rate without its sign, rounded up."""
    size, unit, grain = _rate_unit(abs(ppb))
    return f"{_signed(abs(ppb) / size, grain, up=True).removeprefix('+')} {unit}"


def hz_in_words(hz: Fraction, *, up: bool = False) -> str:
    """A frequency in whole Hz, rounded down or up."""
    return f"{ceil(hz) if up else floor(hz):,} Hz"


def cpus_in_words(numbers: Sequence[int]) -> str:
    """Such as CPU 2, or CPUs 0, 1 and 5 to 8."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [
        text
        for run in runs
        for text in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else [str(number) for number in run])
    ]
    return f"CPU{'s' * (len(numbers) != 1)} {listed(parts)}"


def listed(parts: Sequence[str], last: str = "and") -> str:
    """Such as a, b and c."""
    return f" {last} ".join(filter(None, [", ".join(parts[:-1]), parts[-1]])) if parts else ""


# Inside


def _digits_for(near: Fraction, far: Fraction) -> int:
    """So many that two bounds far from 0 and close to each other differ in two of them."""
    return max(DIGITS, len(str(floor(far))) - len(str(floor(far - near))) + 2)


def _rounded(number: Fraction, digits: int = DIGITS, *, up: bool, finest: Fraction = TENTH) -> Fraction:
    """To so many digits, and no finer than that, where there are fewer before the point."""
    grain = max(Fraction(10) ** (len(str(floor(number))) - digits), finest)
    return (ceil if up else floor)(number / grain) * grain


def _length(ns: Fraction) -> str:
    size, unit = next(((size, unit) for size, unit in UNITS if ns >= size), UNITS[-1])
    whole, rest = divmod(int(ns * 10), size * 10)
    return f"{whole}.{rest:0{len(str(size))}}".rstrip("0").rstrip(".") + f" {unit}"


def _signed_length(ns: Fraction, digits: int, *, up: bool) -> str:
    rounded = _rounded(abs(ns), digits, up=up == (ns >= 0))
    return f"{'-' if ns < 0 and rounded else '+' if rounded else ''}{_length(rounded)}"


def _rate_unit(ppb: Fraction) -> tuple[int, str, Fraction]:
    """Of how many ppb it is one, its name, and its finest grain."""
    return next((size, unit, grain) for least, size, unit, grain in RATE_UNITS if ppb >= least)


def _signed(number: Fraction, grain: Fraction, *, up: bool) -> str:
    rounded = _rounded(abs(number), up=up == (number >= 0), finest=grain)
    return f"{'-' if number < 0 and rounded else '+' if rounded else ''}{float(rounded):.10g}"
