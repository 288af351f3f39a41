"""Which of several sets of places are a VM's pages, where a search cannot tell: those whose versions move.

An undisturbed page never changes, so that is known only once something has happened to the guest's clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from types import MappingProxyType
from typing import Final, NamedTuple

from pvclock.meter.watch.page_search import FoundPages, SearchTerms, is_legal
from pvclock.quantities import Gpa
from pvclock.readings import TimeInfo

__all__ = ["PageChoice"]

NONE_SEEN: Final[Mapping[Gpa, int]] = MappingProxyType({})


class PageChoice(NamedTuple):
    """What is known of that so far; a watch keeps the newest one.

        choice = PageChoice.of(found, terms)
        while ...:
            poll = take_poll(vm, choice.places)
            ...  # poll.pages[:len(choice.pages)] are those of vCPU 0, 1, ...
            choice = choice.after(poll.pages)  # where its `pages` are others, these are the VM's, and were all along

    sets: those that it can be, the likeliest first.  versions: of each place, as it was first seen.
    """

    sets: tuple[tuple[Gpa, ...], ...]
    terms: SearchTerms
    versions: Mapping[Gpa, int] = NONE_SEEN

    @classmethod
    def of(cls, found: FoundPages, terms: SearchTerms) -> PageChoice:
        """What a search has found, with the terms that it had."""
        return cls(found.sets, terms._replace(newest_tsc=None))  # a later line is newer

    @property
    def pages(self) -> tuple[Gpa, ...]:
        """The pages of vCPU 0, 1, ..., as far as is known."""
        return self.sets[0]

    @property
    def places(self) -> tuple[Gpa, ...]:
        """What is to be polled: `pages`, and then all other places that it can be."""
        return tuple(gpa for each in self.sets for gpa in each)

    @property
    def is_settled(self) -> bool:
        """Is there nothing left to choose from?"""
        return len(self.sets) == 1

    def after(self, seen: Sequence[TimeInfo | None]) -> PageChoice:
        """The choice after a poll of `places`, each as it was seen; None does not count.

        Where a version of `pages` has moved they are live, and there is no choice left.  Another set takes their place
        if one of its versions has moved to a line newer than theirs: a copy that the guest keeps of its pages moves,
        too, but after them.  A set of which a place holds something else by now is none.
        """
        infos = {gpa: info for gpa, info in zip(self.places, seen, strict=True) if info is not None}
        moved = {gpa: info for gpa, info in infos.items() if self.versions.get(gpa, info.version) != info.version}
        live = {gpa: info for gpa, info in moved.items() if is_legal(info, self.terms)}
        first_seen = {gpa: info.version for gpa, info in infos.items()}
        sets = self._sets_after(infos, live, moved.keys() - live.keys())
        return self._replace(sets=sets, versions={**first_seen, **self.versions})

    def _sets_after(
        self, infos: Mapping[Gpa, TimeInfo], live: Mapping[Gpa, TimeInfo], gone: AbstractSet[Gpa]
    ) -> tuple[tuple[Gpa, ...], ...]:
        if not live.keys().isdisjoint(self.pages):
            return (self.pages,)
        others = tuple(each for each in self.sets[1:] if gone.isdisjoint(each))
        if infos.keys() >= set(self.pages):
            newest = _newest_tsc(infos, [gpa for gpa in self.pages if gpa not in gone])
            better = tuple(each for each in others if _newest_tsc(live, each) > newest)
            if better:
                return better
        return (self.pages, *others)


def _newest_tsc(infos: Mapping[Gpa, TimeInfo], places: Iterable[Gpa]) -> int:
    """The newest tsc_timestamp of the places that are there; 0 if none is."""
    return max((infos[gpa].tsc_timestamp for gpa in places if gpa in infos), default=0)
