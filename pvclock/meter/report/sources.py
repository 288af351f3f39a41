"""What files are, by their content, and the report that they make: a section a file, in order."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Final, TypeAlias

from pvclock.errors import ProbeRecordError, ReportSourceError, StateFileError
from pvclock.meter.inside.reading import begins_a_record, parse_record
from pvclock.meter.report.fields import Fields, Place, safe_text
from pvclock.meter.report.from_crosscheck import crosscheck_section
from pvclock.meter.report.from_doctor import guest_section, host_section, record_section
from pvclock.meter.report.from_drift import drift_sections
from pvclock.meter.report.from_events import event_sections, is_event
from pvclock.meter.report.from_watch import watch_sections
from pvclock.meter.report.json_lines import LINE_BYTES_MAX, JsonLines, parse_object
from pvclock.meter.report.model import Report, Section, Standing
from pvclock.state.json_schema import BYTES_MAX, parse

__all__ = ["STDIN", "read"]

STDIN: Final = "-"
CHUNK_BYTES: Final = 1 << 20
EXPECTED: Final = (
    "JSON lines of pvclock watch or drift, the JSON of pvclock crosscheck, doctor or probe --judge, what a probe "
    "printed, or a clock's events"
)
COMPRESSED: Final = {
    b"\x1f\x8b": "gzip",
    b"(\xb5/\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"PK\x03\x04": "zip",
}
SCHEMA: Final = re.compile(r"pvclock\.([a-z][a-z-]{0,30})/(\d{1,9})")
SHAPE: Final = 1
LINES_OF: Final = {"watch": watch_sections, "drift": drift_sections}
"""Commands that print JSON lines, and what tells of them."""

CUT: Final = "The file ends within a line: its writer was ended, or is at work still.  What stands before it is shown."

Progress: TypeAlias = Callable[[int, str], object]
Lines: TypeAlias = Iterable[tuple[int, dict[str, object]]]


def read(files: Sequence[str], progress: Progress) -> Report:
    """What all files tell; "-" is standard input.

    progress: is called as bytes are read, with their number, in all files, and the name of the file.
    ReportSourceError for a file of which no report can be made, OSError for one that cannot be read.
    """
    from pvclock import __version__

    count = _Count(progress)
    sections = tuple(chain.from_iterable(_sections(name, count) for name in files))
    titles = list(dict.fromkeys(section.title for section in sections))
    title = titles[0] if len(titles) == 1 else "Clocks of virtual machines"
    return Report(title, datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), __version__, sections)


# Files


class _Count:
    """Bytes that were read so far."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bytes = 0

    def counted(self, name: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """The chunks, as they are read."""
        for chunk in chunks:
            self._bytes += len(chunk)
            self._progress(self._bytes, name)
            yield chunk


@contextmanager
def _opened(name: str) -> Iterator[Iterator[bytes]]:
    """A file's content, or standard input's, in chunks."""
    if name == STDIN:
        yield iter(partial(sys.stdin.buffer.read, CHUNK_BYTES), b"")
        return
    with Path(name).open("rb", buffering=0) as file:
        yield iter(partial(file.read, CHUNK_BYTES), b"")


def _sections(name: str, count: _Count) -> list[Section]:
    source = "standard input" if name == STDIN else safe_text(name)
    with _opened(name) as chunks:
        counted = count.counted(source, chunks)
        head = _head(counted, source)
        return _told(source, head, chain([head], counted))


def _head(chunks: Iterator[bytes], source: str) -> bytes:
    """The beginning of a file, up to the end of its first line that is not empty, or as long as a line can be."""
    head = b""
    while b"\n" not in head.lstrip() and len(head) <= LINE_BYTES_MAX and (chunk := next(chunks, b"")):
        head += chunk
    place = Place(source)
    for magic, packer in COMPRESSED.items():
        if head.startswith(magic):
            raise place.error(f"data that {packer} compressed", f"{EXPECTED}; unpack it first")
    if not head.strip(b" \t\r\n\0"):
        raise place.error("nothing", EXPECTED)
    return head.removeprefix(b"\xef\xbb\xbf")


# Their content


def _told(source: str, head: bytes, chunks: Iterator[bytes]) -> list[Section]:
    """The sections of a file that begins with `head`."""
    first = head.lstrip().split(b"\n", 1)[0].strip()
    if not first.startswith(b"{"):
        return [_of_console(source, _whole(source, chunks))]
    record = _first_object(first)
    if record is None:
        return [_of_document(source, head, _whole(source, chunks))]
    if is_event(record):
        return _of_lines(source, chunks, event_sections)
    command = _command(record, Place(source, 1))
    if command in LINES_OF:
        return _of_lines(source, chunks, LINES_OF[command])
    content = _whole(source, chunks)
    if command != "probe-record" and b"\n" in content.strip():
        raise Place(source).error("more lines after a whole document", f"one document, or {EXPECTED}")
    return [_of_object(command, Fields(record, Place(source, 1)), content)]


def _of_lines(source: str, chunks: Iterator[bytes], tell: Callable[[str, Lines], list[Section]]) -> list[Section]:
    lines = JsonLines(source, chunks)
    sections = tell(source, lines)
    if lines.ends_within_a_line and sections:
        sections[-1] = sections[-1]._replace(sentences=(*sections[-1].sentences, CUT))
    return sections


def _of_document(source: str, head: bytes, content: bytes) -> Section:
    """The section of a JSON document of several lines."""
    if b"\0" in head:
        raise Place(source).error("binary data", EXPECTED)
    try:
        document = parse(content)
    except StateFileError as error:
        if begins_a_record(content):
            return _of_console(source, content)
        raise Place(source).error(f"no whole JSON document: {error.found}", EXPECTED) from None
    fields = Fields(document, Place(source))
    return _of_object(_command(fields.content, fields.place), fields, content)


def _of_object(command: str, document: Fields, content: bytes) -> Section:
    """The section of a command's one document."""
    source = document.place.path
    if command == "probe-record":
        return _of_console(source, content)
    if "error" in document:
        error = document.fields("error")
        said = f"pvclock {command} could not do its work: {error.text('message')}"
        return Section(f"pvclock {command}", source, said, Standing.OPEN, (), ())
    result = document.fields("result")
    match command:
        case "crosscheck":
            return crosscheck_section(source, result)
        case "doctor" if "works" in result:
            return host_section(source, result)
        case "doctor" | "probe" if "status" in result:
            return guest_section(source, result)
    raise document.place.error(f"the JSON of pvclock {command}, of which there is no report", EXPECTED)


def _of_console(source: str, content: bytes) -> Section:
    """The section of a probe's record, amid whatever else a console printed."""
    if not begins_a_record(content):
        what = "binary data" if b"\0" in content[:CHUNK_BYTES] else "text that is no JSON"
        raise Place(source).error(what, EXPECTED)
    try:
        return record_section(source, parse_record(content))
    except ProbeRecordError as error:
        field = "" if error.field == "file" else f"{error.field}: "
        raise ReportSourceError(source, None, f"{field}{error.found}", error.supported) from None


def _whole(source: str, chunks: Iterator[bytes]) -> bytes:
    """All of a file that is no longer than a document can be."""
    content = bytearray()
    for chunk in chunks:
        content += chunk
        if len(content) > BYTES_MAX:
            raise Place(source).error(f"more than {BYTES_MAX >> 20} MiB that are no JSON lines", EXPECTED)
    return bytes(content)


def _first_object(line: bytes) -> dict[str, object] | None:
    """The object in a file's first line; None if it is only the beginning of one."""
    try:
        return parse_object(line, Place(""))
    except ReportSourceError:
        return None


def _command(record: Mapping[str, object], place: Place) -> str:
    """The command that wrote an object, by its schema; an unknown or a newer one is refused."""
    schema = record.get("schema")
    match = SCHEMA.fullmatch(schema) if isinstance(schema, str) else None
    if match is None:
        found = "an object without a schema of pvclock's" if schema is None else f"schema {safe_text(str(schema)):.60}"
        raise place.error(found, EXPECTED)
    if int(match[2]) != SHAPE:
        newer = f"pvclock.{match[1]}/{SHAPE}: a pvclock that wrote {match[2]} can report it"
        raise place.error(f"schema {schema}", newer)
    return match[1]
