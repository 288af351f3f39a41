"""Ranges of MSRs whose accesses a clock, or its provider, serves; KVM's MSR filter is made from them."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["MsrRange"]


class MsrRange(NamedTuple):
    """The clock serves reads, writes or both of MSRs [base, base + length), except `kept`, which the kernel serves.

    why: what these MSRs are, for human readers.
    """

    base: int
    length: int
    reads: bool = True
    writes: bool = True
    kept: tuple[int, ...] = ()
    why: str = ""
