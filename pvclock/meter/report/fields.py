"""The fields of an object in a JSON file, each read as what it must be; an error names file, line and field.

What a file says may come from a guest: texts are made safe for a terminal and kept short, numbers are finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from pvclock.errors import ReportSourceError
from pvclock.quantities import quoted

__all__ = ["Fields", "Place", "safe_text"]

TEXT_MAX: Final = 2000
"""Characters of a text that a page shows; the longest of ours, a row's rule, has some 600."""
NUMBER_MAX: Final = 2**127
"""More than any count of ticks or ns has, and small enough for sums and squares of floats."""
LIST_MAX: Final = 100_000


class Place(NamedTuple):
    """Where something stands: a file, as it was named, and a line of it, from 1; None: the whole file."""

    path: str
    line: int | None = None

    def error(self, found: str, expected: str) -> ReportSourceError:
        """What is wrong there."""
        return ReportSourceError(self.path, self.line, found, expected)


class Fields:
    """A JSON object, and where it stands.  Each method gives one field, or raises ReportSourceError."""

    def __init__(self, content: object, place: Place, path: str = "") -> None:
        if not isinstance(content, Mapping):
            raise place.error(f"{_named(path)}{_kind(content)}", "an object")
        self.content: Mapping[str, object] = content
        self.place = place
        self._path = path

    def __contains__(self, name: str) -> bool:
        return self.content.get(name) is not None

    def text(self, name: str) -> str:
        """A text, safe for a terminal, cut if it is long."""
        value = self.content.get(name)
        if not isinstance(value, str):
            raise self._wrong(name, "a text")
        return safe_text(value)

    def text_or_none(self, name: str) -> str | None:
        """A text, or None for null and for a field that is not there."""
        return self.text(name) if name in self else None

    def number(self, name: str) -> float:
        """A finite number, as a float."""
        value = self.content.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not -NUMBER_MAX <= value <= NUMBER_MAX:
            raise self._wrong(name, "a number")
        return float(value)

    def number_or_none(self, name: str) -> float | None:
        """A number, or None for null and for a field that is not there."""
        return self.number(name) if name in self else None

    def number_or_nan(self, name: str) -> float:
        """A number, or nan for null and for a field that is not there."""
        return self.number(name) if name in self else math.nan

    def whole(self, name: str) -> int:
        """A whole number."""
        value = self.content.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) > NUMBER_MAX:
            raise self._wrong(name, "a whole number")
        return value

    def whole_or_none(self, name: str) -> int | None:
        """A whole number, or None for null and for a field that is not there."""
        return self.whole(name) if name in self else None

    def truth(self, name: str) -> bool:
        """True or false."""
        value = self.content.get(name)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def fields(self, name: str) -> Fields:
        """An object."""
        value = self.content.get(name)
        if not isinstance(value, Mapping):
            raise self._wrong(name, "an object")
        return Fields(value, self.place, f"{self._path}{name}.")

    def all_fields(self, name: str) -> Iterator[Fields]:
        """A list of objects."""
        for place, value in enumerate(self._list(name)):
            yield Fields(value, self.place, f"{self._path}{name}[{place}].")

    def numbers(self, name: str) -> list[float]:
        """The numbers in a list; those that are null are left out."""
        places = {f"{place}": value for place, value in enumerate(self._list(name)) if value is not None}
        each = Fields(places, self.place, f"{self._path}{name}.")
        return [each.number(place) for place in places]

    def texts(self, name: str) -> list[str]:
        """A list of texts."""
        values = self._list(name)
        if not all(isinstance(value, str) for value in values):
            raise self._wrong(name, "a list of texts")
        return [safe_text(str(value)) for value in values]

    def _list(self, name: str) -> list[object]:
        value = self.content.get(name)
        if not isinstance(value, list) or len(value) > LIST_MAX:
            raise self._wrong(name, f"a list of up to {LIST_MAX:,}")
        return value

    def _wrong(self, name: str, expected: str) -> ReportSourceError:
        found = _kind(self.content[name]) if name in self.content else "nothing"
        return self.place.error(f"{_named(self._path + name)}{found}", expected)


def safe_text(text: str) -> str:
    """A text that a terminal can show: what cannot be printed as its escape, and what is too long cut."""
    if text.isprintable() and len(text) <= TEXT_MAX:  # the most common case, a million times
        return text
    shown = "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text[:TEXT_MAX]
    )
    return shown if len(text) <= TEXT_MAX else f"{shown}..."


def _named(path: str) -> str:
    return f"{safe_text(path)[:100].rstrip('.')}: " if path else ""


def _kind(value: object) -> str:
    match value:
        case Mapping():
            return f"an object of {len(value)}"
        case list():
            return f"a list of {len(value)}"
        case str():
            return quoted(value)
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case _:
            return quoted(value)
