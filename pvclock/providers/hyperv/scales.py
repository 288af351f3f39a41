"""What a guest makes of its TSC's frequency: the scale of a reference TSC page, and VirtualBox's two of them.

A page's scale is units of 100 ns a tick in 2^-64, 64 bits: there is none for a TSC of 10 MHz or less.
"""

from __future__ import annotations

from typing import Final

from pvclock._scale import ClockScale, fixed_rate
from pvclock.quantities import NS_PER_S, U64_MASK

__all__ = ["UNITS_PER_S", "UNIT_NS", "kvm_scale", "page_scale", "virtualbox_scale", "virtualbox_ticks_per_unit"]

UNIT_NS: Final = 100
UNITS_PER_S: Final = NS_PER_S // UNIT_NS
UNITS_PER_MS: Final = UNITS_PER_S // 1000


def page_scale(hz: int) -> int | None:
    """The engine's scale of a TSC of `hz`, the nearest there is; None if no page can show it."""
    scale = fixed_rate(NS_PER_S, hz, UNIT_NS)
    return scale if scale <= U64_MASK else None


def kvm_scale(pair: ClockScale) -> int | None:
    """The scale that KVM makes of kvmclock's pair, whose rate it shows; None where it makes none.

    Source: Linux compute_tsc_page_parameters().
    """
    scale = (pair.mul << pair.shift + 96) // (UNIT_NS << 64)  # shifted left, for a shift may be below -32
    return scale if scale <= U64_MASK else None


def virtualbox_scale(hz: int) -> int:
    """The scale that VirtualBox makes of whole kHz: the low 32 bits are 0 (H-52), and all of them up to 10 MHz."""
    return (UNITS_PER_MS << 32) // max(hz // 1000, 1) << 32 & U64_MASK


def virtualbox_ticks_per_unit(hz: int) -> int:
    """By what VirtualBox divides the TSC for its counter: whole ticks (H-35); 1 where it would divide by 0."""
    return max(hz // UNITS_PER_S, 1)
