"""An image and what it is told, put into guest memory: first there is a place for everything, then it is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from pvclock._memory import GuestMemory
from pvclock.boot.information import (
    ADDRESSES_END,
    INFORMATION_BYTES,
    BootInformation,
    BootModule,
    place_information,
    place_modules,
    ram_areas,
)
from pvclock.boot.segments import Segment, write_segments

__all__ = ["Layout", "place", "write"]


class Layout(NamedTuple):
    """Where it all is.

    information: what the image is told.  modules: the addresses of each.  areas: what is RAM for the image, base and
    length of each.
    """

    information: range
    modules: list[range]
    areas: list[tuple[int, int]]


def place(
    memory: GuestMemory,
    image: Iterable[range],
    told: BootInformation,
    *,
    length: int = INFORMATION_BYTES,
    end: int = ADDRESSES_END,
    modules_end: int = ADDRESSES_END,
) -> Layout:
    """Find a place for what an image is told that takes the addresses `image`; ImageError if there is none.

    length: of the information.  end, modules_end: the first address that information and modules may not reach.
    """
    taken = [*image, *told.firmware.reserved]
    information = place_information(memory.slots, taken, length, end)
    lengths = (len(module.content) for module in told.modules)
    modules = place_modules(memory.slots, [*taken, information], lengths, modules_end)
    return Layout(information, modules, ram_areas(memory.slots, told.firmware.reserved))


def write(
    memory: GuestMemory,
    segments: list[Segment],
    layout: Layout,
    modules: Iterable[BootModule],
    information: Mapping[int, bytes],
) -> None:
    """Write image, modules and information, all of which were checked.  information: its parts by their addresses."""
    write_segments(memory, segments)
    for where, module in zip(layout.modules, modules, strict=True):
        memory.write(where.start, module.content)
    for gpa, content in information.items():
        memory.write(gpa, content)
