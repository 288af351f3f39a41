"""Finds the pages of a guest that nobody told the address of: its RAM is searched for what a page can hold."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from pvclock._search import search_pages
from pvclock.errors import PagesNotFound
from pvclock.meter.findings import TIME_INFO, time_info
from pvclock.meter.watch.page_layout import Candidate, Pages, PageSet, alignment_bytes, page_sets
from pvclock.meter.watch.poll import steady
from pvclock.meter.watch.vm import GuestRam, RamRange
from pvclock.quantities import U64_MASK, Gpa, GuestTsc
from pvclock.readings import TimeInfo

__all__ = ["Candidate", "FoundPages", "SearchTerms", "find_pages", "is_legal", "search_in_pieces"]

STEP_BYTES: Final = 4
OVERLAP_BYTES: Final = TIME_INFO.size - STEP_BYTES
CANDIDATES_MAX: Final = 1024
PLACES_MAX: Final = 1 << 20
"""A chunk has no more: a page holds zeros, and no other begins there."""

LOOKS: Final = 50
LOOK_PAUSE_S: Final = 0.002
"""A page's writer may lose its CPU with the version odd: it has a tenth of a second to get it back."""

PLAUSIBLE_KHZ: Final = range(100_000, 20_000_000)
PLAUSIBLE_ALIGNMENT_BYTES: Final = 32
KINDS_MAX: Final = 1024
KINDS_SHOWN: Final = 3


class SearchTerms(NamedTuple):
    """What a page must show: a rate within within_ppm of the guest's TSC of tsc_hz, and no tsc_timestamp in the future.

    newest_tsc: the guest's TSC when the search begins, and any later instant; None if it is unknown.
    """

    tsc_hz: int
    within_ppm: int = 300
    newest_tsc: GuestTsc | None = None


class FoundPages(NamedTuple):
    """The pages of a guest, and what the search saw.

    sets: the pages, and the sets that others form, the likeliest first (PageChoice takes them).  others: all places
    that hold a legal page, too.  why: for people, how they were chosen.  even_and_zero_pads, legal: places, as
    pvclock._search.Places has them.
    """

    sets: tuple[PageSet, ...]
    others: tuple[Candidate, ...]
    why: str
    searched_bytes: int
    even_and_zero_pads: int
    legal: int
    seconds: float

    @property
    def pages(self) -> Pages:
        """The pages of vCPU 0, 1, ...; None where one has none now."""
        return self.sets[0].pages


def find_pages(
    ram: GuestRam,
    vcpus: int,
    terms: SearchTerms,
    progress: Callable[[int, int], object] = lambda _done_bytes, _total_bytes: None,
) -> FoundPages:
    """Search all of a guest's RAM while it runs.  PagesNotFound says what was looked for, and what may be the reason.

    progress: called with the bytes searched and their total after each chunk.  Errors of the RAM.
    """
    search = search_in_pieces(ram, vcpus, terms)
    while True:
        try:
            done_bytes, total_bytes = next(search)
        except StopIteration as end:
            found: FoundPages = end.value
            return found
        progress(done_bytes, total_bytes)
        if done_bytes < total_bytes:
            time.sleep(ram.pause_s)


def search_in_pieces(ram: GuestRam, vcpus: int, terms: SearchTerms) -> Generator[tuple[int, int], None, FoundPages]:
    """find_pages() by the piece: the bytes searched and their total whenever the VMM is to be left alone a while."""
    begin_s = time.monotonic()
    scan = _Scan(terms, begin_s)
    ranges = ram.ranges()
    total_bytes = sum(each.length for each in ranges)
    since_pause_bytes = 0
    for gpa, data, done_bytes in _chunks(ram, ranges):
        scan.take(gpa, data)
        since_pause_bytes += len(data)
        if since_pause_bytes >= _stride_bytes(ram) or done_bytes == total_bytes:
            since_pause_bytes = 0
            yield done_bytes, total_bytes
    candidates = list(_steady_pages(ram, scan.places, scan.terms_now))
    if not candidates:
        raise PagesNotFound(total_bytes, _described(terms), scan.why_none())
    sets = tuple(page_sets(candidates, vcpus))
    others = tuple(each for each in candidates if each.gpa not in sets[0].pages)
    why = _why(sets, vcpus, others, scan)
    seconds = time.monotonic() - begin_s
    return FoundPages(sets, others, why, total_bytes, scan.even_and_zero_pads, scan.legal, seconds)


def is_legal(info: TimeInfo, terms: SearchTerms) -> bool:
    """Can a vCPU's page hold this, now that it is not being written?  By what find_pages() goes by."""
    return info.version % 2 == 0 and search_pages(TIME_INFO.pack(*info), *terms, places_max=1).right_rate == 1


class _Scan:
    """What was seen in the chunks so far."""

    def __init__(self, terms: SearchTerms, begin_s: float) -> None:
        self._terms, self._begin_s = terms, begin_s
        self.places: list[Gpa] = []
        self.even_and_zero_pads = self.legal = self.right_rate = 0
        self.other_khz = Counter[int]()

    def take(self, gpa: Gpa, data: bytes) -> None:
        """Search one chunk, which lies at `gpa`."""
        found = search_pages(data, *self.terms_now(), places_max=PLACES_MAX)
        self.even_and_zero_pads += found.even_and_zero_pads
        self.legal += found.legal
        self.right_rate += found.right_rate
        self.places += [Gpa(gpa + offset) for offset in found.pages]
        if len(self.places) > CANDIDATES_MAX:
            self.places = sorted(self.places, key=lambda place: (-alignment_bytes(place), place))[:CANDIDATES_MAX]
        for offset in found.other_rate[:CANDIDATES_MAX]:
            self._note_other(Gpa(gpa + offset), time_info(data[offset : offset + TIME_INFO.size]).shown_khz)

    def _note_other(self, gpa: Gpa, khz: int) -> None:
        is_plausible = khz in PLAUSIBLE_KHZ and gpa % PLAUSIBLE_ALIGNMENT_BYTES == 0
        if is_plausible and (khz in self.other_khz or len(self.other_khz) < KINDS_MAX):
            self.other_khz[khz] += 1

    def terms_now(self) -> SearchTerms:
        """The terms, with all that the guest's TSC can have done since the search began, and a second more."""
        if self._terms.newest_tsc is None:
            return self._terms
        since_ticks = int((time.monotonic() - self._begin_s + 1) * self._terms.tsc_hz)
        return self._terms._replace(newest_tsc=GuestTsc(min(self._terms.newest_tsc + since_ticks, U64_MASK)))

    def why_none(self) -> str:
        """What may be the reason that there are no pages."""
        why = (
            "the guest has no kvmclock (QEMU's -cpu ...,-kvmclock, or a kernel that does not use it), or it has not "
            "booted so far, or its TSC has another frequency"
        )
        if self.right_rate:
            why += f"; {self.right_rate} places changed all the while"
        if self.other_khz:
            shown = ", ".join(f"{khz} kHz ({count})" for khz, count in self.other_khz.most_common(KINDS_SHOWN))
            why += f"; {self.other_khz.total()} places could be pages of another frequency, most often of {shown}"
        return why


def _chunks(ram: GuestRam, ranges: Iterable[RamRange]) -> Iterator[tuple[Gpa, bytes, int]]:
    """Each chunk with its address and the bytes searched with it; a place across the border of two is in the second."""
    before = 0
    for gpa, length in ranges:
        for at in range(0, max(length - OVERLAP_BYTES, 0), _stride_bytes(ram)):
            read_bytes = min(_stride_bytes(ram) + OVERLAP_BYTES, length - at)
            yield Gpa(gpa + at), ram.read(Gpa(gpa + at), read_bytes), before + at + read_bytes
        before += length


def _stride_bytes(ram: GuestRam) -> int:
    return max(ram.chunk_bytes - OVERLAP_BYTES, STEP_BYTES) // STEP_BYTES * STEP_BYTES


def _steady_pages(ram: GuestRam, places: Sequence[Gpa], terms_now: Callable[[], SearchTerms]) -> Iterator[Candidate]:
    """The places that still hold a legal page, in order of addresses; one that is being written is looked at again."""
    infos: dict[Gpa, TimeInfo] = {}
    left = list(places)
    for look in range(LOOKS):
        if not left:
            break
        time.sleep(LOOK_PAUSE_S if look else 0)
        pairs = zip(ram.read_many(left, TIME_INFO.size), ram.read_many(left, TIME_INFO.size), strict=True)
        seen = {gpa: steady(*pair) for gpa, pair in zip(left, pairs, strict=True)}
        infos |= {gpa: info for gpa, info in seen.items() if info is not None}
        left = [gpa for gpa, info in seen.items() if info is None]
    terms = terms_now()
    return (Candidate(gpa, infos[gpa]) for gpa in sorted(infos) if is_legal(infos[gpa], terms))


def _described(terms: SearchTerms) -> str:
    newest = "" if terms.newest_tsc is None else f" and up to {terms.newest_tsc}"
    return (
        "even version, zero pads, legal flags, (mul, shift) of a TSC of "
        f"{terms.tsc_hz / 1e6:.10g} MHz within {terms.within_ppm} ppm, tsc_timestamp above 0{newest}"
    )


def _why(sets: Sequence[PageSet], vcpus: int, others: Sequence[Candidate], scan: _Scan) -> str:
    chosen, *left = sets
    parts = [chosen.how_it_lies]
    lacking = vcpus - len(chosen.places)
    if lacking:
        parts.append(f"for {lacking} of {vcpus} vCPUs there is none")
    if left:
        parts.append(f"legal pages in {len(others)} more places, the likeliest of them {left[0].how_it_lies}")
    if scan.right_rate > len(scan.places):
        parts.append(f"the {len(scan.places)} best aligned of {scan.right_rate} such places were looked at")
    return "; ".join(parts)
