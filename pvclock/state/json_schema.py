"""Schemas for untrusted JSON documents.

A `Kind` reads a value or raises StateFileError with the value's dotted path, what was found and what is supported.
Kinds compose.  No document can make reading slow, recurse deeply or stop half done.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, Final, NamedTuple

from pvclock.errors import StateFileError
from pvclock.quantities import shown

__all__ = [
    "BOOLEAN",
    "BYTES_MAX",
    "TERM_BITS_MAX",
    "TEXT",
    "Kind",
    "fraction",
    "list_of",
    "one_of",
    "optional",
    "parse",
    "plain",
    "record",
    "render",
    "table",
    "whole",
]

BYTES_MAX: Final = 16 << 20

TEXT_MAX: Final = 256
TERM_BITS_MAX: Final = 2048
DIGITS_MAX: Final = 640
"""2048 bits are 617 digits; 640 is the lowest limit that sys.set_int_max_str_digits() accepts."""

NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
SHOWN_MAX: Final = 60


class Kind(NamedTuple):
    """A description of the values allowed, and read(value, path), which converts one or raises StateFileError."""

    supported: str
    read: Callable[[object, str], Any]


def whole(least: int, most: int, supported: str) -> Kind:
    """Whole numbers from `least` to `most`, but not bools."""

    def read(value: object, path: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise StateFileError(path, _shown(value), supported)
        return int(value)

    return Kind(supported, read)


def fraction(accepts: Callable[[Fraction], bool], supported: str) -> Kind:
    """Fractions as [numerator, denominator] for which `accepts` is true."""
    term = whole(1 - 2**TERM_BITS_MAX, 2**TERM_BITS_MAX - 1, f"whole numbers of up to {TERM_BITS_MAX} bits")
    words = f"[numerator, denominator], {term.supported}, {supported}"

    def read(value: object, path: str) -> Fraction:
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise StateFileError(path, _shown(value), words)
        numerator, denominator = (term.read(each, path) for each in value)
        if denominator < 1 or not accepts(Fraction(numerator, denominator)):
            raise StateFileError(path, f"[{_shown(numerator)}, {_shown(denominator)}]", words)
        return Fraction(numerator, denominator)

    return Kind(words, read)


def _read_boolean(value: object, path: str) -> bool:
    if not isinstance(value, bool):
        raise StateFileError(path, _shown(value), BOOLEAN.supported)
    return value


def _read_text(value: object, path: str) -> str:
    # ASCII only: what else is printable depends on the version of Unicode.
    if not isinstance(value, str) or not 1 <= len(value) <= TEXT_MAX or not (value.isascii() and value.isprintable()):
        raise StateFileError(path, _shown(value), TEXT.supported)
    return str(value)


BOOLEAN: Final = Kind("true or false", _read_boolean)
TEXT: Final = Kind(f"1 to {TEXT_MAX} printable ASCII characters", _read_text)


def optional(kind: Kind) -> Kind:
    """That kind, or null."""
    supported = f"{kind.supported}, or null"

    def read(value: object, path: str) -> object:
        try:
            return None if value is None else kind.read(value, path)
        except StateFileError as error:
            if error.field == path and error.supported == kind.supported:
                raise StateFileError(path, error.found, supported) from None
            raise

    return Kind(supported, read)


def one_of(supported: str, kinds: dict[type, Kind]) -> Kind:
    """The kind of the first Python type in `kinds` that matches the value, so bool goes before int."""

    def read(value: object, path: str) -> object:
        for python_type, kind in kinds.items():
            if isinstance(value, python_type):
                return kind.read(value, path)
        raise StateFileError(path, _shown(value), supported)

    return Kind(supported, read)


def list_of(kind: Kind, least: int, most: int, supported: str) -> Kind:
    """Lists of `least` to `most` values of a kind, read as tuples."""

    def read(value: object, path: str) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple) or not least <= len(value) <= most:
            raise StateFileError(path, _shown(value), supported)
        return tuple(kind.read(each, f"{path}[{place}]") for place, each in enumerate(value))

    return Kind(supported, read)


def table(kind: Kind) -> Kind:
    """Objects with arbitrary names and values of one kind, read as a dict sorted by name."""
    supported = f"an object; its names have up to 64 letters, digits, _ and -; each value is {kind.supported}"

    def read(value: object, path: str) -> dict[str, Any]:
        members = _members(value, path, supported)
        if wrong := [name for name in members if not NAME.fullmatch(name)]:
            raise StateFileError(_member(path, wrong[0]), "such a name", supported)
        return {name: kind.read(members[name], _member(path, name)) for name in sorted(members)}

    return Kind(supported, read)


def record(make: Callable[..., object], kinds: dict[str, Kind]) -> Kind:
    """Objects with exactly the names in `kinds`, read as make(name=value, ...)."""
    names = ", ".join(kinds)
    supported = f"an object of {names}"

    def read(value: object, path: str) -> object:
        members = _members(value, path, supported)
        if unknown := [name for name in members if name not in kinds]:
            raise StateFileError(_member(path, unknown[0]), "a field of an unknown name", names)
        for name, kind in kinds.items():
            if name not in members:
                raise StateFileError(_member(path, name), "nothing", kind.supported)
        return make(**{name: kind.read(members[name], _member(path, name)) for name, kind in kinds.items()})

    return Kind(supported, read)


# Documents


class _Unread(NamedTuple):
    """Stands for a number in a document that is too long to convert."""

    digits: int


class _Repeated(dict[str, object]):
    """An object in a document in which a name occurs more than once."""

    repeated = ""


def parse(document: str | bytes) -> object:
    """Parse a JSON document for a Kind to read; StateFileError, with field "file", if it is not JSON."""
    if len(document) > BYTES_MAX:
        raise StateFileError("file", f"{len(document)} bytes or more", f"up to {BYTES_MAX} bytes")
    try:
        text = document if isinstance(document, str) else document.decode("utf-8")
        return json.loads(text, parse_int=_whole_number, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise StateFileError("file", f"{error.msg} at line {error.lineno} column {error.colno}", "JSON") from None
    except UnicodeDecodeError as error:
        raise StateFileError("file", f"invalid UTF-8 at byte {error.start}", "JSON in UTF-8") from None
    except RecursionError:
        raise StateFileError("file", "lists or objects nested too deeply", "JSON of moderate depth") from None


def render(value: object, indent: str = "") -> str:
    """Format a value as readable JSON: objects and lists of objects over several lines, all else on one line."""
    within = indent + "  "
    if isinstance(value, dict) and value:
        lines = [f"{within}{json.dumps(name)}: {render(each, within)}" for name, each in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        return "[\n" + ",\n".join(within + render(each, within) for each in value) + f"\n{indent}]"
    return json.dumps(value)


def plain(value: object) -> object:
    """Convert NamedTuples, tuples, mappings and fractions to JSON's objects and lists."""
    if isinstance(value, int | str):  # the most common case first
        return value
    if isinstance(value, Fraction):
        return [value.numerator, value.denominator]
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: plain(each) for name, each in value._asdict().items()}
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value


def _whole_number(text: str) -> int | _Unread:
    return int(text) if len(text) <= DIGITS_MAX else _Unread(len(text))


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) == len(pairs):
        return members
    repeated = _Repeated(members)
    repeated.repeated = Counter(name for name, _ in pairs).most_common(1)[0][0]
    return repeated


def _members(value: object, path: str, supported: str) -> Mapping[str, object]:
    if not isinstance(value, dict | Mapping) or not all(isinstance(name, str) for name in value):
        raise StateFileError(path or "file", _shown(value), supported)
    if isinstance(value, _Repeated):
        raise StateFileError(_member(path, value.repeated), "it more than once", "each name once")
    return value


def _member(path: str, name: str) -> str:
    shown = name if NAME.fullmatch(name) else _shown(name)
    return f"{path}.{shown}" if path else shown


def _shown(value: object) -> str:
    """A value for a message: as JSON, or described if it is long; safe to print."""
    match value:
        case _Unread():
            return f"a number of {value.digits} digits"
        case Mapping():
            return f"an object of {len(value)}"
        case list() | tuple():
            return f"a list of {len(value)}"
        case int() if not isinstance(value, bool):
            return shown(value)
        case None | bool() | float() | str():
            text = json.dumps(value[:SHOWN_MAX] if isinstance(value, str) else value)
            return text if len(text) <= SHOWN_MAX else f"{text[:SHOWN_MAX]}..."
        case _:
            return f"a {type(value).__name__}"
