"""Finds the pages of a guest that nobody told the address of: its RAM is searched for what a page can hold."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from pvclock._search import search_pages
from pvclock.errors import PagesNotFound
from pvclock.meter.findings import TIME_INFO, time_info
from pvclock.meter.watch.page_layout import Candidate, PageSet, page_sets
from pvclock.meter.watch.poll import steady
from pvclock.meter.watch.vm import GuestRam, RamRange
from pvclock.quantities import U64_MASK, Gpa, GuestTsc
from pvclock.readings import TimeInfo

__all__ = ["Candidate", "FoundPages", "SearchTerms", "find_pages", "is_legal"]

STEP_BYTES: Final = 4
OVERLAP_BYTES: Final = TIME_INFO.size - STEP_BYTES
CANDIDATES_MAX: Final = 1024
LOOKS: Final = 50
LOOK_PAUSE_S: Final = 0.002
"""A page's writer may lose its CPU with the version odd: it has a tenth of a second to get it back."""

PLAUSIBLE_KHZ: Final = range(100_000, 20_000_000)
PLAUSIBLE_ALIGNMENT_BYTES: Final = 32
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

    pages: of vCPU 0, 1, ...; fewer than there are vCPUs if only so many have a page now.  others: places that hold a
    legal page, too.  sets: `pages`, and the sets that others form, the likeliest first (PageChoice takes them).
    why: for people, how they were chosen.  even_and_zero_pads, legal: places, as pvclock._search.Places has them.
    """

    pages: tuple[Gpa, ...]
    others: tuple[Candidate, ...]
    sets: tuple[tuple[Gpa, ...], ...]
    why: str
    searched_bytes: int
    even_and_zero_pads: int
    legal: int
    seconds: float


def find_pages(
    ram: GuestRam,
    vcpus: int,
    terms: SearchTerms,
    progress: Callable[[int, int], object] = lambda _done_bytes, _total_bytes: None,
) -> FoundPages:
    """Search all of a guest's RAM while it runs.  PagesNotFound says what was looked for, and what may be the reason.

    progress: called with the bytes searched and their total after each chunk.  Errors of the RAM.
    """
    begin = time.monotonic()
    scan = _Scan(terms, begin)
    ranges = ram.ranges()
    total_bytes = sum(each.length for each in ranges)
    for gpa, data, done_bytes in _chunks(ram, ranges):
        scan.take(gpa, data)
        progress(done_bytes, total_bytes)
    candidates = list(_steady_pages(ram, scan.places, scan.terms_now))
    if not candidates:
        raise PagesNotFound(total_bytes, _described(terms), scan.why_none())
    sets = page_sets(candidates, vcpus)
    others = tuple(each for each in candidates if each.gpa not in sets[0].pages)
    return FoundPages(
        sets[0].pages,
        others,
        tuple(each.pages for each in sets),
        _why(sets, vcpus, others, scan),
        total_bytes,
        scan.even_and_zero_pads,
        scan.legal,
        time.monotonic() - begin,
    )


def is_legal(info: TimeInfo, terms: SearchTerms) -> bool:
    """Can a vCPU's page hold this, now that it is not being written?  By what find_pages() goes by."""
    return info.version % 2 == 0 and search_pages(TIME_INFO.pack(*info), *terms).right_rate == 1


class _Scan:
    """What was seen in the chunks so far."""

    def __init__(self, terms: SearchTerms, begin_s: float) -> None:
        self._terms, self._begin_s = terms, begin_s
        self.places: list[Gpa] = []
        self.even_and_zero_pads = self.legal = self.right_rate = 0
        self.other_khz = Counter[int]()

    def take(self, gpa: Gpa, data: bytes) -> None:
        """Search one chunk, which lies at `gpa`."""
        found = search_pages(data, *self.terms_now(), places_max=CANDIDATES_MAX)
        self.even_and_zero_pads += found.even_and_zero_pads
        self.legal += found.legal
        self.right_rate += found.right_rate
        self.places += [Gpa(gpa + offset) for offset in found.pages[: CANDIDATES_MAX - len(self.places)]]
        for offset in found.other_rate:
            khz = time_info(data[offset : offset + TIME_INFO.size]).shown_khz
            if khz in PLAUSIBLE_KHZ and (gpa + offset) % PLAUSIBLE_ALIGNMENT_BYTES == 0:
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
    """Each chunk with its address and the bytes searched with it; a place across the border of two is in the second.

    It pauses whenever a chunk's worth was read, be it in many small ranges.
    """
    stride = max(ram.chunk_bytes - OVERLAP_BYTES, STEP_BYTES) // STEP_BYTES * STEP_BYTES
    before = since_pause_bytes = 0
    for gpa, length in ranges:
        for at in range(0, max(length - OVERLAP_BYTES, 0), stride):
            read_bytes = min(stride + OVERLAP_BYTES, length - at)
            yield Gpa(gpa + at), ram.read(Gpa(gpa + at), read_bytes), before + at + read_bytes
            since_pause_bytes += read_bytes
            if since_pause_bytes >= stride:
                time.sleep(ram.pause_s)
                since_pause_bytes = 0
        before += length


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
    chosen = sets[0]
    parts = [chosen.how_they_lie]
    if len(chosen.pages) < vcpus:
        parts.append(f"for {vcpus - len(chosen.pages)} of {vcpus} vCPUs there is none")
    if others:
        parts.append(f"legal pages in {len(others)} more places, the likeliest of them {sets[1].how_they_lie}")
    if scan.right_rate > len(scan.places):
        parts.append(f"the first {len(scan.places)} of {scan.right_rate} such places were looked at")
    return "; ".join(parts)
