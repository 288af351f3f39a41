"""The formats of saved state that `pvclock state` knows, found by the entry-point group `pvclock.state_formats`.

A format is a module of the shape of `StateFormat`, and the name of its entry point is its word on the command line.
What a file is, its first bytes say; what no other format recognises is taken for a clock's own state.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, Final, NamedTuple, Protocol

from pvclock.errors import StateFileError
from pvclock.state.clock_state import ClockState, Mark

__all__ = [
    "GROUP",
    "OWN",
    "Given",
    "Row",
    "SavedState",
    "StateFormat",
    "as_number",
    "format_names",
    "format_of",
    "named_format",
]

GROUP: Final = "pvclock.state_formats"
OWN: Final = "clock"
"""The format of pvclock's own states."""

HEAD_BYTES: Final = 64

COMPRESSED: Final = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"\x89LZO\0": "lzop",
}
"""How files begin that these write."""


class Row(NamedTuple):
    """A part of a saved state, to be shown.

    field: a dotted path.  value: as JSON.  shown: the value as a text.  in_units: the same for people, or empty.
    """

    field: str
    mark: Mark
    value: object
    shown: str
    in_units: str
    meaning: str


class Given(NamedTuple):
    """What the caller says, for a state whose file does not.

    features: CPUID 0x40000001 EAX.  tsc_hz: the guest's.  guest_tsc: vCPU 0's, when the state was saved.  saved_ns:
    when that was, UTC since 1970.
    """

    features: int | None = None
    tsc_hz: int | None = None
    guest_tsc: int | None = None
    saved_ns: int | None = None


class SavedState(Protocol):
    """What a file holds."""

    @property
    def summary(self) -> str:
        """The state in a few words."""

    @property
    def notes(self) -> Sequence[str]:
        """What is sound, and yet may do something else than one expects."""

    def rows(self) -> Iterator[Row]:
        """Each part, those of a mark behind each other."""

    def as_json(self) -> Mapping[str, Any]:
        """The state for programs."""

    def check(self) -> None:
        """StateFileError if this pvclock reads it, but cannot use it."""

    def clock_state(self, given: Given) -> tuple[ClockState, list[str]]:
        """The same as a clock's state, and in words what was assumed; ConfigError if something must be given."""


class StateFormat(Protocol):
    """A module that reads and writes one format."""

    IS_MADE_ANEW: bool
    """Are its files written whole?  Else the clock is replaced in a copy of one."""

    def recognises(self, head: bytes) -> bool:
        """Does a file of this format begin like that?"""

    def read(self, path: str) -> SavedState:
        """The state in file `path`; StateFileError, with the path, if it is not valid."""

    def write(self, state: ClockState, path: str, into: str | None, /) -> list[str]:
        """Write the state to file `path`; in words, what of it the format cannot hold.

        into: the file in a copy of which the clock is replaced; None if the format's files are made anew.
        ConfigError, StateFileError or OSError if it cannot be written; the old content then stays.
        """


def format_names() -> list[str]:
    """The formats' words on the command line."""
    return sorted(point.name for point in entry_points(group=GROUP))


def named_format(name: str) -> StateFormat:
    """The format of that name, which is one of format_names()."""
    found: StateFormat = next(point.load() for point in entry_points(group=GROUP, name=name))
    return found


def format_of(path: str) -> str:
    """The name of the format that file `path` is in; StateFileError if it cannot be read."""
    from pvclock.state import atomic_file  # each command is loaded by every start of pvclock

    try:
        head = atomic_file.read(path, HEAD_BYTES)
    except (OSError, ValueError) as error:
        found = getattr(error, "strerror", None) or str(error)
        raise StateFileError("file", found, "a regular file that can be read", os.fspath(path)) from None
    for magic, program in COMPRESSED.items():
        if head.startswith(magic):
            wanted = f"a state as it was saved: decompress it first, by {program}"
            raise StateFileError("file", f"what {program} has compressed", wanted, os.fspath(path))
    return next((name for name in format_names() if named_format(name).recognises(head)), OWN)


def as_number(field: str, value: int, meaning: str, in_units: str = "") -> Row:
    """The row of a number that is saved, in decimal and, unless units say more, in hexadecimal."""
    return Row(field, Mark.SAVED, value, str(value), in_units or f"{value:#x}", meaning)
