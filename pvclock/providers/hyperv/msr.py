"""How the parts of this provider serve their MSRs, and are saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from pvclock.providers.hyperv.features import Privilege
from pvclock.providers.interface import MsrValue

__all__ = ["Msr", "Part"]


class Msr(NamedTuple):
    """One MSR: the privilege that offers it (leaf 0x40000003), and how an access is served; None is #GP.

    read: (vcpu) to the 64-bit value.  write: (vcpu, value).  Both may raise MsrFault.
    """

    privilege: Privilege
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
