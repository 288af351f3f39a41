"""Linux's 64-bit boot protocol for an uncompressed kernel (vmlinux), as microVM monitors enter one.

Other than a bzImage such a file has no setup header, so that of boot_params is made up, as Firecracker and crosvm do;
the entry is the ELF file's.
"""

from __future__ import annotations

import struct
from typing import Final

from pvclock._memory import GuestMemory
from pvclock.boot import elf
from pvclock.boot.boot_params import MAPPED_END, SETUP_HEADER_AT, TOLD_BYTES, boot_params, params_at, write_told
from pvclock.boot.entry import EntryState
from pvclock.boot.information import NO_FIRMWARE, Firmware, command_line, place_information, place_initrd
from pvclock.boot.segments import Segment, check_segments, write_segments
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


def load(
    memory: GuestMemory, image: bytes, cmdline: str = "", initrd: bytes = b"", firmware: Firmware = NO_FIRMWARE
) -> EntryState:
    """Load a 64-bit ELF file, boot_params, page tables and GDT; ImageError, with memory untouched, if it cannot be."""
    executable = elf.parse(image)
    if executable.bits != 64:
        raise ImageError("a 32-bit ELF file; Linux's 64-bit protocol enters 64-bit ones")
    text = command_line(cmdline)
    _check_mapped(executable.segments)
    check_segments(memory.slots, executable.segments, executable.entry, firmware.reserved)
    taken = [*(segment.addresses for segment in executable.segments), *firmware.reserved]
    told = place_information(memory.slots, taken, TOLD_BYTES, MAPPED_END)
    place = place_initrd(memory.slots, [*taken, told], len(initrd))
    params = boot_params(memory, _setup_header(len(text)), told, place, firmware)
    write_segments(memory, executable.segments)
    if place is not None:
        memory.write(place.start, initrd)
    return EntryState(write_told(memory, told, text, params), executable.entry, {"rsi": params_at(told)})


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
