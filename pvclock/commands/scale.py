"""Show the (mul, shift) that a guest gets for a TSC frequency, and its rate error."""

from __future__ import annotations

import argparse
import json

from rich.console import Console
from rich.table import Table

from pvclock._core import ClockScale
from pvclock.errors import RangeError

__all__ = ["add_arguments", "run"]

UNITS = {"k": 10**3, "m": 10**6, "g": 10**9}
SECONDS_PER_DAY = 86_400
DIGITS_MAX = 40  # 2^64 Hz has 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("hz", nargs="+", metavar="HZ", help="frequency in Hz, or with a unit: 2596132000, 2.4GHz, 100M")
    parser.add_argument("--rounding", choices=("floor", "nearest"), default="floor", help='"floor" is what Linux does')


def run(arguments: argparse.Namespace) -> int:
    """Print a row for each frequency."""
    scales = [ClockScale.from_hz(parse_hz(text), rounding=arguments.rounding) for text in arguments.hz]
    rows = [
        {
            "hz": scale.hz,
            "mul": scale.mul,
            "shift": scale.shift,
            "rate_error_ppb": scale.rate_error_ppb,
            "error_ns_per_day": scale.rate_error_ppb * SECONDS_PER_DAY,
        }
        for scale in scales
    ]
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    table = Table("TSC (Hz)", "mul", "shift", "rate error (ppb)", "ns a day")
    for row in rows:
        table.add_row(
            f"{row['hz']}",
            f"{row['mul']:#010x}",
            f"{row['shift']}",
            f"{row['rate_error_ppb']:+.6f}",
            f"{row['error_ns_per_day']:+.0f}",
        )
    Console().print(table)
    return 0


def parse_hz(text: str) -> int:
    """A whole number of Hz from "2596132000", "2.4GHz" or "100M"; RangeError if it is none."""
    number = text.lower().removesuffix("hz").strip()
    unit = UNITS.get(number[-1:], 1)
    whole, _, decimals = number.removesuffix(number[-1:] if unit > 1 else "").strip().partition(".")
    digits = whole + decimals
    if not digits.isascii() or not digits.isdigit() or len(digits) > DIGITS_MAX:
        raise RangeError(f"{text!r} is no frequency; write 2596132000, 2.4GHz or 100M")
    hz, rest = divmod(int(digits) * unit, int(10 ** len(decimals)))
    if rest:
        raise RangeError(f"{text!r} is not a whole number of Hz")
    return hz
