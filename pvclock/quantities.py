"""The quantities of guest time, one type each, so that a type checker catches what the eye does not.

All are plain ints at run time.  Ticks and addresses are unsigned 64-bit and wrap; nanoseconds of the guest's clock
are unsigned 64-bit and do not wrap within 584 years.
"""

from __future__ import annotations

from fractions import Fraction
from math import floor
from typing import Final, NewType

__all__ = ["NS_PER_S", "U64_MASK", "Gpa", "GuestNs", "GuestTsc", "HostTsc", "RefNs", "quoted", "shown", "signed64"]

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
U64_MASK: Final = (1 << 64) - 1

SHOWN_BITS_MAX: Final = 128
QUOTED_MAX: Final = 100
"""So many characters are shown of a value."""


def shown(number: float | Fraction) -> str:
    """The number for a message: in words if it is long, for Python does not print some thousands of digits at all.

    A fraction as 3 digits and an exponent, which is all that a reader needs and not beyond what a float can hold.
    """
    if not isinstance(number, float) and abs(number) >= 1 << SHOWN_BITS_MAX:
        return f"a number of {floor(number).bit_length()} bits"
    return f"{float(number):.3g}" if isinstance(number, Fraction) else str(number)


def quoted(value: object) -> str:
    """A value that a caller gave, for a message: as Python writes it, cut where that is long."""
    if isinstance(value, int) and not isinstance(value, bool):
        return shown(value)
    try:
        text = repr(value)
    except ValueError:  # a number in it has more digits than Python prints
        return f"a {type(value).__name__}"
    return text if len(text) <= QUOTED_MAX else f"{text[:QUOTED_MAX]}..."


def signed64(difference: int) -> int:
    """A difference of two 64-bit counters, taken as the shorter way round: negative if the first is behind."""
    difference &= U64_MASK
    return difference - (U64_MASK + 1) if difference > U64_MASK // 2 else difference
