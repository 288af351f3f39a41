"""Arguments of a QMP command as they are typed: key=value, as qmp-shell has them, and key:=JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Final

from pvclock import ConfigError

__all__ = ["arguments_of"]

INTEGER: Final = re.compile(r"[-+]?[0-9]{1,20}|0x[0-9a-f]{1,16}", re.ASCII | re.IGNORECASE)
"""QEMU's have 64 bits.  Addresses are typed as hexadecimal numbers."""
BOOLEANS: Final = {"true": True, "false": False}


def arguments_of(words: Sequence[str]) -> dict[str, object]:
    """The arguments that `words` are; ConfigError says what is wrong with one."""
    arguments: dict[str, object] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not all(key.removesuffix(":").split(".")):
            raise ConfigError(f"{word!r} is no argument; write key=value, or key:=JSON")
        value = _json(text, word) if key.endswith(":") else _value(text, word)
        _set(arguments, key.removesuffix(":").split("."), value)
    return arguments


# Inside


def _value(text: str, word: str) -> object:
    """As qmp-shell types it; a hexadecimal number, too."""
    if INTEGER.fullmatch(text):
        return int(text, 16 if text[:2].lower() == "0x" else 10)
    if text.lower() in BOOLEANS:
        return BOOLEANS[text.lower()]
    return _json(text, word) if text[:1] in ("{", "[") else text


def _json(text: str, word: str) -> object:
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        why = f"{word!r}: {text!r} is no JSON ({error}); a string goes in quotes there, as in key:='\"text\"'"
        raise ConfigError(why) from None


def _refuse(constant: str) -> object:
    raise ValueError(f"{constant} is no JSON")  # _json() takes it


def _set(arguments: dict[str, object], path: list[str], value: object) -> None:
    """Give the member at `path` its value; the objects on the way are made."""
    place: object = arguments
    for depth, key in enumerate(path[:-1], 1):
        place = place.setdefault(key, {}) if isinstance(place, dict) else place
        if not isinstance(place, dict):
            raise ConfigError(f"{'.'.join(path[:depth])} has a value already, so {'.'.join(path)} cannot be its member")
    if not isinstance(place, dict) or path[-1] in place:
        raise ConfigError(f"{'.'.join(path)} has a value already; give each key once")
    place[path[-1]] = value
