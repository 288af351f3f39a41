"""How far and how fast a machine's guest travels in time."""

from __future__ import annotations

from fractions import Fraction
from sys import float_info
from typing import NamedTuple

from pvclock.arguments import instance, whole
from pvclock.errors import RangeError, WrongType
from pvclock.quantities import U64_MASK, shown

__all__ = ["Travel", "as_travel"]


class Travel(NamedTuple):
    """How far and how fast.  until_ns: the guest time at which it ends; None for no end.

    max_rate: guest seconds in a host second, 1 or more; None for as fast as can be.
    """

    until_ns: int | None = None
    max_rate: float | Fraction | None = None


def as_travel(given: object) -> Travel:
    """The options of an argument; WrongType or RangeError for any other."""
    options = Travel() if given is True else instance("time_travel", given, Travel, "a Travel, True or False")
    if options.until_ns is not None:
        whole("time_travel: until_ns", options.until_ns, 0, U64_MASK)
    rate = options.max_rate
    if rate is not None:
        if isinstance(rate, bool) or not isinstance(rate, int | float | Fraction):
            raise WrongType("time_travel: max_rate", rate, "a number of guest seconds in a host second")
        if not 1 <= rate <= float_info.max:
            raise RangeError(
                f"time_travel: max_rate is {shown(rate)}; it must be finite, and 1 or more: a guest's time passes by "
                "itself at 1"
            )
    return options
