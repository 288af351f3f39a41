"""What a measurement comes to: the text that people read, and the numbers that programs read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["Figure"]


class Figure(NamedTuple):
    """One cell of a table: its text, and the numbers that the text was made of, with units in their keys."""

    text: str
    values: Mapping[str, object] = {}
