"""Show the (mul, shift) that a guest gets for a TSC frequency, and its rate error."""

from __future__ import annotations

import argparse
from typing import Final

from pvclock._scale import ClockScale
from pvclock.commands.report import Report
from pvclock.commands.screen import Screen
from pvclock.commands.tables import Table
from pvclock.errors import RangeError
from pvclock.quantities import U64_MASK, quoted

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES: Final = """\
  pvclock scale 2.4GHz              the pair for 2.4 GHz
  pvclock scale 2596132000 100M     two frequencies, one of them in Hz"""

UNITS = {"k": 10**3, "m": 10**6, "g": 10**9}
SECONDS_PER_DAY = 86_400
DIGITS_MAX = 40  # 2^64 Hz has 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("hz", nargs="+", metavar="HZ", help="frequency in Hz, or with a unit: 2596132000, 2.4GHz, 100M")
    parser.add_argument("--rounding", choices=("floor", "nearest"), default="floor", help='"floor" is what Linux does')


def run(arguments: argparse.Namespace, screen: Screen) -> Report:
    """Show a row for each frequency."""
    scales = [ClockScale.from_hz(parse_hz(text), rounding=arguments.rounding) for text in arguments.hz]
    table = Table("TSC (Hz)", "mul", "shift", "rate error (ppb)", "ns a day")
    for scale in scales:
        table.add_row(
            f"{scale.hz}",
            f"{scale.mul:#010x}",
            f"{scale.shift}",
            f"{scale.rate_error_ppb:+.6f}",
            f"{_error_ns_per_day(scale):+.0f}",
        )
    screen.show(table)
    return Report(True, {"rounding": arguments.rounding, "scales": [_values(scale) for scale in scales]})


def _values(scale: ClockScale) -> dict[str, int | float | None]:
    return {
        "tsc_hz": scale.hz,
        "mul": scale.mul,
        "shift": scale.shift,
        "rate_error_ppb": scale.rate_error_ppb,
        "error_ns_per_day": _error_ns_per_day(scale),
    }


def _error_ns_per_day(scale: ClockScale) -> float:
    return scale.rate_error_ppb * SECONDS_PER_DAY


def parse_hz(text: str) -> int:
    """A whole number of Hz from "2596132000", "2.4GHz" or "100M"; RangeError for anything else."""
    number = text.lower().removesuffix("hz").strip()
    unit = UNITS.get(number[-1:], 1)
    whole, _, decimals = number.removesuffix(number[-1:] if unit > 1 else "").strip().partition(".")
    digits = whole + decimals
    if not digits.isascii() or not digits.isdigit() or len(digits) > DIGITS_MAX:
        raise RangeError(f"{quoted(text)} is not a frequency; write 2596132000, 2.4GHz or 100M")
    hz, rest = divmod(int(digits) * unit, int(10 ** len(decimals)))
    if rest:
        raise RangeError(f"{quoted(text)} is not a whole number of Hz")
    if not 1 <= hz <= U64_MASK:
        raise RangeError(f"{quoted(text)} is not a frequency of a TSC; it can be 1 Hz to {U64_MASK} Hz (2^64 - 1)")
    return hz
