"""Every guest-physical address that pvclock chooses, with its reason."""

from __future__ import annotations

from typing import Final

__all__ = [
    "FLAT_BASE",
    "IDENTITY_MAP",
    "MULTIBOOT_CMDLINE",
    "MULTIBOOT_CMDLINE_BYTES",
    "MULTIBOOT_INFO",
    "RAM_END",
    "TSS",
]

FLAT_BASE: Final = 0x7C00
"""Where a PC's firmware puts a boot sector."""

MULTIBOOT_INFO: Final = 0x9000
"""Above the real-mode vectors and a trampoline at 0x8000, below what images load at (1 MiB)."""

MULTIBOOT_CMDLINE: Final = 0x9100
"""Behind the information structure and its memory map."""

MULTIBOOT_CMDLINE_BYTES: Final = 0x0F00
"""Up to the end of that page, the final NUL included."""

RAM_END: Final = 0xC0000000
"""RAM ends here at the latest: above are the IOAPIC, the LAPICs and the pages below."""

IDENTITY_MAP: Final = 0xFFFBC000
"""One page that VMX needs for real mode: below the firmware area, where no RAM of ours is."""

TSS: Final = 0xFFFBD000
"""Three pages that VMX needs for real mode, behind the identity map."""
