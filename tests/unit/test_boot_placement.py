"""Where an image's boot information goes: the lowest page with room, whatever of memory the image takes."""

from __future__ import annotations

import random
from typing import Final

import pytest

from pvclock.boot.information import place_information
from pvclock.errors import ImageError
from pvclock.guest_layout import BOOT_INFORMATION
from tests.waiting import HANG_S, alarm_after

pytestmark = pytest.mark.row("E18", "E22")

PAGE: Final = 4096
ELF_SEGMENTS_MAX: Final = 65535
"""An ELF file's program headers are counted in 16 bits."""


def naive(slots: list[tuple[int, int]], taken: list[range], length: int, end: int) -> int | None:
    """The first page that it may begin at, by a look at each and at all that is taken."""
    for start in range(BOOT_INFORMATION, end, PAGE):
        stop = start + length
        has_room = any(base <= start and stop <= min(base + size, end) for base, size in slots)
        if has_room and not any(start < area.stop and area.start < stop for area in taken):
            return start
    return None


def placed(slots: list[tuple[int, int]], taken: list[range], length: int, end: int) -> int | None:
    """The same by place_information()."""
    try:
        return place_information(slots, taken, length, end).start
    except ImageError:
        return None


def test_it_is_the_lowest_page_with_room() -> None:
    """Of areas in any order, next to each other, within each other or on no page's edge; or there is none."""
    chance = random.Random(22)  # noqa: S311  # the same each time
    found = []
    for _ in range(2000):
        slots = [(chance.randrange(64) * PAGE, chance.randrange(1, 64) * PAGE) for _ in range(chance.randint(1, 3))]
        begins = [chance.randrange(64 * PAGE) for _ in range(chance.randint(0, 12))]
        taken = [range(begin, begin + chance.choice((1, 100, PAGE, 9000))) for begin in begins]
        length, end = chance.choice((1, PAGE, 5 * PAGE)), chance.randrange(16, 128) * PAGE
        found.append(placed(slots, taken, length, end))
        assert found[-1] == naive(slots, taken, length, end), (slots, taken, length, end)
    assert None in found
    assert len(set(found)) > 20


def test_as_many_segments_as_an_elf_file_can_have() -> None:
    """One on each page: that none has room is found in one pass, not by looking at each for each."""
    memory = [(0, (ELF_SEGMENTS_MAX << 12) + BOOT_INFORMATION)]
    taken = [range(gpa, gpa + 1) for gpa in range(BOOT_INFORMATION, memory[0][1], PAGE)]
    assert len(taken) == ELF_SEGMENTS_MAX
    with alarm_after(int(HANG_S)):
        assert placed(memory, taken, PAGE, memory[0][1]) is None
        assert placed(memory, taken[:-1], PAGE, memory[0][1]) == taken[-1].start
