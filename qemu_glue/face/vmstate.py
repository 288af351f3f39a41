"""What a device saves of itself, as a description; and by it the bytes that QEMU's migration streams have of it.

The fields of a description come in their order, numbers big-endian; then, each under its own name, those subsections
that are needed.  A stream of an older version lacks the fields that came later, and one of an even older version than
the minimum is refused (vmstate_load.py).  Source: QEMU's migration/vmstate.c, docs/devel/migration.rst.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from pvclock import StateFileError

__all__ = [
    "BOOL",
    "BYTES",
    "INT32",
    "INT64",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "Field",
    "FieldKind",
    "VmState",
    "described",
    "named",
    "save",
    "save_section",
    "section_bytes_max",
    "section_name",
    "section_pattern",
    "subsection_name",
]

SECTION_FULL, SUBSECTION, SECTION_FOOTER = 0x04, 0x05, 0x7E
HEADER: Final = struct.Struct(">BI")
"""A section's kind, and its number in the stream."""
WORD: Final = struct.Struct(">I")


class FieldKind(NamedTuple):
    """A kind of fields.

    name: QEMU's.  form: of one element.  pattern: what its bytes can be, as a regular expression.
    """

    name: str
    form: struct.Struct
    pattern: bytes


def _number(name: str, form: str) -> FieldKind:
    made = struct.Struct(form)
    return FieldKind(name, made, b".{%d}" % made.size)


UINT8, UINT16 = _number("uint8", ">B"), _number("uint16", ">H")
UINT32, UINT64 = _number("uint32", ">I"), _number("uint64", ">Q")
INT32, INT64 = _number("int32", ">i"), _number("int64", ">q")
BOOL: Final = FieldKind("bool", struct.Struct(">B"), rb"[\0\x01]")
BYTES: Final = FieldKind("buffer", struct.Struct(">c"), b".")
"""A bytes object; its field says how long it is."""


class Field(NamedTuple):
    """One value of a device's model, in its attribute `name`.

    elements: of an array, their number, or the name of the field before it that says it.  since: the version of the
    description in which it came.
    """

    name: str
    kind: FieldKind
    elements: int | str | None = None
    since: int = 0


class VmState(NamedTuple):
    """A description.  name: of a device's section, or of a subsection, "device/subsection".

    version: what is written.  minimum_version: the oldest that is read.
    needed: of a subsection, is it written?  Always, if None.
    pre_save, post_load: called with the model before it is written, and once all of it has been read.
    """

    name: str
    version: int
    minimum_version: int
    fields: tuple[Field, ...]
    subsections: tuple[VmState, ...] = ()
    needed: Callable[[Any], bool] | None = None
    pre_save: Callable[[Any], object] | None = None
    post_load: Callable[[Any], object] | None = None


# Writing


def save(state: VmState, model: object) -> bytes:
    """What a stream has of `model`; StateFileError for a value that its field cannot hold."""
    if state.pre_save is not None:
        state.pre_save(model)
    written = [_written(field, f"{state.name}.{field.name}", model) for field in state.fields]
    for each in state.subsections:
        if each.needed is None or each.needed(model):
            written += [subsection_name(each), save(each, model)]
    return b"".join(written)


def save_section(state: VmState, model: object, section_id: int, instance: int = 0) -> bytes:
    """save(), as a section of a stream.  section_id: its number there.  instance: of several devices of that name."""
    head = HEADER.pack(SECTION_FULL, section_id) + section_name(state, instance)
    return head + save(state, model) + HEADER.pack(SECTION_FOOTER, section_id)


def described(state: VmState, model: object) -> dict[str, object]:
    """The fields as the JSON description at a stream's end has them."""
    found: dict[str, object] = {"version": state.version}
    found["fields"] = [_described(field, model) for field in state.fields]
    needed = [each for each in state.subsections if each.needed is None or each.needed(model)]
    if needed:
        found["subsections"] = [{"vmsd_name": each.name, **described(each, model)} for each in needed]
    return found


def _described(field: Field, model: object) -> dict[str, object]:
    size = field.kind.form.size
    if field.elements is None:
        return {"name": field.name, "type": field.kind.name, "size": size}
    count = len(getattr(model, field.name))
    if field.kind is BYTES:
        return {"name": field.name, "type": field.kind.name, "size": count}
    return {"name": field.name, "array_len": count, "type": field.kind.name, "size": size}


def _written(field: Field, path: str, model: object) -> bytes:
    value = getattr(model, field.name)
    if field.elements is None:
        return _packed(field.kind, path, value)
    wanted = field.elements if isinstance(field.elements, int) else getattr(model, field.elements)
    if len(value) != wanted:
        raise StateFileError(path, f"{len(value)} elements", f"{wanted}")
    return bytes(value) if field.kind is BYTES else b"".join(_packed(field.kind, path, each) for each in value)


def _packed(kind: FieldKind, path: str, value: object) -> bytes:
    try:
        return kind.form.pack(value)
    except struct.error:
        raise StateFileError(path, f"{value!r}", f"a {kind.name}") from None


def subsection_name(state: VmState) -> bytes:
    """What a subsection begins with."""
    return bytes((SUBSECTION,)) + named(state.name) + WORD.pack(state.version)


def named(name: str) -> bytes:
    """A name as it stands in a stream, behind its length."""
    return bytes((len(name),)) + name.encode("ascii")


# Looking for one


def section_pattern(state: VmState, instance: int = 0) -> bytes:
    """What a section looks like up to its footer, as a regular expression (DOTALL); for descriptions without arrays.

    Groups: "id", the section's number, and each field's name.
    """
    head = b"\\x04(?P<id>.{4})" + re.escape(section_name(state, instance))
    return head + _pattern(state)


def section_bytes_max(state: VmState) -> int:
    """How long a section can be; for descriptions without arrays."""
    return 2 * HEADER.size + len(section_name(state)) + _bytes_max(state)


def _bytes_max(state: VmState) -> int:
    own = sum(field.kind.form.size for field in state.fields)
    return own + sum(len(subsection_name(each)) + _bytes_max(each) for each in state.subsections)


def section_name(state: VmState, instance: int = 0) -> bytes:
    """The bytes of a section's header behind its number."""
    return named(state.name) + WORD.pack(instance) + WORD.pack(state.version)


def _pattern(state: VmState) -> bytes:
    fields = b"".join(b"(?P<%s>%s)" % (field.name.encode(), field.kind.pattern) for field in state.fields)
    return fields + b"".join(
        b"(?:%s%s)?" % (re.escape(subsection_name(each)), _pattern(each)) for each in state.subsections
    )
