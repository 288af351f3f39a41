"""Texts of unknown origin in a page: a guest or a file may have written them, and they say something and do nothing."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable
from typing import Final

__all__ = ["showable", "escaped", "clipped", "json_in_script", "json_numbers"]

UNSHOWABLE: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
"""Controls, those that turn the direction of writing among them, and what no file can hold as UTF-8."""

REPLACEMENT: Final = "\ufffd"
ELLIPSIS: Final = "\u2026"


def showable(text: str) -> str:
    """Return a text with U+FFFD for what cannot be shown."""
    return UNSHOWABLE.sub(REPLACEMENT, text)


def escaped(text: str) -> str:
    """Return a text as it may stand in HTML and SVG, in an attribute too."""
    return html.escape(showable(text))


def clipped(text: str, characters_max: int) -> str:
    """Return a text's beginning, with an ellipsis if that is not all of it."""
    return text if len(text) <= characters_max else text[: characters_max - 1].rstrip() + ELLIPSIS


def json_in_script(value: object) -> str:
    """Return a value as JSON that ends no script element and opens none."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def json_numbers(numbers: Iterable[float]) -> str:
    """Return numbers as a JSON array; NaN as null, an infinity as a number that every reader takes for one."""
    return "[" + ",".join(map(_json_number, numbers)) + "]"


def _json_number(number: float) -> str:
    if math.isfinite(number):
        return repr(int(number)) if number == int(number) and abs(number) < 1e15 else repr(number)
    return "null" if math.isnan(number) else "1e999" if number > 0 else "-1e999"
