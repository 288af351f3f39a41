"""A file of JSON lines, read as a stream: bounded, and up to the half line of a writer that was killed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Final, NoReturn

from pvclock.meter.report.fields import Place

__all__ = ["LINE_BYTES_MAX", "JsonLines", "parse_object"]

LINE_BYTES_MAX: Final = 4 << 20
"""A watch of hundreds of vCPUs, or a probe's record of 64 CPUs, has less than 2 MiB in a line."""


class JsonLines:
    """The objects of a file, one a line; iterate once.  Empty lines do not count.

    chunks: the file's bytes.  ends_within_a_line: the last line has no end and is no JSON: its writer was killed, or
    is at work still; known once all lines are read.
    """

    def __init__(self, path: str, chunks: Iterable[bytes]) -> None:
        self.path = path
        self.ends_within_a_line = False
        self._chunks = chunks

    def __iter__(self) -> Iterator[tuple[int, dict[str, object]]]:
        """(number of the line, its object); ReportSourceError for a line that is none."""
        number, rest = 0, b""
        for chunk in self._chunks:
            *lines, rest = (rest + chunk).split(b"\n") if rest else chunk.split(b"\n")
            for number, line in enumerate(lines, number + 1):  # noqa: B020  # goes on from chunk to chunk
                if line and not line.isspace():
                    yield number, parse_object(line, Place(self.path, number))
            if len(rest) > LINE_BYTES_MAX:
                _refuse_length(Place(self.path, number + 1))
        yield from self._last(number + 1, rest)

    def _last(self, number: int, rest: bytes) -> Iterator[tuple[int, dict[str, object]]]:
        """What stands after the last line's end: a whole object, or a part of one."""
        if not rest.strip():
            return
        try:
            json.loads(rest)
        except (ValueError, RecursionError):
            self.ends_within_a_line = True
        else:
            yield number, parse_object(rest, Place(self.path, number))


def parse_object(line: bytes, place: Place) -> dict[str, object]:
    """The object in a line; ReportSourceError if it is anything else."""
    if len(line) > LINE_BYTES_MAX:
        _refuse_length(place)
    try:
        value = DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise place.error("bytes that are no UTF-8", "a JSON object in one line") from None
    except RecursionError:
        raise place.error("lists or objects nested too deeply", "a JSON object in one line") from None
    except ValueError as error:
        raise place.error(f"no JSON ({_message(error)})", "a JSON object in one line") from None
    if not isinstance(value, dict):
        raise place.error(f"a JSON {type(value).__name__}", "a JSON object in one line")
    return value


def _message(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"
    return "a number of too many digits" if "digits" in str(error) else str(error)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


DECODER: Final = json.JSONDecoder(parse_constant=_refuse_constant)
"""One for all lines: json.loads() would make one for each."""


def _refuse_length(place: Place) -> NoReturn:
    raise place.error(f"more than {LINE_BYTES_MAX >> 20} MiB", "a line of less")
