"""Where the sections of a stream are, by its description.

Devices' sections stand behind the RAM's, one right behind the other, and the last one ends where the description
begins.  So they are followed from there backwards: what is in guest RAM is never looked at.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final, NamedTuple

from pvclock import StateFileError
from qemu_glue.face.vmstate import SECTION_FOOTER, SECTION_FULL, SUBSECTION, named
from qemu_glue.migration.description import Description, Layout
from qemu_glue.migration.stream_file import StreamFile

__all__ = ["Section", "Sections", "find_sections"]

EOF: Final = b"\0"
"""Ends the sections."""

ID: Final = struct.Struct(">I")
INSTANCE: Final = struct.Struct(">II")
"""Instance and version."""
FOOTER_BYTES: Final = 1 + ID.size


class Section(NamedTuple):
    """One device's section.  begin: its first byte in the file."""

    layout: Layout
    begin: int

    def read(self, stream: StreamFile, name: str) -> int:
        """The number in field `name`, the first one of an array; KeyError if the section does not have it."""
        place = self.layout.places[name]
        return int.from_bytes(stream.read(self.begin + place.offset, min(place.size, 8), name), "big")


class Sections(NamedTuple):
    """The sections found, by name and instance.  missed: the last one that is not where it should be, if any."""

    found: Mapping[tuple[str, int], Section]
    missed: Layout | None


def find_sections(stream: StreamFile, description: Description) -> Sections:
    """The sections, from the last one on.

    They end at the first that is not where the description puts it: those before the RAM (QEMU 8.1 has such), or all of
    a description that is of another stream.
    """
    end = description.begin - len(EOF)
    if stream.read(end, len(EOF), "stream.end") != EOF:
        raise StateFileError("stream.end", "no end mark before the description", "a stream that was saved whole")
    found: dict[tuple[str, int], Section] = {}
    footer_bytes: int | None = None
    for layout in reversed(description.layouts):
        sizes = (FOOTER_BYTES, 0) if footer_bytes is None else (footer_bytes,)  # none before machine type 2.4
        fitting = [size for size in sizes if _is_section(stream, layout, end - size - layout.length, size)]
        if not fitting:
            return Sections(found, layout)
        footer_bytes = fitting[0]
        end -= footer_bytes + layout.length
        found[layout.name, layout.instance] = Section(layout, end)
    return Sections(found, None)


def _is_section(stream: StreamFile, layout: Layout, begin: int, footer_bytes: int) -> bool:
    """Are header, headers of subsections, and footer there?"""
    if begin < stream.begin:
        return False
    header = stream.read(begin, 1 + ID.size, layout.name)
    expected = [(begin + len(header), named(layout.name) + _instance(layout))]
    expected += [
        (begin + each.offset, bytes((SUBSECTION,)) + named(each.name) + ID.pack(each.version))
        for each in layout.subsections
    ]
    if footer_bytes:
        expected.append((begin + layout.length, bytes((SECTION_FOOTER,)) + header[1:]))
    return header[0] == SECTION_FULL and all(
        stream.read(at, len(content), layout.name) == content for at, content in expected
    )


def _instance(layout: Layout) -> bytes:
    """Instance and version, as far as they are described."""
    instance = ID.pack(layout.instance)
    return instance if layout.version is None else instance + ID.pack(layout.version)
