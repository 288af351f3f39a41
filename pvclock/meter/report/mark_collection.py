"""The marks of a long record, kept in bounded memory: neighbours of one kind are merged, and the greatest told."""

from __future__ import annotations

from itertools import chain
from typing import Final

from pvclock.meter.report.model import MARKS_MAX, Mark, Standing

__all__ = ["MARKS_OF_A_KIND_MAX", "MarkCollection"]

MARKS_OF_A_KIND_MAX: Final = 2000
"""More than a page draws of all kinds, so what is merged here is closer than a page could show."""

KINDS_MAX: Final = 40
"""We have some 30; a file may name any number."""

WEIGHTS: Final = {Standing.BAD: 2, Standing.OPEN: 1, Standing.GOOD: 0, Standing.PLAIN: 0}


class MarkCollection:
    """Collects marks in the order of their x; past MARKS_OF_A_KIND_MAX of a kind, each stands for equally many."""

    def __init__(self) -> None:
        self._kinds: dict[str, _Kind] = {}

    def add(self, mark: Mark) -> None:
        """Take a mark."""
        if mark.kind not in self._kinds and len(self._kinds) >= KINDS_MAX:
            mark = mark._replace(kind="other")
        kind = self._kinds.get(mark.kind)
        if kind is None:
            kind = self._kinds[mark.kind] = _Kind()
        kind.add(mark)

    def marks(self) -> tuple[Mark, ...]:
        """As many as a page draws, by x: of the kinds that have most, neighbours are merged."""
        kinds = {name: kind.marks() for name, kind in self._kinds.items()}
        while sum(map(len, kinds.values())) > MARKS_MAX:
            most = max(kinds, key=lambda name: len(kinds[name]))
            kinds[most] = _halved(kinds[most])
        return tuple(sorted(chain.from_iterable(kinds.values()), key=lambda mark: mark.x))


class _Kind:
    """Marks of one kind, each the greatest of `share` that followed each other; the last one may stand for fewer."""

    def __init__(self) -> None:
        self._kept: list[Mark] = []
        self._share = 1
        self._open: Mark | None = None

    def add(self, mark: Mark) -> None:
        """Take a mark."""
        mark = mark if self._open is None else _merged(self._open, mark)
        if mark.stands_for < self._share:
            self._open = mark
            return
        self._open = None
        self._kept.append(mark)
        if len(self._kept) >= MARKS_OF_A_KIND_MAX:
            self._kept = _halved(self._kept)
            self._share *= 2

    def marks(self) -> list[Mark]:
        """All that are kept."""
        return self._kept + ([] if self._open is None else [self._open])


def _halved(marks: list[Mark]) -> list[Mark]:
    """Every two neighbours as one."""
    return [_merged(*pair) for pair in zip(marks[::2], marks[1::2], strict=False)] + marks[len(marks) & ~1 :]


def _merged(one: Mark, other: Mark) -> Mark:
    """The greater of two, which stands for both."""
    return max(one, other, key=_weight)._replace(stands_for=one.stands_for + other.stands_for)


def _weight(mark: Mark) -> tuple[int, float]:
    """What is bad is told before what is great."""
    return WEIGHTS[mark.standing], mark.size
