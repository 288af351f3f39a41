"""What a command has found, and the one JSON shape in which every command says it: docs/commands.md."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Final, NamedTuple

from pvclock import __version__
from pvclock.state.json_schema import plain

__all__ = ["Report", "error_json", "report_json"]

SHAPE: Final = 1
"""The number in `schema`: it changes when a key changes its sense or goes; keys may come without that."""

LONG_WORD: Final = re.compile(r"(\S{60})\S{200,}")
"""Longer than most paths: a value that somebody gave, and whose beginning tells which."""


class Report(NamedTuple):
    """What a command has found.

    ok: nothing is wrong.  result: all of it, for JSON: numbers are numbers, and a key says their unit.  status: the
    exit status, where it is not 0 for ok and 1 for a finding.
    """

    ok: bool
    result: Mapping[str, object]
    status: int | None = None

    @property
    def exit_status(self) -> int:
        """What the process ends with."""
        return int(not self.ok) if self.status is None else self.status


def report_json(command: str, report: Report) -> str:
    """A command's report as its JSON document."""
    return _document(command, report.ok, result=plain(report.result))


def error_json(command: str, error: Exception) -> str:
    """The JSON document of a command that could not do its work: the error's kind, its message and its numbers."""
    told = {name: _telling(value) for name, value in vars(error).items() if not name.startswith("_")}
    if isinstance(error, OSError):
        told = {"errno": error.errno, "path": _telling(error.filename), **told}
    return _document(command, ok=False, error={"kind": type(error).__name__, "message": message_of(error), **told})


def message_of(error: Exception) -> str:
    """What an error says to people, long values cut; an OSError without the number that Python puts before it."""
    said = str(error)
    if type(error).__module__ == "builtins" and isinstance(error, OSError) and error.strerror:
        said = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return LONG_WORD.sub(r"\1...", said)


def _document(command: str, ok: bool, **content: object) -> str:
    document = {"schema": f"pvclock.{command}/{SHAPE}", "version": __version__, "ok": ok, **content}
    return json.dumps(document, indent=2, allow_nan=False)


def _telling(value: object) -> object:
    """An error's attribute as JSON has it; what JSON has no form for as its text."""
    return plain(value) if isinstance(value, int | float | str | list | tuple | dict | None) else str(value)
