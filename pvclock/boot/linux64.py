"""Linux's 64-bit boot protocol for an uncompressed kernel (vmlinux), as microVM monitors enter one.

Other than a bzImage such a file has no setup header, so that of boot_params is made up, as Firecracker and crosvm do;
the entry is the ELF file's.
"""

from __future__ import annotations

import struct
from typing import Final

from pvclock._memory import GuestMemory
from pvclock.boot import elf
from pvclock.boot.boot_params import (
    MAPPED_END,
    SETUP_HEADER_AT,
    TOLD_BYTES,
    boot_params,
    information,
    long_mode,
    params_at,
)
from pvclock.boot.entry import EntryState
from pvclock.boot.information import BootInformation, command_line
from pvclock.boot.placement import place, write
from pvclock.boot.segments import Segment, check_segments
from pvclock.errors import ImageError

__all__ = ["load"]

# Offsets in boot_params; the setup header ends behind the last one.
BOOT_FLAG_AT: Final = 0x1FE
HEADER_MAGIC_AT: Final = 0x202
KERNEL_ALIGNMENT_AT: Final = 0x230
CMDLINE_BYTES_AT: Final = 0x238
SETUP_HEADER_END: Final = 0x23C

BOOT_FLAG: Final = 0xAA55
HEADER_MAGIC: Final = int.from_bytes(b"HdrS", "little")
KERNEL_ALIGNMENT: Final = 16 << 20


def load(memory: GuestMemory, image: bytes, told: BootInformation) -> EntryState:
    """Load a 64-bit ELF file, boot_params, page tables and GDT; ImageError, with memory untouched, if it cannot be."""
    executable = elf.parse(image)
    if executable.bits != 64:
        raise ImageError("a 32-bit ELF file; Linux's 64-bit protocol enters 64-bit ones")
    cmdline = command_line(told.cmdline)
    _check_mapped(executable.segments)
    check_segments(memory.slots, executable.segments, executable.entry, told.firmware.reserved)
    taken = (segment.addresses for segment in executable.segments)
    layout = place(memory, taken, told, length=TOLD_BYTES, end=MAPPED_END)
    params = boot_params(layout, _setup_header(len(cmdline)), told.firmware.rsdp)
    write(memory, executable.segments, layout, told.modules, information(layout, cmdline, params))
    return EntryState(long_mode(layout), executable.entry, {"rsi": params_at(layout)})


def _check_mapped(segments: list[Segment]) -> None:
    for segment in segments:
        if segment.end > MAPPED_END:
            raise ImageError(f"segment {segment.range} is beyond the first GiB, which alone is mapped at the entry")


def _setup_header(cmdline_bytes: int) -> bytes:
    params = bytearray(SETUP_HEADER_END)
    struct.pack_into("<H", params, BOOT_FLAG_AT, BOOT_FLAG)
    struct.pack_into("<I", params, HEADER_MAGIC_AT, HEADER_MAGIC)
    struct.pack_into("<I", params, KERNEL_ALIGNMENT_AT, KERNEL_ALIGNMENT)
    struct.pack_into("<I", params, CMDLINE_BYTES_AT, cmdline_bytes)
    return bytes(params[SETUP_HEADER_AT:])
