"""Numbers of a saved state, checked when they are loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pvclock.errors import ConfigError
from pvclock.quantities import U64_MASK

__all__ = ["saved_numbers"]


def saved_numbers(
    saved: Mapping[str, object], name: str, count: int | None, is_legal: Callable[[int], bool] = lambda _: True
) -> list[int]:
    """The numbers that are saved as `name`, `count` of them (None: any number of them); ConfigError for anything else.

    is_legal: which of the numbers from 0 to 2^64 - 1 can be among them.
    """
    found = saved[name]
    numbers = list(found) if isinstance(found, tuple | list) else []
    sound = [each for each in numbers if type(each) is int and 0 <= each <= U64_MASK and is_legal(each)]
    if not isinstance(found, tuple | list) or len(sound) != len(numbers) or count not in (None, len(numbers)):
        many = "" if count is None else f"{count} "
        raise ConfigError(
            f"provider 'HyperV', {name!r}: {found!r:.100} was found; it is {many}whole numbers from 0 to 2^64-1 that a "
            "guest could have written"
        )
    return sound
