"""A probe's line, found in whatever its console printed.

A console adds firmware's escape sequences, carriage returns and other lines, may cut a line, and may hold the records
of several boots; what a guest prints there is not trusted.
"""

from __future__ import annotations

import json
import re
from typing import Final, NamedTuple

from pvclock.errors import ProbeFailed, ProbeRecordError, StateFileError
from pvclock.meter.inside.record import SCHEMA, ProbeRecord
from pvclock.meter.inside.schema import RECORD, printable
from pvclock.state.json_schema import parse

__all__ = ["begins_a_record", "parse_record"]

OUTPUT_MAX: Final = 64 << 20
LINE_MAX: Final = 4 << 20
"""64 CPUs, six clocks and all their warps make less than 2 MiB."""
TRIED_MAX: Final = 32
"""Beginnings of an error that are tried, from the last: a hostile output has thousands."""

# CSI, OSC and two-character sequences, and what serial lines and terminals add.
CONTROL: Final = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]{0,256}(?:\x07|\x1b\\)|[@-Z\\-_])|[\x00\r\x7f]")
RECORD_BEGINS: Final = re.compile(r'\{\s{0,8}"schema"\s{0,8}:\s{0,8}"pvclock\.probe-record/')
ERROR_BEGINS: Final = re.compile(r'\{\s{0,8}"error"\s{0,8}:')
DECODER: Final = json.JSONDecoder(parse_int=len)
"""Finds where an object ends; numbers of any length are left to parse()."""


def parse_record(text: str | bytes) -> ProbeRecord:
    """The last record in a console's output, amid other lines, escape sequences and carriage returns.

    If that one is damaged or cut, an older one does not stand in for it: that would tell of another boot.
    ProbeRecordError says what is wrong with a damaged one and where; ProbeFailed tells what a probe reported instead.
    """
    if len(text) > OUTPUT_MAX:
        raise ProbeRecordError("file", f"{len(text)} bytes or more", f"up to {OUTPUT_MAX} bytes of a console's output")
    output = _plain_text(text)
    begun = [match.start() for match in RECORD_BEGINS.finditer(output)]
    if begun and (whole := _whole(output, begun[-1])) is not None:
        return _record(whole.line)
    _tell_of_an_error(output)
    if begun:
        raise _damaged(output, begun[-1])
    raise ProbeRecordError("file", _without_record(output), f'a line that begins with {{"schema":"{SCHEMA}"')


def begins_a_record(text: str | bytes) -> bool:
    """Does any record begin in it, whole or not?"""
    return RECORD_BEGINS.search(_plain_text(text)) is not None


# Inside


def _plain_text(text: str | bytes) -> str:
    return CONTROL.sub("", text if isinstance(text, str) else text.decode("utf-8", "replace"))


class _Whole(NamedTuple):
    line: str
    document: object


def _whole(output: str, start: int) -> _Whole | None:
    """The object that begins there, also if a terminal broke its line; None if it has no end."""
    piece = output[start : start + LINE_MAX]
    for line in (piece, piece.replace("\n", "")):
        try:
            document, end = DECODER.raw_decode(line)
        except (json.JSONDecodeError, RecursionError):
            continue
        return _Whole(line[:end], document)
    return None


def _record(line: str) -> ProbeRecord:
    try:
        document = parse(line)
        if isinstance(document, dict) and isinstance(document.get("error"), str):
            raise ProbeFailed(printable(document["error"]))
        record: ProbeRecord = RECORD.read(document, "")
    except StateFileError as error:
        raise ProbeRecordError(error.field, error.found, error.supported) from None
    return record


def _tell_of_an_error(output: str) -> None:
    """Raise what the probe printed instead of a record, if it did."""
    begun = [match.start() for match in ERROR_BEGINS.finditer(output)]
    for start in reversed(begun[-TRIED_MAX:]):
        whole = _whole(output, start)
        document = whole.document if whole is not None else None
        if isinstance(document, dict) and isinstance(document.get("error"), str):
            raise ProbeFailed(printable(document["error"]))


def _damaged(output: str, start: int) -> ProbeRecordError:
    """What is wrong with the last record, and where in the output."""
    place = f"in the record that begins at line {output.count(chr(10), 0, start) + 1} of the output"
    supported = "a whole record on one line"
    try:
        DECODER.raw_decode(output[start : start + LINE_MAX])
    except json.JSONDecodeError as error:
        rest = len(output) - start
        if error.pos >= min(rest, LINE_MAX) or error.msg.startswith("Unterminated"):
            return ProbeRecordError(
                "file", f"the output's end {place}, after {min(rest, LINE_MAX)} characters", supported
            )
        near = printable(output[start + error.pos : start + error.pos + 20])
        return ProbeRecordError("file", f'{error.msg} {place}, {error.pos} characters on, at "{near}"', supported)
    except RecursionError:
        return ProbeRecordError("file", f"lists or objects nested too deeply {place}", supported)
    return ProbeRecordError("file", f"no end {place}", supported)


def _without_record(output: str) -> str:
    if not output.strip():
        return "no output"
    lines = output.count("\n") + 1
    last = printable(next(line for line in reversed(output.splitlines()) if line.strip())[-60:])
    return f'{lines:,} line{"s" * (lines != 1)} without one, the last: "{last}"'
