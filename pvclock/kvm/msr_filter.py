"""Which of the guest's MSR accesses come to the engine, and which the kernel keeps.

The kernel keeps PV EOI (only its LAPIC can serve it), poll control, the TSC deadline (its fast path passes by the
filter) and reads of the TSC.  Reads of TSC_ADJUST come to the engine: it holds the value, the kernel never sees a
write.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

__all__ = ["ENGINE_MSRS", "FilterRange", "filter_ranges"]

READ: Final = 1  # KVM_MSR_FILTER_READ
WRITE: Final = 2  # KVM_MSR_FILTER_WRITE


class FilterRange(NamedTuple):
    """MSRs [base, base + length) whose accesses of the kinds in `flags` come to user space, but for `kept`."""

    flags: int
    base: int
    length: int
    kept: tuple[int, ...]
    why: str


ENGINE_MSRS: Final = (
    FilterRange(WRITE, 0x10, 1, (), "IA32_TSC: the engine knows the offset, or says that the host has none"),
    FilterRange(READ | WRITE, 0x3B, 1, (), "IA32_TSC_ADJUST: part of that offset"),
    FilterRange(READ | WRITE, 0x11, 2, (), "the old wall-clock and system-time MSRs"),
    FilterRange(READ | WRITE, 0x4B564D00, 0x100, (0x4B564D04, 0x4B564D05), "KVM's own MSRs"),
)


def filter_ranges(ranges: Iterable[FilterRange] = ENGINE_MSRS) -> list[tuple[int, int, int, bytes]]:
    """The ranges as Vm.set_msr_filter() takes them: (flags, base, length, bitmap), bit n for MSR base + n."""
    return [(each.flags, each.base, each.length, _bitmap(each)) for each in ranges]


def _bitmap(each: FilterRange) -> bytes:
    allowed = sum(1 << index - each.base for index in each.kept)
    return allowed.to_bytes((each.length + 7) // 8, "little")
