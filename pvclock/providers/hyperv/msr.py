"""How the parts of this provider serve their MSRs, are saved, and tell of what is due."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

from pvclock.providers.hyperv.features import Feature, Privilege
from pvclock.providers.interface import MsrValue

__all__ = ["Msr", "Part", "TimedPart"]


class Msr(NamedTuple):
    """One MSR: the privilege or feature that offers it (leaf 0x40000003), and how an access is served; None is #GP.

    read: (vcpu) to the 64-bit value.  write: (vcpu, value).  Both may raise MsrFault.
    """

    privilege: Privilege | Feature
    read: Callable[[int], int] | None = None
    write: Callable[[int, int], object] | None = None


class Part(Protocol):
    """A part of the provider: some MSRs, and the state behind them."""

    @property
    def msrs(self) -> Mapping[int, Msr]:
        """Its MSRs by index."""

    def reset(self) -> None:
        """Set the initial state."""

    def save(self) -> Mapping[str, MsrValue]:
        """Its state by name, as plain data; names that no other part has."""

    def checked(self, saved: Mapping[str, object]) -> Callable[[], None]:
        """A function that adopts what save() returned, and cannot fail; ConfigError for anything else.

        saved: exactly the names that save() has.
        """


@runtime_checkable
class TimedPart(Protocol):
    """A part with something that gets due, see Hooks; the provider asks it with the clock's lock held."""

    def next_due_ns(self) -> int | None:
        """Guest time in ns at which the next thing is due, possibly in the past; None: nothing is."""

    def expire(self, now_ns: int) -> Callable[[], object] | None:
        """Take what is due; returns what delivers it, to be called without the clock's lock."""
