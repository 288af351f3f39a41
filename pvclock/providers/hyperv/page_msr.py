"""The MSRs by which a guest places a page of 4096 bytes: bit 0 enables it, bits 12 to 63 are its address.

Source: TLFS, of the hypercall page, the reference TSC page, the APIC's assist page and the SynIC's two.
"""

from __future__ import annotations

from typing import Final

from pvclock.quantities import U64_MASK, Gpa

__all__ = ["PAGE_ADDRESS", "PAGE_BYTES", "PAGE_ENABLED", "page_of"]

PAGE_ENABLED: Final = 1
PAGE_BYTES: Final = 4096
PAGE_ADDRESS: Final = U64_MASK & ~(PAGE_BYTES - 1)


def page_of(value: int) -> Gpa | None:
    """The page that a value of such an MSR enables; None if it disables it."""
    return Gpa(value & PAGE_ADDRESS) if value & PAGE_ENABLED else None
