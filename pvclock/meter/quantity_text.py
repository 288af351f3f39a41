"""Budgets as somebody writes them: lengths of time and rates, with their units."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Final

from pvclock.errors import ConfigError
from pvclock.quantities import quoted

__all__ = ["parse_drift_ppb", "parse_step_ns"]

NS_IN: Final = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9}
PPB_IN: Final = {"ppb": 1, "ppm": 10**3}
QUANTITY: Final = re.compile(r"(\d{1,12}(?:\.\d{1,12})?) ?([a-z]+)")


def parse_step_ns(text: str) -> Fraction:
    """A length of time such as 250ns, 1us, 1ms or 0.5s, in ns; ConfigError for anything else."""
    return _parsed(text, NS_IN, "a length of time, such as 250ns, 1us, 1ms or 0.5s")


def parse_drift_ppb(text: str) -> Fraction:
    """A relative rate such as 10ppb or 1ppm, in ppb; ConfigError for anything else."""
    return _parsed(text, PPB_IN, "a rate, such as 10ppb, 0.5ppb or 1ppm")


def _parsed(text: str, units: Mapping[str, int], wanted: str) -> Fraction:
    match = QUANTITY.fullmatch(text.strip())
    if match is None or match[2] not in units:
        raise ConfigError(f"{quoted(text)} is not {wanted}; units are {', '.join(units)}")
    return Fraction(match[1]) * units[match[2]]
