"""Every guest-physical address that pvclock chooses, with its reason."""

from __future__ import annotations

from typing import Final

__all__ = [
    "FLAT_BASE",
    "IDENTITY_MAP",
    "IOAPIC",
    "LOCAL_APIC",
    "MULTIBOOT_CMDLINE",
    "MULTIBOOT_CMDLINE_BYTES",
    "MULTIBOOT_INFO",
    "PROBE_CODE",
    "PROBE_RESULT",
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

IOAPIC: Final = 0xFEC00000
"""One page, where a PC's is; KVM's own."""

LOCAL_APIC: Final = 0xFEE00000
"""One page, each vCPU's own, where x86 has it after reset."""

PROBE_CODE: Final = 0x1000
"""kvm/probe_vm.py: the second page, above the real-mode vectors."""

PROBE_RESULT: Final = 0x2000
"""kvm/probe_vm.py: where its guest stores what it saw."""
