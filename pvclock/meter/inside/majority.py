"""Which CPUs may be named as those that are off: none on the word of a sum, of a tie or of a wide window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

__all__ = ["Outlier", "groups_of", "outliers"]

Differs = Callable[[int, int], bool]


class Outlier(NamedTuple):
    """CPUs that differ from a majority, on one side of it: 1: ahead of it, -1: behind."""

    cpus: tuple[int, ...]
    side: int
    majority: tuple[int, ...]


def groups_of(cpus: Sequence[int], differs: Differs) -> list[list[int]]:
    """CPUs of which no two are proven to differ, the largest group first."""
    groups: list[list[int]] = []
    for cpu in cpus:
        group = next((group for group in groups if not any(differs(cpu, other) for other in group)), None)
        if group is None:
            groups.append([cpu])
        else:
            group.append(cpu)
    return sorted(groups, key=len, reverse=True)


def outliers(cpus: int, side: Callable[[int, int], int], differs: Differs) -> list[Outlier]:
    """CPUs each of which was compared with more than half of all, and is on one side of them.

    Those must not be proven to differ from each other.  side(a, b): 1 or -1 where b was compared with a itself and is
    proven to be on that side of it; else 0.  CPUs that have one majority and do not differ are told together.
    """
    found: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for cpu in range(cpus):
        for way in (1, -1):
            apart = [other for other in range(cpus) if other != cpu and side(other, cpu) == way]
            if len(apart) * 2 > cpus and len(most := groups_of(apart, differs)[0]) * 2 > cpus:
                found.setdefault((way, tuple(most)), []).append(cpu)
    return [
        Outlier(tuple(group), way, most)
        for (way, most), odd in found.items()
        for group in sorted(groups_of(odd, differs))
    ]
