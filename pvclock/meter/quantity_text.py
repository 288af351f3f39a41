"""Quantities as somebody writes them, with their units: lengths of time, guest times and rates."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Final

from pvclock.errors import ConfigError
from pvclock.quantities import U64_MASK, quoted

__all__ = ["parse_drift_ppb", "parse_guest_time_ns", "parse_step_ns"]

NS_IN: Final = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9}
GUEST_NS_IN: Final = NS_IN | {"min": 60 * 10**9, "h": 3600 * 10**9, "d": 86_400 * 10**9}
PPB_IN: Final = {"ppb": 1, "ppm": 10**3}
QUANTITY: Final = re.compile(r"(\d{1,12}(?:\.\d{1,12})?) ?([a-z]+)")


def parse_step_ns(text: str) -> Fraction:
    """A length of time such as 250ns, 1us, 1ms or 0.5s, in ns; ConfigError for anything else."""
    return _parsed(text, NS_IN, "a length of time, such as 250ns, 1us, 1ms or 0.5s")


def parse_drift_ppb(text: str) -> Fraction:
    """A relative rate such as 10ppb or 1ppm, in ppb; ConfigError for anything else."""
    return _parsed(text, PPB_IN, "a rate, such as 10ppb, 0.5ppb or 1ppm")


def parse_guest_time_ns(text: str) -> int:
    """A guest time such as 90s, 1.5h or 30d, in whole ns; ConfigError for anything else, and beyond 2^64 ns."""
    ns = round(_parsed(text, GUEST_NS_IN, "a guest time, such as 90s, 1.5h or 30d"))
    if ns > U64_MASK:
        raise ConfigError(f"{quoted(text)} is more than a guest's clock can show, which is 2^64 ns (584 years)")
    return ns


def _parsed(text: str, units: Mapping[str, int], wanted: str) -> Fraction:
    match = QUANTITY.fullmatch(text.strip())
    if match is None or match[2] not in units:
        raise ConfigError(f"{quoted(text)} is not {wanted}; units are {', '.join(units)}")
    return Fraction(match[1]) * units[match[2]]
