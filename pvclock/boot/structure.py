"""Images whose entry has the address of a structure: multiboot's and PVH's are of one shape, and loaded in one way.

The structure has a memory map behind it, then come the command line and, for modules, their list and their strings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

from pvclock._memory import GuestMemory
from pvclock.boot.information import (
    INFORMATION_BYTES,
    BootInformation,
    check_structure,
    cmdline_at,
    command_line,
)
from pvclock.boot.placement import Layout, place, write
from pvclock.boot.segments import Segment, check_segments

__all__ = ["ListModule", "MakeStructure", "load_with_structure"]

LIST_ALIGNMENT: Final = 8

MakeStructure: TypeAlias = Callable[[Layout, int], bytes]
"""The structure and the memory map of a layout; the address is that of the list of modules."""

ListModule: TypeAlias = Callable[[range, range], bytes]
"""An entry of the list of modules, for the addresses of a module and of its string, the NUL included."""


def load_with_structure(
    memory: GuestMemory,
    segments: list[Segment],
    entry: int,
    told: BootInformation,
    make_structure: MakeStructure,
    list_module: ListModule,
) -> int:
    """Load an image and what it is told; the structure's address.  ImageError, with memory untouched, if it cannot be.

    Modules are page-aligned, behind the image and above 1 MiB.
    """
    cmdline = command_line(told.cmdline)
    strings = [command_line(module.string, name="string of a module") for module in told.modules]
    check_segments(memory.slots, segments, entry, told.firmware.reserved)
    cmdline = cmdline.ljust(-(-len(cmdline) // LIST_ALIGNMENT) * LIST_ALIGNMENT, b"\0")
    list_from = cmdline_at(0) + len(cmdline)
    list_bytes = len(_module_list(0, [range(0)] * len(strings), strings, list_module))
    taken = (segment.addresses for segment in segments)
    layout = place(memory, taken, told, length=max(INFORMATION_BYTES, list_from + list_bytes))
    at = layout.information.start
    structure = make_structure(layout, at + list_from)
    check_structure(structure, layout.areas)
    modules = _module_list(at + list_from, layout.modules, strings, list_module)
    write(memory, segments, layout, told.modules, {at: structure, cmdline_at(at): cmdline + modules})
    return at


def _module_list(at: int, modules: list[range], strings: list[bytes], list_module: ListModule) -> bytes:
    """The list, at `at`, and the strings behind it."""
    entries = [list_module(module, range(0)) for module in modules]
    string_at = at + sum(map(len, entries))
    for place_in_list, (module, string) in enumerate(zip(modules, strings, strict=True)):
        entries[place_in_list] = list_module(module, range(string_at, string_at + len(string)))
        string_at += len(string)
    return b"".join([*entries, *strings])
