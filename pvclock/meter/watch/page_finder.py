"""Where the pages of a watched VM are: as they were given, or by searches, again after a reset and for lost pages."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Final, NamedTuple

from pvclock._counter import read_tsc
from pvclock.errors import ConfigError
from pvclock.meter.findings import TIME_INFO, time_info
from pvclock.meter.watch.due_move import DueMove
from pvclock.meter.watch.paced_search import PacedSearch
from pvclock.meter.watch.page_choice import PageChoice
from pvclock.meter.watch.page_layout import Pages
from pvclock.meter.watch.page_search import FoundPages, SearchTerms, find_pages, is_legal, search_in_pieces
from pvclock.meter.watch.poll import Poll
from pvclock.meter.watch.vm import VmEventKind, WatchedVm
from pvclock.meter.watch.words import counted
from pvclock.quantities import U64_MASK, Gpa, GuestTsc
from pvclock.readings import TimeInfo

__all__ = ["PageFinder", "PagesFound", "Progress"]

Progress = Callable[[int, int], object]
"""Is told the bytes searched, and their total."""

SEARCHES_MAX: Final = 12
"""For what may never be there, such as the page of a vCPU that the guest leaves off: some minutes."""


class PagesFound(NamedTuple):
    """The pages that are watched from now on, vCPU 0's first; None: that vCPU has none, as far as is known.

    why: for people, how they were found.  searched_bytes, seconds: of the search, 0 if there was none.
    """

    pages: Pages
    why: str
    searched_bytes: int = 0
    seconds: float = 0.0


class PageFinder:
    """Finds the pages of `vm`; given: their addresses, if they are known, and then nothing is searched."""

    def __init__(self, vm: WatchedVm, host_tsc_hz: int, given: Sequence[Gpa], progress: Progress) -> None:
        if given and len(given) != vm.vcpus:
            raise ConfigError(
                f"{counted(len(given), 'page')} of {counted(vm.vcpus, 'vCPU')}; give each vCPU's, or none"
            )
        self.is_searching = False
        """Are those of before a reset, dead or lost, and others not found so far?"""
        self._vm, self._progress, self._given = vm, progress, tuple(given)
        self.terms = SearchTerms(vm.tsc_hz or host_tsc_hz)
        """What a page must show, whenever it was written."""
        self._choice: PageChoice | None = None
        self._due = DueMove()
        self._searches = PacedSearch(self._search)
        self._seen: dict[Gpa, TimeInfo] = {}
        self._old: dict[Gpa, TimeInfo] = {}  # what lies there from before a reset, as far as nothing else did since

    @property
    def pages(self) -> Pages:
        """The pages of vCPU 0, 1, ..., as far as is known."""
        if self._choice is None:
            return self._given + (None,) * (self._vm.vcpus - len(self._given))
        return self._choice.pages

    @property
    def places(self) -> tuple[Gpa, ...]:
        """What is to be polled: those of `pages`, and then other places that may turn out to be them."""
        return self._given if self._choice is None else self._choice.places

    @property
    def absent(self) -> frozenset[int]:
        """The vCPUs that have no page now: none is known, or it is one of before a reset."""
        return frozenset(vcpu for vcpu, gpa in enumerate(self.pages) if gpa is None or gpa in self._old)

    @property
    def is_amid_search(self) -> bool:
        """Is a search under way?"""
        return self._searches.is_under_way

    @property
    def searched_pieces(self) -> int:
        """How many pieces of the memory were searched between looks so far."""
        return self._searches.pieces

    @property
    def doubt(self) -> str | None:
        """Why `pages` may not be the guest's, for people; None if they are, by all that is known."""
        if self._due.is_open:
            return "the VM has gone on, or its TSC was written, and KVM has not written these pages anew so far"
        return self._doubt_of_places()

    def find(self) -> PagesFound:
        """Find the pages when the watch begins.  PagesNotFound, ConfigError; errors of the VM and its RAM."""
        if not self._given:
            found = find_pages(self._vm.ram, self._vm.vcpus, self._terms_now(), self._progress)
            self._searches.renew()
            return self._take(found)
        infos = [time_info(contents) for contents in self._vm.ram.read_many(self._given, TIME_INFO.size)]
        if self._vm.tsc_hz is None and infos[0].tsc_to_system_mul:
            self.terms = SearchTerms(max(infos[0].shown_khz * 1000, 1))  # whatever the guest's TSC is scaled to
        for gpa, info in zip(self._given, infos, strict=True):
            if not is_legal(info._replace(version=2), self.terms):  # it may be being written
                raise ConfigError(
                    f"there is no pvclock page at {gpa:#x}; without --page the guest's memory is searched"
                )
        return PagesFound(self.pages, "as given")

    def take(self, poll: Poll) -> PagesFound | None:
        """Take a poll of `places`; the pages if they are others than was thought, or come again where they were."""
        infos = {gpa: info for gpa, info in zip(self.places, poll.pages, strict=True) if info is not None}
        pages = [infos.get(gpa) if gpa is not None else None for gpa in self.pages]
        is_dead = self._due.take(pages, poll.tsc_offsets[0], poll.events, time.monotonic())
        is_reset = any(event.kind is VmEventKind.RESET for event in poll.events)
        if is_reset or (is_dead and not self.is_searching):
            self._seen = {**infos, **self._seen}
            self.lose(is_reset=True)
        self._seen |= infos
        self._forget_changed(infos)
        return self._chosen(infos) or self._come_again(infos)

    def lose(self, *, is_reset: bool = False) -> None:
        """A page holds no line any more, or the guest was reset, and what was seen is of before: search."""
        if is_reset:
            self._old = dict(self._seen)
            self._choice = self._choice and self._choice.anew()
        self.is_searching = True
        self._searches.renew()

    def search_on(self) -> PagesFound | None:
        """Search a piece more, if that may find more and it is time to; the pages if they are others."""
        if not self._may_find_more():
            self._searches.stop()
            return None
        found = self._searches.go_on()
        better = None if found is None else self._better(found)
        return None if better is None else self._take(better)

    # Inside

    def _doubt_of_places(self) -> str | None:
        if self._choice is None or self._choice.has_moved:
            return None
        if self._choice.rivals:
            others = ", ".join(f"{each.places[0]:#x}" for each in self._choice.rivals)
            return (
                f"what lies at {others} looks like Linux's pages, too, and none has moved so far: "
                "some may be those of the kernel before a reboot"
            )
        if not self._choice.sets[0].is_as_linuxs:
            return "what was watched may be a page that firmware left, for it does not lie as Linux's do"
        return None

    def _may_find_more(self) -> bool:
        if self._given or self.is_searching:
            return not self._given
        is_open = bool(self.absent) or self._doubt_of_places() is not None
        return is_open and self._searches.ended < SEARCHES_MAX

    def _forget_changed(self, infos: Mapping[Gpa, TimeInfo]) -> None:
        """Whatever is seen of these places that is not what was there: no page there is an old one any more."""
        for gpa in self._old.keys() & set(self.places):
            if gpa not in infos or not _is_same(infos[gpa], self._old[gpa]):
                del self._old[gpa]

    def _chosen(self, infos: Mapping[Gpa, TimeInfo]) -> PagesFound | None:
        """The pages if a move shows that they are others.  A place that comes anew after a reset has not moved."""
        if self._choice is None:
            return None
        seen = [None if gpa in self._old else infos.get(gpa) for gpa in self.places]
        before, self._choice = self.pages, self._choice.after(seen)
        if self.pages == before:
            return None
        self._due = DueMove()
        return PagesFound(self.pages, "another place than was thought: the versions there move")

    def _come_again(self, infos: Mapping[Gpa, TimeInfo]) -> PagesFound | None:
        first = self.places[0]
        if not self.is_searching or first in self._old or first not in infos or not is_legal(infos[first], self.terms):
            return None
        self.is_searching = False
        self._searches.renew()
        return PagesFound(self.pages, "in the same places as before")

    def _search(self) -> Generator[tuple[int, int], None, FoundPages]:
        return search_in_pieces(self._vm.ram, self._vm.vcpus, self._terms_now())

    def _terms_now(self) -> SearchTerms:
        offsets = [offset for offset in self._vm.tsc_offsets() if offset is not None]
        newest = GuestTsc(max((read_tsc() + offset) & U64_MASK for offset in offsets)) if offsets else None
        return self.terms._replace(newest_tsc=newest)

    def _better(self, found: FoundPages) -> FoundPages | None:
        """What was found without what is known to be none of it; None if that is what is known already.

        That is a set whose vCPU 0 has what was there before a reset, or another page than one that has moved.
        """
        contents = self._vm.ram.read_many([each.places[0] for each in found.sets], TIME_INFO.size)
        sets = [each for each, data in zip(found.sets, contents, strict=True) if self._is_new(each.places[0], data)]
        if not self.is_searching and self._choice is not None and self._choice.has_moved:
            sets = [each for each in sets if each.places[0] == self.places[0]]
        if not sets or (not self.is_searching and {*sets[0].places} <= {*self.pages}):
            return None
        return found._replace(sets=tuple(sets))

    def _is_new(self, gpa: Gpa, contents: bytes) -> bool:
        return gpa not in self._old or not _is_same(time_info(contents), self._old[gpa])

    def _take(self, found: FoundPages) -> PagesFound:
        is_same = self._choice is not None and self.places[0] == found.sets[0].places[0]
        has_moved = is_same and self._choice is not None and self._choice.has_moved
        self._choice = PageChoice.of(found, self.terms)._replace(has_moved=has_moved)
        self._due = DueMove()
        if self.is_searching:
            self._searches.renew()
        self.is_searching = False
        return PagesFound(found.pages, found.why, found.searched_bytes, found.seconds)


def _is_same(one: TimeInfo, other: TimeInfo) -> bool:
    """But for the flags, which a guest clears."""
    return one[:5] == other[:5]
