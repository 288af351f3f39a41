"""Which of the places that hold a legal page are a VM's pages, one for each vCPU: by how they lie to each other.

Linux has an array of 64-byte entries from the beginning of a memory page, vCPU 0's first.  From 65 vCPUs on the others
are in a second one; with 128 nothing says which is the first, and the one at the lower address is taken.  FreeBSD's
entries are 32 bytes apart, and some guests give each vCPU a memory page.
A place that is no vCPU's has been one's, as SeaBIOS's is after Linux has booted, or is a copy that the guest keeps, or
belongs to a guest of this guest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Final, NamedTuple

from pvclock.quantities import Gpa
from pvclock.readings import TimeInfo

__all__ = ["Candidate", "PageSet", "page_sets"]

LINUX_ARRAY_VCPUS: Final = 64
LINUX_STRIDE_BYTES: Final = 64
STRIDES_BYTES: Final = (LINUX_STRIDE_BYTES, 32, 4096)
"""How far apart the entries of an array are, the usual first."""

ALIGNMENTS_BYTES: Final = (4096, 64, 32, 4)
SETS_MAX: Final = 16


class Candidate(NamedTuple):
    """A place that holds a legal page, and what it held when it was looked at."""

    gpa: Gpa
    info: TimeInfo


class PageSet(NamedTuple):
    """Places that can be the pages of vCPU 0, 1, ...; fewer than there are vCPUs if some have none."""

    pages: tuple[Gpa, ...]
    how_they_lie: str


def page_sets(candidates: Iterable[Candidate], vcpus: int) -> list[PageSet]:
    """The sets that candidates form, the likeliest first, no place in two of them; 16 sets at most.

    The one of more vCPUs is the likelier one, then the one of the better alignment, of the usual stride, of the newest
    line.
    """
    left = dict(candidates)
    sets: list[PageSet] = []
    while left and len(sets) < SETS_MAX:
        likeliest = _likeliest(left, vcpus)
        sets.append(PageSet(likeliest, _how_they_lie(likeliest)))
        left = _without(left, likeliest)
    return sets


def _likeliest(infos: Mapping[Gpa, TimeInfo], vcpus: int) -> tuple[Gpa, ...]:
    array = _best_array(infos, vcpus)
    if len(array) < vcpus and vcpus > LINUX_ARRAY_VCPUS:
        return _linux_arrays(infos, vcpus) or array
    if len(array) == 1 < vcpus:
        alike = sorted(gpa for gpa in infos if _alignment_bytes(gpa) == _alignment_bytes(array[0]))
        return tuple(alike) if len(alike) == vcpus else array
    return array


def _linux_arrays(infos: Mapping[Gpa, TimeInfo], vcpus: int) -> tuple[Gpa, ...]:
    """An array that fills a memory page, and one of all other vCPUs; () if there are no two such."""
    for gpa in sorted(gpa for gpa in infos if _alignment_bytes(gpa) == LINUX_ARRAY_VCPUS * LINUX_STRIDE_BYTES):
        first = tuple(_entries(infos, gpa, LINUX_STRIDE_BYTES, vcpus))
        if len(first) == LINUX_ARRAY_VCPUS:
            others = _best_array(_without(infos, first), vcpus - LINUX_ARRAY_VCPUS)
            if len(others) == vcpus - LINUX_ARRAY_VCPUS:
                return first + others
    return ()


def _best_array(infos: Mapping[Gpa, TimeInfo], vcpus: int) -> tuple[Gpa, ...]:
    """The best array of at least one entry, and of one for each vCPU at most; () of no places."""

    def rank(array: tuple[Gpa, ...], stride_bytes: int) -> tuple[int, int, int, int, int]:
        newest = max(infos[gpa].tsc_timestamp for gpa in array)
        return len(array), _alignment_bytes(array[0]), -STRIDES_BYTES.index(stride_bytes), newest, -array[0]

    arrays = ((tuple(_entries(infos, gpa, stride, vcpus)), stride) for stride in STRIDES_BYTES for gpa in infos)
    return max(arrays, key=lambda each: rank(*each), default=((), 0))[0]


def _entries(infos: Mapping[Gpa, TimeInfo], gpa: Gpa, stride_bytes: int, most: int) -> Iterator[Gpa]:
    for vcpu in range(most):
        entry = Gpa(gpa + vcpu * stride_bytes)
        if entry not in infos:
            return
        yield entry


def _alignment_bytes(gpa: Gpa) -> int:
    return next(alignment for alignment in ALIGNMENTS_BYTES if gpa % alignment == 0)


def _without(infos: Mapping[Gpa, TimeInfo], places: Iterable[Gpa]) -> dict[Gpa, TimeInfo]:
    gone = set(places)
    return {gpa: info for gpa, info in infos.items() if gpa not in gone}


def _how_they_lie(pages: tuple[Gpa, ...]) -> str:
    """For people."""
    aligned = f"aligned to {_alignment_bytes(pages[0])} bytes"
    if len(pages) == 1:
        return f"one page at {pages[0]:#x}, {aligned}"
    strides = {after - before for before, after in pairwise(pages)}
    apart = f"{strides.pop()} bytes apart" if len(strides) == 1 else "in more than one place"
    return f"{len(pages)} pages {apart} from {pages[0]:#x}, {aligned}"
