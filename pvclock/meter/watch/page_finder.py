"""Where the pages of a watched VM are: as they were given, or by searches, again after a reset and for lost pages."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

from pvclock._counter import read_tsc
from pvclock.errors import ConfigError, PagesNotFound
from pvclock.meter.findings import TIME_INFO, time_info
from pvclock.meter.watch.lines import is_legal
from pvclock.meter.watch.page_choice import PageChoice
from pvclock.meter.watch.page_search import FoundPages, SearchTerms, find_pages
from pvclock.meter.watch.poll import Poll
from pvclock.meter.watch.vm import VmEventKind, WatchedVm
from pvclock.quantities import U64_MASK, Gpa, GuestTsc
from pvclock.readings import TimeInfo

__all__ = ["PageFinder", "PagesFound", "Progress"]

Progress = Callable[[int, int], object]
"""Is told the bytes searched, and their total."""

PAGE_BYTES: Final = 4096
PAUSE_S: Final = 0.2
PAUSE_MAX_S: Final = 30.0
SEARCH_SHARE: Final = 20
"""Searches take at most this part of the time."""


class PagesFound(NamedTuple):
    """The pages that are watched from now on, vCPU 0's first.

    why: for people, how they were found.  searched_bytes, seconds: of the search, 0 if there was none.
    """

    pages: tuple[Gpa, ...]
    why: str
    searched_bytes: int = 0
    seconds: float = 0.0


class PageFinder:
    """Finds the pages of `vm`; given: their addresses, if they are known, and then nothing is searched."""

    def __init__(self, vm: WatchedVm, host_tsc_hz: int, given: Sequence[Gpa], progress: Progress) -> None:
        if len(given) > vm.vcpus:
            raise ConfigError(f"{len(given)} pages of {vm.vcpus} vCPUs; a vCPU has one")
        self.is_searching = False
        """Are those of before a reset, or lost, and others not found so far?"""
        self._has_moved = False
        self._vm, self._progress, self._given = vm, progress, tuple(given)
        self._terms = SearchTerms(vm.tsc_hz or host_tsc_hz)
        self._choice: PageChoice | None = None
        self._seen: dict[Gpa, TimeInfo] = {}
        self._old: dict[Gpa, TimeInfo] = {}  # what lies there from before a reset, as far as nothing else did since
        self._pause_s, self._next_s = PAUSE_S, 0.0

    @property
    def pages(self) -> tuple[Gpa, ...]:
        """The pages of vCPU 0, 1, ..., as far as is known."""
        return self._given if self._choice is None else self._choice.pages

    @property
    def places(self) -> tuple[Gpa, ...]:
        """What is to be polled: `pages`, and then other places that may turn out to be them."""
        return self._given if self._choice is None else self._choice.places

    @property
    def is_sure(self) -> bool:
        """Are these the guest's: given, an array as Linux has it, or moving?  What firmware left looks like none."""
        is_array = len(self.pages) == self._vm.vcpus and self.pages[0] % PAGE_BYTES == 0
        return bool(self._given) or is_array or self._has_moved

    def find(self) -> PagesFound:
        """Find the pages when the watch begins.  PagesNotFound, ConfigError; errors of the VM and its RAM."""
        if not self._given:
            return self._take(self._search())
        for gpa, contents in zip(self._given, self._vm.ram.read_many(self._given, TIME_INFO.size), strict=True):
            if not is_legal(time_info(contents)._replace(version=0)):
                raise ConfigError(
                    f"there is no pvclock page at {gpa:#x}; without --page the guest's memory is searched"
                )
        return PagesFound(self._given, "as given")

    def take(self, poll: Poll, *, is_lost: bool) -> PagesFound | None:
        """Take a poll of `places`; the pages if they are others than was thought, or come again where they were.

        is_lost: a page holds no line any more.
        """
        infos = {gpa: info for gpa, info in zip(self.places, poll.pages, strict=True) if info is not None}
        is_reset = any(event.kind is VmEventKind.RESET for event in poll.events)
        if is_reset:
            self._old = {**infos, **self._seen}
        if is_reset or is_lost:
            self.is_searching, self._pause_s, self._next_s = True, PAUSE_S, time.monotonic() + PAUSE_S
        self._seen |= infos
        self._forget_changed(infos)
        if self._choice is not None:
            first = self._choice.versions
            before, self._choice = self.pages, self._choice.after(poll.pages)
            self._has_moved |= any(infos[gpa].version != first[gpa] for gpa in before if gpa in infos and gpa in first)
            if self.pages != before:
                self._has_moved = True
                return PagesFound(self.pages, "another place than was thought: the versions there move")
        if self.is_searching and all(_is_new(gpa, infos.get(gpa), self._old) for gpa in self.pages):
            self.is_searching = False
            return PagesFound(self.pages, "in the same places as before")
        return None

    def search_if_due(self) -> PagesFound | None:
        """Search again if that may find more, and the last search is long enough ago; the pages if they are others."""
        if self._given or (self.is_sure and not self.is_searching) or time.monotonic() < self._next_s:
            return None
        try:
            found = self._without_old(self._search())
        except PagesNotFound:
            found = None
        if found is None or (found.pages == self.pages and not self.is_searching):
            return None
        return self._take(found)

    # Inside

    def _forget_changed(self, infos: Mapping[Gpa, TimeInfo]) -> None:
        """Whatever is seen of these places that is not what was there: no page there is an old one any more."""
        for gpa in self._old.keys() & set(self.places):
            if gpa not in infos or not _is_same(infos[gpa], self._old[gpa]):
                del self._old[gpa]

    def _search(self) -> FoundPages:
        begin_s = time.monotonic()
        offsets = [offset for offset in self._vm.tsc_offsets() if offset is not None]
        newest = GuestTsc(max((read_tsc() + offset) & U64_MASK for offset in offsets)) if offsets else None
        try:
            return find_pages(self._vm.ram, self._vm.vcpus, self._terms._replace(newest_tsc=newest), self._progress)
        finally:
            took_s = time.monotonic() - begin_s
            self._next_s = begin_s + took_s + max(self._pause_s, SEARCH_SHARE * took_s)
            self._pause_s = min(2 * self._pause_s, PAUSE_MAX_S)

    def _without_old(self, found: FoundPages) -> FoundPages | None:
        """The sets that are not just what was there before the reset; None if there are no others."""
        places = [gpa for each in found.sets for gpa in each]
        contents = self._vm.ram.read_many(places, TIME_INFO.size)
        infos = {gpa: time_info(data) for gpa, data in zip(places, contents, strict=True)}
        sets = tuple(each for each in found.sets if any(_is_new(gpa, infos[gpa], self._old) for gpa in each))
        return found._replace(sets=sets, pages=sets[0]) if sets else None

    def _take(self, found: FoundPages) -> PagesFound:
        self._choice = PageChoice.of(found, self._terms)
        self.is_searching, self._has_moved, self._pause_s = False, False, PAUSE_S
        return PagesFound(found.pages, found.why, found.searched_bytes, found.seconds)


def _is_new(gpa: Gpa, info: TimeInfo | None, old: Mapping[Gpa, TimeInfo]) -> bool:
    """Does a page lie there that is not just left from before?"""
    return info is not None and is_legal(info) and not (gpa in old and _is_same(info, old[gpa]))


def _is_same(one: TimeInfo, other: TimeInfo) -> bool:
    """But for the flags, which a guest clears."""
    return one[:5] == other[:5]
