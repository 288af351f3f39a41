"""Which of the places that hold a legal page are a VM's pages, one for each vCPU: by how they lie to each other.

Linux has an array of 64-byte entries from the beginning of a memory page, vCPU 0's first; an entry is empty while its
vCPU is off.  From 65 vCPUs on the others are in a second one; with 128 nothing says which is the first, and the one at
the lower address is taken.  FreeBSD's entries are 32 bytes apart, and some guests give each vCPU a memory page.
A place that is no vCPU's has been one's, as SeaBIOS's is after Linux has booted, and as those of the kernel before a
reboot are; or is a copy that the guest keeps, or belongs to a guest of this guest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Final, NamedTuple, TypeAlias

from pvclock.quantities import Gpa
from pvclock.readings import TimeInfo

__all__ = ["Candidate", "PageSet", "Pages", "page_sets"]

Pages: TypeAlias = tuple[Gpa | None, ...]
"""The pages of vCPU 0, 1, ...; None: that vCPU has none, as far as is known.  vCPU 0 has one."""

MEMORY_PAGE_BYTES: Final = 4096
LINUX_STRIDE_BYTES: Final = 64
LINUX_ARRAY_VCPUS: Final = MEMORY_PAGE_BYTES // LINUX_STRIDE_BYTES
STRIDES_BYTES: Final = (LINUX_STRIDE_BYTES, 32, MEMORY_PAGE_BYTES)
"""How far apart the entries of an array are, the usual first."""

ALIGNMENTS_BYTES: Final = (MEMORY_PAGE_BYTES, 64, 32, 4)
SETS_MAX: Final = 16


class Candidate(NamedTuple):
    """A place that holds a legal page, and what it held when it was looked at."""

    gpa: Gpa
    info: TimeInfo


class PageSet(NamedTuple):
    """Places that can be the VM's pages."""

    pages: Pages

    @property
    def places(self) -> tuple[Gpa, ...]:
        """Those that there are."""
        return tuple(gpa for gpa in self.pages if gpa is not None)

    @property
    def is_as_linuxs(self) -> bool:
        """Does it lie as Linux's pages do?"""
        return alignment_bytes(self.places[0]) == MEMORY_PAGE_BYTES

    @property
    def how_it_lies(self) -> str:
        """For people."""
        first, *others = self.places
        aligned = f"aligned to {alignment_bytes(first)} bytes"
        if not others:
            return f"one page at {first:#x}, {aligned}"
        entries = [(vcpu, gpa) for vcpu, gpa in enumerate(self.pages) if gpa is not None]
        strides = {(after - before) // (vcpu - of) for (of, before), (vcpu, after) in pairwise(entries)}
        apart = f"{strides.pop()} bytes apart" if len(strides) == 1 else "in more than one place"
        return f"{len(self.places)} pages {apart} from {first:#x}, {aligned}"


def page_sets(candidates: Iterable[Candidate], vcpus: int) -> list[PageSet]:
    """The sets that candidates form, the likeliest first, no place in two of them; 16 sets at most.

    The one of more vCPUs is the likelier one, then the one of the better alignment, of the usual stride, of the newest
    line: the VM's clock goes on at a reboot, and its TSC begins anew.
    """
    left = dict(candidates)
    sets: list[PageSet] = []
    while left and len(sets) < SETS_MAX:
        sets.append(PageSet(_likeliest(left, vcpus)))
        left = {gpa: info for gpa, info in left.items() if gpa not in sets[-1].pages}
    return sets


def alignment_bytes(gpa: Gpa) -> int:
    """The greatest of 4096, 64, 32 and 4 that the address is a multiple of."""
    return next(alignment for alignment in ALIGNMENTS_BYTES if gpa % alignment == 0)


# Inside


def _likeliest(infos: Mapping[Gpa, TimeInfo], vcpus: int) -> Pages:
    arrays = [(pages, LINUX_STRIDE_BYTES) for pages in _linux_arrays(infos, vcpus)]
    arrays += [(tuple(_entries(infos, gpa, stride, vcpus)), stride) for stride in STRIDES_BYTES for gpa in infos]

    def rank(pages: Pages, stride_bytes: int) -> tuple[int, int, int, int, int]:
        places = [gpa for gpa in pages if gpa is not None]
        newest = max(infos[gpa].system_time for gpa in places)
        return len(places), alignment_bytes(places[0]), -STRIDES_BYTES.index(stride_bytes), newest, -places[0]

    pages, _ = max(arrays, key=lambda each: rank(*each))
    return pages + (None,) * (vcpus - len(pages))


def _linux_arrays(infos: Mapping[Gpa, TimeInfo], vcpus: int) -> Iterator[Pages]:
    """Arrays from the beginning of a memory page, and with more vCPUs than fill one, each with a second one."""
    entries = Counter(Gpa(gpa - gpa % MEMORY_PAGE_BYTES) for gpa in infos if gpa % LINUX_STRIDE_BYTES == 0)
    firsts = [base for base, _ in entries.most_common() if base in infos]
    for base in firsts:
        yield _with_holes(infos, base, min(vcpus, LINUX_ARRAY_VCPUS))
    if vcpus > LINUX_ARRAY_VCPUS:
        # A second one may begin with an empty entry, if two others say that it is one.
        seconds = [base for base, count in entries.most_common(SETS_MAX) if base in infos or count > 1]
        for base in firsts[:SETS_MAX]:
            first = _with_holes(infos, base, LINUX_ARRAY_VCPUS)
            left = {gpa: info for gpa, info in infos.items() if gpa not in first}
            yield first + _likeliest_second(left, seconds, vcpus - LINUX_ARRAY_VCPUS, infos[base])


def _likeliest_second(infos: Mapping[Gpa, TimeInfo], bases: Iterable[Gpa], vcpus: int, line: TimeInfo) -> Pages:
    """Of most pages with the line of the first array: the kernel before a reboot had one, too."""

    def rank(pages: Pages) -> tuple[int, int]:
        times = [infos[gpa].system_time for gpa in pages if gpa is not None]
        return times.count(line.system_time), len(times)

    return max((_with_holes(infos, base, vcpus) for base in bases), key=rank, default=())


def _with_holes(infos: Mapping[Gpa, TimeInfo], base: Gpa, vcpus: int) -> Pages:
    entries = (Gpa(base + vcpu * LINUX_STRIDE_BYTES) for vcpu in range(vcpus))
    return tuple(gpa if gpa in infos else None for gpa in entries)


def _entries(infos: Mapping[Gpa, TimeInfo], gpa: Gpa, stride_bytes: int, most: int) -> Iterator[Gpa]:
    """Those of an array without holes."""
    for vcpu in range(most):
        entry = Gpa(gpa + vcpu * stride_bytes)
        if entry not in infos:
            return
        yield entry
