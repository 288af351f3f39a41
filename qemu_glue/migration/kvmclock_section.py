"""Where the kvmclock section is: that of the description in qemu_glue/face/kvmclock_device.py.

By the description it is where it must be.  A stream without one (machine types up to 2.2, the end of a postcopy) has
to be searched: then every byte of the section that is always the same must be there, and it must be the only one, for
guest RAM may hold anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import StrEnum
from itertools import islice
from typing import Final, NamedTuple

from pvclock import StateFileError
from qemu_glue.face.kvmclock_device import KVMCLOCK_STATE, RELIABLE_STATE
from qemu_glue.face.vmstate import section_bytes_max, section_name, section_pattern
from qemu_glue.migration.description import Description
from qemu_glue.migration.sections import Section, Sections
from qemu_glue.migration.stream_file import StreamFile

__all__ = ["CLOCK", "RELIABLE", "FoundBy", "KvmclockSection", "find_kvmclock"]

NAME: Final = KVMCLOCK_STATE.name
VERSION: Final = KVMCLOCK_STATE.version
CLOCK, RELIABLE = KVMCLOCK_STATE.fields[0], RELIABLE_STATE.fields[0]
RELIABLE_PLACE: Final = f"{RELIABLE_STATE.name}:{RELIABLE.name}"

NEEDLE: Final = section_name(KVMCLOCK_STATE)
WHOLE: Final = re.compile(
    section_pattern(KVMCLOCK_STATE) + rb"(?:\x7e(?P=id))?" + rb"(?:\0|\x04.{4}(?P<length>.))", re.DOTALL
)
"""A section, and what begins behind it: the end mark, or the next section."""
WHOLE_BYTES_MAX: Final = section_bytes_max(KVMCLOCK_STATE) + 6


class FoundBy(StrEnum):
    """What says where the section is."""

    DESCRIPTION = "description"
    SEARCH = "search"


class KvmclockSection(NamedTuple):
    """Where it is in the file.  reliable_at: None without that subsection (machine types up to 2.8)."""

    begin: int
    clock_at: int
    reliable_at: int | None
    found_by: FoundBy


def find_kvmclock(stream: StreamFile, description: Description | None, sections: Sections) -> KvmclockSection:
    """The section; StateFileError if there is none, more than one that might be it, or one of another version."""
    described = sections.found.get((NAME, 0))
    if described is not None:
        return _described(described)
    if description is not None and all(layout.name != NAME for layout in description.layouts):
        raise _missing("no kvmclock among the devices that the stream describes")
    candidates = list(islice(_candidates(stream), 2))
    if not candidates:
        raise _missing("no kvmclock section")
    if len(candidates) > 1:
        places = " and ".join(str(candidate.begin) for candidate in candidates)
        supported = "one; guest RAM may hold such bytes, and without a description nothing tells which one is QEMU's"
        raise StateFileError(NAME, f"more than one section that might be it, at {places}", supported)
    return candidates[0]


def _described(section: Section) -> KvmclockSection:
    layout = section.layout
    if layout.version != VERSION:
        raise StateFileError(f"{NAME}.version", f"{layout.version}", f"{VERSION}")
    clock, reliable = layout.places.get(CLOCK.name), layout.places.get(RELIABLE_PLACE)
    is_one_byte = reliable is None or reliable.size == RELIABLE.kind.form.size
    if clock is None or clock.size != CLOCK.kind.form.size or not is_one_byte:
        raise StateFileError(NAME, "other fields", "a clock of 8 bytes, and in a subsection one byte")
    reliable_at = None if reliable is None else section.begin + reliable.offset
    return KvmclockSection(section.begin, section.begin + clock.offset, reliable_at, FoundBy.DESCRIPTION)


def _candidates(stream: StreamFile) -> Iterator[KvmclockSection]:
    """What has every byte of a section that is always the same, from the stream's beginning on."""
    for at, found in stream.matches(WHOLE, NEEDLE, WHOLE_BYTES_MAX):
        if found["length"] != b"\0":
            reliable_at = None if found[RELIABLE.name] is None else at + found.start(RELIABLE.name)
            yield KvmclockSection(at + found.start(), at + found.start(CLOCK.name), reliable_at, FoundBy.SEARCH)


def _missing(found: str) -> StateFileError:
    return StateFileError(NAME, found, "a stream of a VM under KVM whose CPU has kvmclock")
