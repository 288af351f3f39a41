"""Show what a guest gets for a TSC frequency: kvmclock's (mul, shift) or Hyper-V's scale, and its rate error."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import zip_longest
from typing import Final, NamedTuple

from pvclock._scale import ClockScale
from pvclock.commands.outcome import Outcome
from pvclock.commands.screen import Screen
from pvclock.commands.tables import Table
from pvclock.errors import RangeError
from pvclock.providers.hyperv.scales import (
    UNITS_PER_S,
    kvm_scale,
    page_scale,
    virtualbox_scale,
    virtualbox_ticks_per_unit,
)
from pvclock.quantities import NS_PER_S, U64_MASK, quoted

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES: Final = """\
  pvclock scale 2.4GHz              the pair for 2.4 GHz
  pvclock scale 2596132000 100M     two frequencies, one of them in Hz
  pvclock scale --hyperv 2.4GHz     the reference time of three VMMs"""

UNITS = {"k": 10**3, "m": 10**6, "g": 10**9}
SECONDS_PER_DAY = 86_400
DIGITS_MAX = 40  # 2^64 Hz has 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("hz", nargs="+", metavar="HZ", help="frequency in Hz, or with a unit: 2596132000, 2.4GHz, 100M")
    parser.add_argument("--rounding", choices=("floor", "nearest"), default="floor", help='"floor" is what Linux does')
    parser.add_argument("--hyperv", action="store_true", help="Hyper-V's reference time, whose unit is 100 ns")


def run(arguments: argparse.Namespace, screen: Screen) -> Outcome:
    """Show a row for each frequency; of reference time, one for each VMM."""
    scales = [ClockScale.from_hz(parse_hz(text), rounding=arguments.rounding) for text in arguments.hz]
    found: dict[str, object] = {"rounding": arguments.rounding, "scales": [_values(scale) for scale in scales]}
    if arguments.hyperv:
        references = [reference for scale in scales for reference in reference_times(scale.hz)]
        screen.show(_reference_table(references))
        found["reference_times"] = [_reference_values(reference) for reference in references]
    else:
        screen.show(_pair_table(scales))
    return Outcome(True, found)


def _pair_table(scales: list[ClockScale]) -> Table:
    table = Table("TSC (Hz)", "mul", "shift", "rate error (ppb)", "ns a day")
    for scale in scales:
        table.add_row(
            f"{scale.hz}",
            f"{scale.mul:#010x}",
            f"{scale.shift}",
            f"{scale.rate_error_ppb:+.6f}",
            f"{_error_ns_per_day(scale):+.0f}",
        )
    return table


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


class ReferenceTime(NamedTuple):
    """How fast one VMM's reference time runs: a page by its scale, a counter by how many ticks it takes for a unit.

    Units are of 100 ns.  units, ticks: it adds units/ticks a tick.  A scale is units in 2^64 ticks.
    """

    tsc_hz: int
    what: str
    vmm: str
    units: int
    ticks: int

    @property
    def rate_error_ppb(self) -> float:
        """How much faster than true time it runs."""
        exact = UNITS_PER_S * self.ticks
        return (self.tsc_hz * self.units - exact) * NS_PER_S / exact


def reference_times(hz: int) -> Iterator[ReferenceTime]:
    """Reference time for a TSC of `hz` as this engine has it, KVM and VirtualBox; RangeError for one without a page."""
    if page_scale(hz) is None:
        raise RangeError(f"{hz} Hz have no reference TSC page: its scale is less than one unit of 100 ns a tick")
    pages = {"pvclock": page_scale(hz), "KVM": kvm_scale(ClockScale.from_hz(hz)), "VirtualBox": virtualbox_scale(hz)}
    for vmm, scale in pages.items():
        if scale:
            yield ReferenceTime(hz, "page", vmm, scale, 1 << 64)
    yield ReferenceTime(hz, "counter", "VirtualBox", 1, virtualbox_ticks_per_unit(hz))


def _reference_table(references: list[ReferenceTime]) -> Table:
    table = Table("TSC (Hz)", "reference time", "of", "scale, or ticks a unit", "rate error (ppb)", "ns a day")
    for reference, following in zip_longest(references, references[1:]):
        table.add_row(
            f"{reference.tsc_hz}",
            reference.what,
            reference.vmm,
            f"{reference.units:#018x}" if reference.what == "page" else f"{reference.ticks}",
            f"{reference.rate_error_ppb:+z.6f}",
            f"{reference.rate_error_ppb * SECONDS_PER_DAY:+z.0f}",
        )
        if following and following.tsc_hz != reference.tsc_hz:
            table.end_section()
    return table


def _reference_values(reference: ReferenceTime) -> dict[str, int | float | str]:
    rate = {"scale": reference.units, "offset": 0} if reference.what == "page" else {"ticks_per_unit": reference.ticks}
    return {
        "tsc_hz": reference.tsc_hz,
        "what": reference.what,
        "of": reference.vmm,
        **rate,
        "rate_error_ppb": reference.rate_error_ppb,
        "error_ns_per_day": reference.rate_error_ppb * SECONDS_PER_DAY,
    }


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
