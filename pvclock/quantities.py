"""The quantities of guest time, one type each, so that a type checker finds mixed-up units.

All are plain ints at run time.  Ticks and addresses are unsigned 64-bit and wrap; nanoseconds of the guest's clock
are unsigned 64-bit and do not wrap within 584 years.
"""

from __future__ import annotations

from fractions import Fraction
from math import floor
from typing import Final, NewType

__all__ = [
    "NS_PER_S",
    "U32_MASK",
    "U64_MASK",
    "Gpa",
    "GuestNs",
    "GuestTsc",
    "HostTsc",
    "RefNs",
    "quoted",
    "shown",
    "signed64",
]

HostTsc = NewType("HostTsc", int)
"""Ticks of the host's time stamp counter."""

GuestTsc = NewType("GuestTsc", int)
"""Ticks as the guest's RDTSC returns them: host ticks, scaled, plus the vCPU's offset."""

RefNs = NewType("RefNs", int)
"""Nanoseconds of the host's reference clock."""

GuestNs = NewType("GuestNs", int)
"""Nanoseconds of the guest's monotonic clock."""

Gpa = NewType("Gpa", int)
"""A guest-physical address."""

NS_PER_S: Final = 1_000_000_000
U32_MASK: Final = (1 << 32) - 1
U64_MASK: Final = (1 << 64) - 1

SHOWN_BITS_MAX: Final = 128
QUOTED_MAX: Final = 100
"""Characters of a value that a message shows."""


def shown(number: float | Fraction) -> str:
    """A number for a message: by its bit length from 2^128 on, since Python refuses to print thousands of digits.

    A fraction is shown to 3 significant digits.
    """
    if not isinstance(number, float) and abs(number) >= 1 << SHOWN_BITS_MAX:
        return f"a number of {floor(number).bit_length()} bits"
    return f"{float(number):.3g}" if isinstance(number, Fraction) else str(number)


def quoted(value: object) -> str:
    """A caller's value for a message: its repr, cut after QUOTED_MAX characters."""
    if isinstance(value, int) and not isinstance(value, bool):
        return shown(value)
    try:
        text = repr(value)
    except ValueError:  # a number in it has more digits than Python prints
        return f"a {type(value).__name__}"
    return text if len(text) <= QUOTED_MAX else f"{text[:QUOTED_MAX]}..."


def signed64(difference: int) -> int:
    """The difference a - b of two 64-bit counters in [-2^63, 2^63): negative if a is behind b."""
    difference &= U64_MASK
    return difference - (U64_MASK + 1) if difference > U64_MASK // 2 else difference
