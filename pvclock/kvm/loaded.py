"""Which KVM has this host loaded?  What was found out about it holds until its module is loaded again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, Generic, TypeVar

__all__ = ["FoundOnce", "loaded_kvm"]

DEVICE: Final = Path("/sys/devices/virtual/misc/kvm")

T = TypeVar("T")


def loaded_kvm() -> int | None:
    """A number that the kernel gives anew whenever KVM is loaded; None where there is no sysfs to tell it."""
    try:
        return DEVICE.stat().st_ino
    except OSError:
        return None


class FoundOnce(Generic[T]):
    """A fact of the loaded KVM that is slow to find: kept for the process while that KVM is the same.

    Thread-safety: two threads may both find it.
    """

    def __init__(self) -> None:
        self._found: tuple[int, T] | None = None

    def get(self, find: Callable[[], T]) -> T:
        """The fact, by find() if it is not known yet."""
        loaded = loaded_kvm()
        if loaded is None:
            return find()
        if self._found is None or self._found[0] != loaded:
            self._found = loaded, find()
        return self._found[1]
