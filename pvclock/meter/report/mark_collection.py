"""The marks of a long record, kept in bounded memory: alike neighbours are merged, and the greatest of them is told.

Alike are those of one kind and standing: what is bad hides nothing that is great, nor the other way round.
"""

from __future__ import annotations

from itertools import chain
from typing import Final

from pvclock.meter.report.model import MARKS_MAX, Mark, Standing

__all__ = ["MARKS_ALIKE_MAX", "MarkCollection"]

MARKS_ALIKE_MAX: Final = 2000
"""More than a page draws of all kinds, so what is merged here is closer than a page could show."""

KINDS_MAX: Final = 40
"""We have some 30; a file may name any number."""


class MarkCollection:
    """Collects marks in the order of their x; past MARKS_ALIKE_MAX that are alike, each stands for equally many."""

    def __init__(self) -> None:
        self._kinds: set[str] = set()
        self._alike: dict[tuple[str, Standing], _Alike] = {}
        self._count = 0

    def add(self, mark: Mark) -> None:
        """Take a mark."""
        if mark.kind not in self._kinds and len(self._kinds) >= KINDS_MAX:
            mark = mark._replace(kind="other")
        self._kinds.add(mark.kind)
        self._alike.setdefault((mark.kind, mark.standing), _Alike()).add(mark)
        self._count += 1

    def marks(self) -> tuple[Mark, ...]:
        """As many as a page draws, by x: where there are most that are alike, neighbours are merged."""
        alike = [each.marks() for each in self._alike.values()]
        while sum(map(len, alike)) > MARKS_MAX:
            most = max(range(len(alike)), key=lambda place: len(alike[place]))
            alike[most] = _halved(alike[most])
        return tuple(sorted(chain.from_iterable(alike), key=lambda mark: mark.x))

    def note(self) -> str:
        """What was merged, in a sentence; empty if nothing was."""
        shown = len(self.marks())
        if shown == self._count:
            return ""
        return f"{self._count:,} marks are drawn as {shown:,}: of neighbours that are alike, the greatest is shown."


class _Alike:
    """Marks that are alike, each the greatest of `share` that followed each other; the last one may stand for fewer."""

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
        if len(self._kept) >= MARKS_ALIKE_MAX:
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
    return max(one, other, key=lambda mark: mark.size)._replace(stands_for=one.stands_for + other.stands_for)
