"""Of places that hold a legal page, which are the vCPUs': Linux's array before others, arrays before single places."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvclock import Gpa, GuestNs, GuestTsc, TimeInfo
from pvclock.meter.watch.page_layout import Candidate, page_sets

pytestmark = pytest.mark.row("E3")

SEABIOS = 0xE8C20
LINUX = 0x1_3A7D_B000


def candidates(*places: int, tsc: int = 100) -> list[Candidate]:
    """Places that hold one line."""
    info = TimeInfo(2, GuestTsc(tsc), GuestNs(5), 1 << 31, 0, 1)
    return [Candidate(Gpa(gpa), info) for gpa in places]


def array(gpa: int, count: int, stride: int = 64) -> list[int]:
    """So many places from an address."""
    return [gpa + number * stride for number in range(count)]


def likeliest(found: list[Candidate], vcpus: int) -> list[int]:
    """The first set."""
    return list(page_sets(found, vcpus)[0].pages)


@pytest.mark.parametrize("vcpus", [1, 2, 3, 63, 64])
def test_linuxs_array_and_seabioss_place(vcpus: int) -> None:
    """One entry for each vCPU from the beginning of a memory page; what the firmware left is the other set."""
    sets = page_sets(candidates(SEABIOS, *array(LINUX, vcpus)), vcpus)
    assert [list(each.pages) for each in sets] == [array(LINUX, vcpus), [SEABIOS]]
    assert sets[1].how_they_lie == "one page at 0xe8c20, aligned to 32 bytes"


@pytest.mark.parametrize("vcpus", [65, 66, 128, 200])
def test_more_vcpus_than_a_memory_page_has_entries(vcpus: int) -> None:
    """Linux has the first 64 in one array and all others in another, which may lie before it but for 128 vCPUs."""
    first, others = array(LINUX, 64), array(0x2_8000_0000 if vcpus == 128 else 0x8000_0000, vcpus - 64)
    assert likeliest(candidates(SEABIOS, *others, *first), vcpus) == first + others
    assert likeliest(candidates(SEABIOS, *array(LINUX, vcpus)), vcpus) == array(LINUX, vcpus)


def test_some_of_the_vcpus_are_not_up() -> None:
    """Linux with maxcpus=1 or 3 of 4, or while it boots: those that have a page, not the firmware's beside them."""
    assert likeliest(candidates(SEABIOS, LINUX), 2) == [LINUX]
    assert likeliest(candidates(SEABIOS, *array(LINUX, 3)), 4) == array(LINUX, 3)
    assert likeliest(candidates(SEABIOS, *array(LINUX, 64), 0x5040), 70) == array(LINUX, 64)


@pytest.mark.parametrize("stride", [64, 32, 4096])
@pytest.mark.parametrize("gpa", [0x5000, 0x5040, 0x5008])
def test_other_arrays(gpa: int, stride: int) -> None:
    """FreeBSD's entries are closer, others' a memory page apart; an array need not be aligned."""
    assert likeliest(candidates(SEABIOS, *array(gpa, 3, stride)), 3) == array(gpa, 3, stride)


def test_an_aligned_array_comes_first() -> None:
    """A guest may keep copies of its pages at the same distances, elsewhere."""
    assert likeliest(candidates(*array(0x1000_0048, 2), *array(LINUX, 2)), 2) == array(LINUX, 2)
    assert likeliest(candidates(*array(LINUX, 2, 32), *array(LINUX + 4096, 2)), 2) == array(LINUX + 4096, 2)
    assert likeliest(candidates(*array(LINUX, 3), *array(0x5008, 4)), 4) == array(0x5008, 4)


def test_of_two_alike_that_with_the_newest_line() -> None:
    """What the kernel before a kexec left is older; without a newer one, the first."""
    old, new = array(0x5000, 2), array(0x9000, 2)
    assert likeliest(candidates(*old) + candidates(*new, tsc=101), 2) == new
    assert likeliest(candidates(*old, tsc=101) + candidates(*new), 2) == old
    assert likeliest(candidates(*new, *old), 2) == old


def test_places_without_order() -> None:
    """As many as there are vCPUs, of one alignment: each is one's; else nothing says so, and the best is vCPU 0's."""
    assert likeliest(candidates(SEABIOS, 0x5000, 0x9000, 0xF000), 3) == [0x5000, 0x9000, 0xF000]
    assert likeliest(candidates(SEABIOS, 0x5000, 0x9000), 3) == [0x5000]
    assert likeliest(candidates(SEABIOS, 0x5004), 1) == [SEABIOS]


@settings(max_examples=50)
@given(st.sets(st.integers(0, 300).map(lambda word: word * 32), max_size=40), st.integers(1, 70))
def test_no_place_is_in_two_sets(places: set[int], vcpus: int) -> None:
    """Whatever there is, each set is of places that are there and of no more than there are vCPUs."""
    sets = page_sets(candidates(*places), vcpus)
    chosen = [gpa for each in sets for gpa in each.pages]
    assert len(chosen) == len(set(chosen))
    assert set(chosen) <= places
    assert all(0 < len(each.pages) <= vcpus for each in sets)
    assert set(chosen) == places or len(sets) == 16


def test_how_pages_lie_is_told() -> None:
    """For people."""
    (two,) = page_sets(candidates(*array(LINUX, 2)), 2)
    assert two.how_they_lie == "2 pages 64 bytes apart from 0x13a7db000, aligned to 4096 bytes"
    (many,) = page_sets(candidates(*array(LINUX, 64), 0x8000), 65)
    assert many.how_they_lie.startswith("65 pages in more than one place from 0x13a7db000")
