"""Which accesses to which MSRs, as a provider names them and as KVM's filter is told of them."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["MsrRange"]


class MsrRange(NamedTuple):
    """Reads, writes or both of MSRs [base, base + length) are the clock's to answer, but for `kept`, the kernel's.

    why: what these MSRs are, for people who read the list.
    """

    base: int
    length: int
    reads: bool = True
    writes: bool = True
    kept: tuple[int, ...] = ()
    why: str = ""
