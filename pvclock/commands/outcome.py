"""A command's result, and the one JSON shape that all commands print: docs/commands.md."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Final, NamedTuple

from pvclock import __version__
from pvclock.state.json_schema import plain

__all__ = ["Outcome", "error_json", "line_json", "outcome_json"]

SHAPE: Final = 1
"""The number in `schema`: changes when a key goes or changes its meaning, not when one is added."""

LONG_WORD: Final = re.compile(r"(\S{60})\S{200,}")
"""A value from the user longer than most paths: its beginning is enough to recognise it."""


class Outcome(NamedTuple):
    """A command's result.

    ok: nothing is wrong.  result: all that was found, for JSON: numbers are numbers, and a key names their unit.
    status: the exit status, where it is not 0 for ok and 1 for a finding.
    """

    ok: bool
    result: Mapping[str, object]
    status: int | None = None

    @property
    def exit_status(self) -> int:
        """The process's exit status."""
        return int(not self.ok) if self.status is None else self.status


def outcome_json(command: str, outcome: Outcome, *, on_one_line: bool = False) -> str:
    """A command's outcome as its JSON document."""
    return _document(command, outcome.ok, on_one_line, result=plain(outcome.result))


def error_json(command: str, error: Exception, *, on_one_line: bool = False) -> str:
    """The JSON document of a command that failed: the error's kind, its message and its numbers."""
    told = {name: _telling(value) for name, value in vars(error).items() if not name.startswith("_")}
    if isinstance(error, OSError):
        told = {"errno": error.errno, "path": _telling(error.filename), **told}
    said = {"kind": type(error).__name__, "message": message_of(error), **told}
    return _document(command, False, on_one_line, error=said)


def message_of(error: Exception) -> str:
    """An error's message for people, with long values cut; an OSError's without the errno that Python puts in front."""
    said = str(error)
    if type(error).__module__ == "builtins" and isinstance(error, OSError) and error.strerror:
        said = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return LONG_WORD.sub(r"\1...", said)


def line_json(command: str, content: Mapping[str, object]) -> str:
    """One of the lines that a command with JSON_LINES writes while it works, without its end."""
    return json.dumps(plain({"schema": _schema(command), **content}), allow_nan=False)


def _document(command: str, ok: bool, on_one_line: bool, **content: object) -> str:
    document = {"schema": _schema(command), "version": __version__, "ok": ok, **content}
    return json.dumps(document, indent=None if on_one_line else 2, allow_nan=False)


def _schema(command: str) -> str:
    return f"pvclock.{command}/{SHAPE}"


def _telling(value: object) -> object:
    """An error's attribute for JSON: as it is if JSON can say it, else as text."""
    return plain(value) if isinstance(value, int | float | str | list | tuple | dict | None) else str(value)
