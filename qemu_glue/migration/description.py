"""The JSON description at a stream's end: which devices it holds, in order, and how long each one's fields are.

Sections do not say how long they are; the description does, so that each can be found from the end without a search.
It stands in precopy streams of machine types from 2.3 on, behind QEMU_VM_VMDESCRIPTION and its length.
Source: QEMU migration/savevm.c (qemu_savevm_state_complete_precopy), migration/vmstate.c (vmsd_desc_field_start).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from pvclock import StateFileError
from pvclock.state.json_schema import BYTES_MAX, parse
from qemu_glue.migration.stream_file import StreamFile

__all__ = ["Description", "Layout", "Place", "Subsection", "read_description"]

VMDESCRIPTION: Final = 0x06
HEADER: Final = struct.Struct(">BI")
"""QEMU_VM_VMDESCRIPTION, and the length in bytes of what follows."""

SECTION_HEADER_BYTES: Final = 1 + 4 + 1 + 4 + 4
"""Type, id, length of the name, instance, version; without the name."""
SUBSECTION_HEADER_BYTES: Final = 1 + 1 + 4

NAME_BYTES_MAX: Final = 255
DEPTH_MAX: Final = 16
"""Of subsections within each other; QEMU 10 has 4."""
U32_MAX: Final = 2**32 - 1
LENGTH_MAX: Final = 2**62


class Place(NamedTuple):
    """Where a field's first element is, from its section's first byte; elements of it."""

    offset: int
    size: int
    elements: int


class Subsection(NamedTuple):
    """Where a subsection's header is, from its section's first byte."""

    offset: int
    name: str
    version: int


class Layout(NamedTuple):
    """What one section holds.  version: None where the description has none.  length: without a footer.

    places: by the field's name; in a subsection "subsection:field".
    """

    name: str
    instance: int
    version: int | None
    places: Mapping[str, Place]
    subsections: tuple[Subsection, ...]
    length: int


class Description(NamedTuple):
    """A description.  begin: of its header in the file, which the end mark of the sections precedes."""

    begin: int
    layouts: tuple[Layout, ...]


def read_description(stream: StreamFile) -> Description | None:
    """The description at the stream's end; None if there is none, StateFileError if it is not QEMU's JSON."""
    begin = _begin(stream)
    if begin is None:
        return None
    document = stream.read(begin + HEADER.size, stream.end - begin - HEADER.size, "description")
    try:
        content = parse(document)
    except StateFileError as error:
        raise StateFileError("description", error.found, error.supported) from None
    devices = _members(_mapping(content, "description"), "devices", "description")
    return Description(begin, tuple(_layout(device, f"devices[{place}]") for place, device in enumerate(devices)))


def _begin(stream: StreamFile) -> int | None:
    """Where the description's header is: its length is that of the rest of the file.

    JSON holds no NUL, and the length's first byte is one: so the header is close to the file's last NUL.
    """
    tail_bytes = min(BYTES_MAX + HEADER.size, stream.end - stream.begin)
    tail = stream.read(stream.end - tail_bytes, tail_bytes, "description")
    last_nul = tail.rfind(b"\0")
    for at in range(max(0, last_nul - HEADER.size + 1), last_nul):
        if at + HEADER.size < len(tail):
            kind, length = HEADER.unpack_from(tail, at)
            if kind == VMDESCRIPTION and length == len(tail) - at - HEADER.size:
                return stream.end - tail_bytes + at
    return None


def _layout(device: object, path: str) -> Layout:
    described = _mapping(device, path)
    name, version = _name(described, "name", path), _whole(described, "version", path, U32_MAX, default=-1)
    found = _Found({}, [])
    length = _add(found, described, path, "", SECTION_HEADER_BYTES + len(name))
    instance = _whole(described, "instance_id", path, U32_MAX)
    return Layout(name, instance, None if version < 0 else version, found.places, tuple(found.subsections), length)


class _Found(NamedTuple):
    """What a section's description has told so far."""

    places: dict[str, Place]
    subsections: list[Subsection]


def _add(found: _Found, described: Mapping[str, Any], path: str, prefix: str, at: int, depth: int = 0) -> int:
    """Add the fields that begin at offset `at`, and the subsections behind them; where those end."""
    if depth > DEPTH_MAX:
        raise StateFileError(f"{path[:100]}...", "subsections within each other", f"up to {DEPTH_MAX} of them")
    for number, member in enumerate(_members(described, "fields", path)):
        where = f"{path}.fields[{number}]"
        field = _mapping(member, where)
        place = Place(at, _whole(field, "size", where, LENGTH_MAX), _whole(field, "array_len", where, LENGTH_MAX, 1))
        found.places.setdefault(f"{prefix}{_name(field, 'name', where)}", place)
        at += place.size * place.elements
    for number, member in enumerate(_members(described, "subsections", path, default=[])):
        where = f"{path}.subsections[{number}]"
        each = _mapping(member, where)
        subsection = Subsection(at, _name(each, "vmsd_name", where), _whole(each, "version", where, U32_MAX))
        found.subsections.append(subsection)
        data_at = at + SUBSECTION_HEADER_BYTES + len(subsection.name)
        at = _add(found, each, where, f"{subsection.name}:", data_at, depth + 1)
    return at


# Members of JSON's objects


def _mapping(value: object, path: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise StateFileError(path, f"a {type(value).__name__}", "an object")
    return value


def _members(mapping: Mapping[str, Any], name: str, path: str, default: list[object] | None = None) -> list[object]:
    value = mapping.get(name, default)
    if not isinstance(value, list):
        raise StateFileError(f"{path}.{name}", "nothing" if value is None else f"a {type(value).__name__}", "a list")
    return value


def _name(mapping: Mapping[str, Any], name: str, path: str) -> str:
    value = mapping.get(name)
    if not isinstance(value, str) or not value.isascii() or not 1 <= len(value) <= NAME_BYTES_MAX:
        raise StateFileError(f"{path}.{name}", "no such text", f"1 to {NAME_BYTES_MAX} ASCII characters")
    return value


def _whole(mapping: Mapping[str, Any], name: str, path: str, most: int, default: int | None = None) -> int:
    if name not in mapping and default is not None:
        return default
    value = mapping.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise StateFileError(f"{path}.{name}", "no such number", f"a whole number from 0 to {most}")
    return value
