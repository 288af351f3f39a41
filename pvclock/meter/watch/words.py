"""Times, rates and changes in words: the unit that fits, and no digit that the bound does not cover."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from fractions import Fraction
from itertools import pairwise
from typing import Final

from pvclock.quantities import GuestNs

__all__ = [
    "about_ns",
    "bounded_ns",
    "counted",
    "duration",
    "exact_ns",
    "flags_in_words",
    "plain_ns",
    "rate_in_words",
    "reading",
    "runs_in_words",
    "time_of_day",
    "vcpus_in_words",
]

UNITS: Final = ((1_000_000_000, "s"), (1_000_000, "ms"), (1000, "us"), (1, "ns"))
FLAGS: Final = ((1, "stable"), (2, "stopped"))
"""PVCLOCK_TSC_STABLE_BIT and PVCLOCK_GUEST_STOPPED of the pvclock ABI."""


def exact_ns(ns: int, bound_ns: int = 1) -> str:
    """A signed time, such as -1.035 012 345 s, to the digit that `bound_ns` leaves."""
    grain = 10 ** (len(str(max(bound_ns, 1))) - 1)
    rounded = (abs(ns) + grain // 2) // grain * grain
    size, unit = next(((size, unit) for size, unit in UNITS if rounded >= size), UNITS[-1])
    whole, rest = divmod(rounded, size)
    digits = f"{rest + size}"[1 : 1 + max(len(str(size)) - len(str(grain)), 0)]
    groups = " ".join(digits[begin : begin + 3] for begin in range(0, len(digits), 3))
    sign = "-" if ns < 0 < rounded else "+"
    return f"{sign}{whole:,}".replace(",", " ") + f".{groups}" * bool(groups) + f" {unit}"


def bounded_ns(ns: int, bound_ns: int) -> str:
    """A signed time with its bound, in two digits: -70 us (within 250 us)."""
    return f"{exact_ns(ns, bound_ns // 10)} (within {exact_ns(bound_ns, bound_ns // 10).removeprefix('+')})"


def about_ns(ns: int) -> str:
    """A signed time in four digits, such as -1.035 s, for a table."""
    return exact_ns(ns, 10 ** max(len(str(abs(ns))) - 4, 0))


def duration(ns: int) -> str:
    """A time without a sign, in four digits."""
    return about_ns(abs(ns)).removeprefix("+")


def plain_ns(ns: Fraction | int) -> str:
    """A time that somebody chose, without a sign, such as 1 ms or 0.5 ns."""
    size, unit = next(((size, unit) for size, unit in UNITS if ns >= size), UNITS[-1])
    return f"{float(Fraction(ns, size)):.10g} {unit}"


def rate_in_words(ppb: float, bound_ppb: float) -> str:
    """A signed rate with its bound, to the digit that this leaves: -64.67 ppb, within 0.08."""
    size, unit = (1000, "ppm") if max(abs(ppb), bound_ppb) >= 10_000 else (1, "ppb")
    places = next((places for places in range(6) if bound_ppb / size * 10**places >= 1), 6)
    return f"{ppb / size:+z.{places}f} {unit}, within {bound_ppb / size:.{places}f}"


def reading(ns: GuestNs) -> str:
    """A guest's clock as its kernel's messages show it, in s since it began."""
    return f"{ns // 1_000_000_000}.{ns // 1000 % 1_000_000:06d} s"


def counted(number: int, what: str) -> str:
    """Such as "1 poll" or "1,234 polls"."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def vcpus_in_words(vcpus: Iterable[int]) -> str:
    """Such as "vCPU 0" or "vCPUs 0-3, 7"; in ascending order."""
    numbers = list(vcpus)
    return f"vCPU{'s' * (len(numbers) > 1)} {runs_in_words(numbers)}"


def runs_in_words(numbers: Iterable[int]) -> str:
    """Ascending numbers, such as "0-3, 7"."""
    numbers = list(numbers)
    begins = [numbers[0], *(after for before, after in pairwise(numbers) if after != before + 1)]
    ends = [*(before for before, after in pairwise(numbers) if after != before + 1), numbers[-1]]
    return ", ".join(f"{begin}-{end}" if end > begin else f"{begin}" for begin, end in zip(begins, ends, strict=True))


def flags_in_words(flags: int) -> str:
    """A page's flags by name; a bit that has none as a number."""
    known = [name for bit, name in FLAGS if flags & bit]
    unknown = flags & ~sum(bit for bit, _ in FLAGS)
    return ", ".join([*known, *[f"{unknown:#x}"] * bool(unknown)]) or "-"


def time_of_day(utc_ns: int) -> str:
    """UTC to the ms, such as 14:03:04.512."""
    return datetime.fromtimestamp(utc_ns // 1_000_000 / 1000, UTC).strftime("%H:%M:%S.%f")[:-3]
