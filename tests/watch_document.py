"""What docs/watch.md says of the JSON lines, for tests that hold them against it."""

from __future__ import annotations

import re
from typing import Final

from tests.command_line import ROOT

__all__ = ["documented_keys", "keys_of"]

ROW: Final = re.compile(r"^\| `(\w+)`[^|]*\| (.*) \|$", re.MULTILINE)


def documented_keys() -> dict[str, set[str]]:
    """Each row of the tables of docs/watch.md that begins with a word of code, and the words of code after it."""
    text = (ROOT / "docs" / "watch.md").read_text(encoding="utf-8").partition("## JSON")[2]
    return {match[1]: set(re.findall(r"`(\w+)`", match[2])) for match in ROW.finditer(text)}


def keys_of(value: object) -> list[str]:
    """All keys in a JSON value."""
    if isinstance(value, dict):
        return [*value, *(key for each in value.values() for key in keys_of(each))]
    return [key for each in value for key in keys_of(each)] if isinstance(value, list) else []
