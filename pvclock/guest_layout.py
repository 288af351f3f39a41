"""Every guest-physical address that pvclock chooses, with its reason."""

from __future__ import annotations

from typing import Final

__all__ = [
    "ACPI_TABLES",
    "BOOT_CMDLINE",
    "BOOT_CMDLINE_BYTES",
    "BOOT_INFORMATION",
    "FIRMWARE_AREA",
    "FLAT_BASE",
    "IDENTITY_MAP",
    "IOAPIC",
    "LINUX_BOOT_PARAMS",
    "LINUX_PAGE_TABLES",
    "LINUX_PAGE_TABLES_BYTES",
    "LOCAL_APIC",
    "PROBE_CODE",
    "PROBE_RESULT",
    "RAM_END",
    "RESET_VECTOR",
    "TSS",
]

FLAT_BASE: Final = 0x7C00
"""Where a PC's firmware puts a boot sector."""

BOOT_INFORMATION: Final = 0x9000
"""What an image is told: above the real-mode vectors and a trampoline at 0x8000, below what images load at (1 MiB).

Where an image lies there itself, it is told on the first free pages above, all in the same order.
"""

BOOT_CMDLINE: Final = 0x9100
"""Behind the information structure and its memory map."""

BOOT_CMDLINE_BYTES: Final = 0x0F00
"""Up to the end of that page, the final NUL included."""

LINUX_BOOT_PARAMS: Final = 0xA000
"""One page, the "zero page" of Linux's 64-bit protocol, behind the page above; its GDT is in that one."""

LINUX_PAGE_TABLES: Final = 0xB000
"""An image that is entered in long mode has paging on: a table of each level, behind one another."""

LINUX_PAGE_TABLES_BYTES: Final = 0x3000
"""PML4, PDPT and a directory of 2 MiB pages."""

FIRMWARE_AREA: Final = range(0xA0000, 0x100000)
"""A PC's video memory and firmware, which a kernel takes for no RAM whatever a memory map says."""

ACPI_TABLES: Final = 0xE0000
"""Where a PC's firmware puts the RSDP, which those look for that are not told; the tables follow it."""

RESET_VECTOR: Final = 0xFFFF0
"""0xf000:0xfff0, where a kernel in real mode jumps to have a PC's firmware reset it."""

RAM_END: Final = 0xC0000000
"""RAM ends here at the latest: above are the IOAPIC, the LAPICs and the pages below."""

IDENTITY_MAP: Final = 0xFFFBC000
"""One page that VMX needs for real mode: below the firmware area, where no RAM of ours is."""

TSS: Final = 0xFFFBD000
"""Three pages that VMX needs for real mode, behind the identity map."""

IOAPIC: Final = 0xFEC00000
"""One page, where a PC's is; KVM's own."""

LOCAL_APIC: Final = 0xFEE00000
"""One page, each vCPU's own, where x86 has it after reset."""

PROBE_CODE: Final = 0x1000
"""kvm/probe_vm.py: the second page, above the real-mode vectors."""

PROBE_RESULT: Final = 0x2000
"""kvm/probe_vm.py: where its guest stores what it saw."""
