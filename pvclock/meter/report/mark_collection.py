"""The marks of a long record, kept in bounded memory: neighbours of one kind are merged, and the greatest told."""

from __future__ import annotations

from itertools import chain
from typing import Final

from pvclock.meter.report.model import Mark

__all__ = ["MARKS_OF_A_KIND_MAX", "MarkCollection"]

MARKS_OF_A_KIND_MAX: Final = 2000
"""More than a page draws of all kinds, so what is merged here is closer than a page could show."""

KINDS_MAX: Final = 40
"""We have some 30; a file may name any number."""


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
            pairs = zip(kept[::2], kept[1::2], strict=False)
            self._kinds[mark.kind] = [_merged(*pair) for pair in pairs] + kept[len(kept) & ~1 :]

    def marks(self) -> tuple[Mark, ...]:
        """All that are kept, by x."""
        return tuple(sorted(chain.from_iterable(self._kinds.values()), key=lambda mark: mark.x))


def _merged(one: Mark, other: Mark) -> Mark:
    """The greater of two, for both; a span reaches over both."""
    greater = other if other.size > one.size else one
    ends = [mark.until for mark in (one, other) if mark.until is not None]
    is_span = greater.until is not None
    return greater._replace(
        x=min(one.x, other.x) if is_span else greater.x,
        until=max(ends) if is_span else None,
        stands_for=one.stands_for + other.stands_for,
    )
