"""A device's state read from the bytes of a migration stream, by its description: all of it or nothing.

Source: QEMU's migration/vmstate.c (vmstate_load_state, vmstate_subsection_load).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from pvclock import StateFileError
from qemu_glue.face.vmstate import (
    BOOL,
    BYTES,
    HEADER,
    SECTION_FOOTER,
    SECTION_FULL,
    SUBSECTION,
    WORD,
    Field,
    FieldKind,
    VmState,
    named,
)

__all__ = ["load", "load_section"]


class Loaded(NamedTuple):
    """What was read by a description, and by those of its subsections that were there."""

    state: VmState
    values: dict[str, object]
    subsections: list[Loaded]


def load(state: VmState, model: object, data: bytes, version: int) -> None:
    """Set `model` to what a stream has of one, at that version of its description.

    StateFileError, with nothing changed, for what it cannot have.
    """
    reader = _Reader(data)
    loaded = _load(state, reader, version)
    reader.expect(b"", state.name)
    _set(model, loaded)


def load_section(state: VmState, model: object, data: bytes) -> None:
    """load() of a whole section, as save_section() gives it."""
    reader = _Reader(data)
    kind, section_id = HEADER.unpack(reader.take(HEADER.size, state.name))
    if kind != SECTION_FULL:
        raise StateFileError(state.name, f"a section of kind {kind:#x}", f"{SECTION_FULL:#x}, a device's")
    reader.expect(named(state.name), state.name)
    reader.word(f"{state.name}.instance")
    loaded = _load(state, reader, reader.word(f"{state.name}.version"))
    reader.expect(HEADER.pack(SECTION_FOOTER, section_id), f"{state.name}.footer")
    reader.expect(b"", state.name)
    _set(model, loaded)


class _Reader:
    """Takes bytes from the front of `data`."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, length: int, path: str) -> bytes:
        """The next ones."""
        self.check(length, path)
        self._at += length
        return self._data[self._at - length : self._at]

    def check(self, length: int, path: str) -> None:
        """Are there so many?  Before as many things are made of them."""
        if len(self._data) - self._at < length:
            raise StateFileError(path, f"the end after {len(self._data)} bytes", f"{length} bytes from {self._at}")

    def following(self, length: int) -> bytes:
        """The next ones, as far as they are there, which stay."""
        return self._data[self._at : self._at + length]

    def word(self, path: str) -> int:
        """A number of 32 bits."""
        return int(WORD.unpack(self.take(WORD.size, path))[0])

    def expect(self, expected: bytes, path: str) -> None:
        """Take these; b"" for the end."""
        found = self.take(len(expected), path) if expected else self.following(1)
        if found != expected:
            raise StateFileError(path, f"{found!r}", f"{expected!r}" if expected else "the end")


def _load(state: VmState, reader: _Reader, version: int, outer: Mapping[str, object] = MappingProxyType({})) -> Loaded:
    """outer: what was read of the description that this one is a subsection of."""
    if not state.minimum_version <= version <= state.version:
        supported = f"{state.minimum_version} to {state.version}"
        raise StateFileError(f"{state.name}.version", f"{version}", supported)
    values: dict[str, object] = {}
    for field in state.fields:
        if field.since <= version:
            values[field.name] = _value(field, f"{state.name}.{field.name}", reader, {**outer, **values})
    return Loaded(state, values, _subsections(state, reader, {**outer, **values}))


def _subsections(state: VmState, reader: _Reader, outer: Mapping[str, object]) -> list[Loaded]:
    """Those that are there, in whatever order; what is behind them begins otherwise."""
    known = {each.name: each for each in state.subsections}
    found = []
    while (name := _subsection_name(reader, state.name)) is not None:
        if name not in known:
            raise StateFileError(name, "a subsection", f"of {state.name} one of: {', '.join(known) or 'none'}")
        each = known.pop(name)
        reader.take(1 + len(named(name)), name)
        found.append(_load(each, reader, reader.word(f"{name}.version"), outer))
    return found


def _subsection_name(reader: _Reader, device: str) -> str | None:
    """The name of the subsection that comes next; None if there is none of `device`."""
    head = reader.following(2)
    if len(head) < 2 or head[0] != SUBSECTION:
        return None
    name = reader.following(2 + head[1])[2:]
    return name.decode("latin-1") if name.startswith(device.encode()) else None


def _value(field: Field, path: str, reader: _Reader, before: Mapping[str, object]) -> object:
    if field.elements is None:
        return _unpacked(field.kind, path, reader)
    count = before[field.elements] if isinstance(field.elements, str) else field.elements
    assert isinstance(count, int)  # noqa: S101  # a number's field
    if count < 0:
        raise StateFileError(path, f"{count} elements", "none or more")
    if field.kind is BYTES:
        return reader.take(count, path)
    reader.check(count * field.kind.form.size, path)
    return [_unpacked(field.kind, path, reader) for _ in range(count)]


def _unpacked(kind: FieldKind, path: str, reader: _Reader) -> object:
    value = kind.form.unpack(reader.take(kind.form.size, path))[0]
    if kind is not BOOL:
        return value
    if value > 1:
        raise StateFileError(path, f"{value:#x}", "0 or 1")
    return bool(value)


def _set(model: object, loaded: Loaded) -> None:
    for name, value in loaded.values.items():
        setattr(model, name, value)
    for each in loaded.subsections:
        _set(model, each)
    if loaded.state.post_load is not None:
        loaded.state.post_load(model)
