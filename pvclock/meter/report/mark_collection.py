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
    """Collects marks in the order of their x.  Past MARKS_OF_A_KIND_MAX of a kind, every two neighbours become one."""

    def __init__(self) -> None:
        self._kinds: dict[str, list[Mark]] = {}

    def add(self, mark: Mark) -> None:
        """Take a mark."""
        if mark.kind not in self._kinds and len(self._kinds) >= KINDS_MAX:
            mark = mark._replace(kind="other")
        kept = self._kinds.setdefault(mark.kind, [])
        kept.append(mark)
        if len(kept) > MARKS_OF_A_KIND_MAX:
            self._kinds[mark.kind] = _halved(kept)

    def marks(self) -> tuple[Mark, ...]:
        """As many as a page draws, by x: of the kinds that have most, neighbours are merged."""
        kinds = dict(self._kinds)
        while sum(map(len, kinds.values())) > MARKS_MAX:
            most = max(kinds, key=lambda kind: len(kinds[kind]))
            kinds[most] = _halved(kinds[most])
        return tuple(sorted(chain.from_iterable(kinds.values()), key=lambda mark: mark.x))


def _halved(marks: list[Mark]) -> list[Mark]:
    """Every two neighbours as the greater of them, which stands for both."""
    merged = [
        max(one, other, key=_weight)._replace(stands_for=one.stands_for + other.stands_for)
        for one, other in zip(marks[::2], marks[1::2], strict=False)
    ]
    return merged + marks[len(marks) & ~1 :]


def _weight(mark: Mark) -> tuple[int, float]:
    """What is bad is told before what is great."""
    return WEIGHTS[mark.standing], mark.size
