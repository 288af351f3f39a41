"""Where an image's boot information goes: the lowest page with room, whatever of memory the image takes."""

from __future__ import annotations

import random
from typing import Final

import pytest

from pvclock.boot.information import place_information
from pvclock.errors import ImageError
from pvclock.guest_layout import BOOT_INFORMATION

pytestmark = pytest.mark.row("E18", "E22")

PAGE: Final = 4096
SEGMENTS: Final = 2000
LOOKS_MAX: Final = 10


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


class LookedAt:
    """A range that counts how often it is looked at."""

    def __init__(self, area: range) -> None:
        self._area, self.looks = area, 0

    @property
    def start(self) -> int:
        """The range's."""
        self.looks += 1
        return self._area.start

    @property
    def stop(self) -> int:
        """The range's."""
        self.looks += 1
        return self._area.stop


def test_an_image_of_many_segments_keeps_no_loader_busy() -> None:
    """Of thousands, one on each page, each is looked at a few times, and not once for each page; 65535 are possible."""
    memory = (BOOT_INFORMATION, SEGMENTS * PAGE)
    taken = [LookedAt(range(gpa, gpa + 1)) for gpa in range(memory[0], sum(memory), PAGE)]
    assert placed([memory], taken, PAGE, sum(memory)) is None  # type: ignore[arg-type]
    assert len(taken) == SEGMENTS
    assert max(area.looks for area in taken) <= LOOKS_MAX
