"""Numbers of a saved state, checked when they are loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NoReturn, TypeGuard

from pvclock.errors import ConfigError
from pvclock.quantities import U64_MASK

__all__ = ["saved_number", "saved_numbers"]


def saved_number(saved: Mapping[str, object], name: str, is_legal: Callable[[int], bool] = lambda _: True) -> int:
    """The number that is saved as `name`; ConfigError for anything else.

    is_legal: which of the numbers from 0 to 2^64 - 1 it can be.
    """
    found = saved[name]
    if not _is_number(found, is_legal):
        _refuse(name, found, "a whole number")
    return found


def saved_numbers(
    saved: Mapping[str, object], name: str, count: int | None, is_legal: Callable[[int], bool] = lambda _: True
) -> list[int]:
    """As saved_number(), the numbers that are saved as `name`: `count` of them, or with None any number of them."""
    found = saved[name]
    numbers = list(found) if isinstance(found, tuple | list) else []
    sound = [each for each in numbers if _is_number(each, is_legal)]
    if not isinstance(found, tuple | list) or len(sound) != len(numbers) or count not in (None, len(numbers)):
        _refuse(name, found, "whole numbers" if count is None else f"{count} whole numbers")
    return sound


def _is_number(value: object, is_legal: Callable[[int], bool]) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= U64_MASK and is_legal(value)


def _refuse(name: str, found: object, what: str) -> NoReturn:
    raise ConfigError(
        f"provider 'HyperV', {name!r}: {found!r:.100} was found; it is {what} from 0 to 2^64-1 that a guest could have "
        "written"
    )
