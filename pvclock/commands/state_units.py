"""Values of saved states in units for people."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Final

from pvclock.quantities import NS_PER_S, signed64

__all__ = ["EPOCH", "in_mhz", "in_seconds", "in_signed_ticks", "in_ticks", "in_utc"]

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def in_seconds(ns: Fraction | int) -> str:
    """Nanoseconds, with a sign if they are negative."""
    seconds, rest = divmod(int(abs(Fraction(ns))), NS_PER_S)
    return f"{'-' if ns < 0 else ''}{seconds}.{rest:09d} s"


def in_ticks(ticks: int, hz: int | None) -> str:
    """A TSC in hexadecimal, and in seconds where its frequency is known."""
    return f"{ticks:#x}, {in_seconds(Fraction(ticks * NS_PER_S, hz))}" if hz else f"{ticks:#x}"


def in_signed_ticks(ticks: int, hz: int) -> str:
    """An offset of a TSC."""
    signed = signed64(ticks)
    return f"{signed:+d} ticks, {in_seconds(Fraction(signed * NS_PER_S, hz))}"


def in_mhz(hz: int) -> str:
    """A frequency."""
    return f"{hz / 1e6:.6f} MHz"


def in_utc(ns: int) -> str:
    """Nanoseconds since 1970 as a date and time."""
    seconds, rest = divmod(ns, NS_PER_S)
    return f"{EPOCH + timedelta(seconds=seconds):%Y-%m-%d %H:%M:%S}.{rest:09d} UTC"
