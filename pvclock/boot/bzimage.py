"""Linux's own kernel file (bzImage), entered by the 64-bit boot protocol: its setup header says where it can go.

Source: Linux, Documentation/arch/x86/boot.rst.  The 16-bit part of the file, which asks a PC's BIOS, does not run.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from pvclock._memory import GuestMemory
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
from pvclock.boot.information import BootInformation, Firmware, command_line
from pvclock.boot.placement import place, write
from pvclock.boot.segments import Segment, overlaps
from pvclock.errors import ImageError

__all__ = ["is_bzimage", "load"]

# Offsets in the file, as boot.rst has them.
HEADER_LENGTH_AT: Final = 0x201
MAGIC_AT, MAGIC = 0x202, b"HdrS"
HEADER_END: Final = 0x264
"""Behind init_size, which protocol 2.10 brought."""

HEADER_END_MAX: Final = 0x290
"""There boot_params goes on with what is not the setup header's."""

VERSION_LEAST: Final = 0x20C
"""Protocol 2.12, of Linux 3.8: xloadflags says whether there is a 64-bit entry."""
LOADED_HIGH: Final = 1 << 0
KERNEL_64: Final = 1 << 0
ENTRY_64: Final = 0x200
"""From where the kernel was loaded."""
SECTOR_BYTES: Final = 512
PARAGRAPH_BYTES: Final = 16
LOWEST: Final = 1 << 20
"""What is loaded "high" goes above a PC's first MiB."""


class SetupHeader(NamedTuple):
    """The fields that a loader needs.

    setup_bytes: the 16-bit part's, with which the file begins; kernel_bytes: what follows it.  memory_bytes: what the
    kernel needs from its first address on, before it can look at a memory map.  initrd_end: the first address that an
    initrd may not reach.  raw: the whole header, for boot_params.
    """

    setup_bytes: int
    kernel_bytes: int
    memory_bytes: int
    is_relocatable: bool
    alignment: int
    preferred: int
    cmdline_bytes: int
    initrd_end: int
    raw: bytes


def is_bzimage(image: bytes) -> bool:
    """Has it the magic number of a setup header?"""
    return image[MAGIC_AT : MAGIC_AT + len(MAGIC)] == MAGIC


def load(memory: GuestMemory, image: bytes, told: BootInformation) -> EntryState:
    """Load a kernel, boot_params, page tables and GDT; ImageError, with memory untouched, if it cannot be.

    The kernel clears its own data, so nothing behind it is zeroed.
    """
    header = _parse(image)
    cmdline = command_line(told.cmdline, header.cmdline_bytes)
    kernel = _place_kernel(memory.slots, header, told.firmware)
    layout = place(memory, [kernel], told, length=TOLD_BYTES, end=MAPPED_END, modules_end=header.initrd_end)
    params = boot_params(layout, header.raw, told.firmware.rsdp)
    content = memoryview(image)[header.setup_bytes : header.setup_bytes + header.kernel_bytes]
    segments = [Segment(kernel.start, content, len(content))]
    write(memory, segments, layout, told.modules, information(layout, cmdline, params))
    return EntryState(long_mode(layout), kernel.start + ENTRY_64, {"rsi": params_at(layout)})


def _parse(image: bytes) -> SetupHeader:
    if not is_bzimage(image):
        raise ImageError(f"not a Linux kernel: a bzImage has {MAGIC.decode()!r} at {MAGIC_AT:#x}")
    if len(image) < HEADER_END:
        raise ImageError(f"a kernel that ends within its setup header: {len(image)} bytes")
    fields = _Fields(image)
    _check_enterable(fields)
    setup_bytes = (fields.byte(0x1F1) or 4) * SECTOR_BYTES + SECTOR_BYTES  # 0 means 4, and the boot sector is extra
    kernel_bytes = fields.int32(0x1F4) * PARAGRAPH_BYTES
    if kernel_bytes <= ENTRY_64 or setup_bytes + kernel_bytes > len(image):
        raise ImageError(
            f"a truncated kernel: {setup_bytes} + {kernel_bytes} bytes by its setup header, in a file of {len(image)}"
        )
    alignment = fields.int32(0x230)
    if alignment == 0 or alignment & (alignment - 1):
        raise ImageError(f"kernel_alignment {alignment:#x} of the setup header is no power of two")
    return SetupHeader(
        setup_bytes=setup_bytes,
        kernel_bytes=kernel_bytes,
        memory_bytes=max(fields.int32(0x260), kernel_bytes),
        is_relocatable=fields.byte(0x234) != 0,
        alignment=alignment,
        preferred=fields.int64(0x258),
        cmdline_bytes=fields.int32(0x238),
        initrd_end=fields.int32(0x22C) + 1,
        raw=image[SETUP_HEADER_AT : min(MAGIC_AT + image[HEADER_LENGTH_AT], HEADER_END_MAX)],
    )


def _check_enterable(fields: _Fields) -> None:
    """ImageError unless the kernel has a 64-bit entry that the header tells of."""
    version = fields.int16(0x206)
    if version < VERSION_LEAST:
        raise ImageError(
            f"boot protocol {version >> 8}.{version & 0xFF:02}: the 64-bit entry is told of since 2.12 (Linux 3.8)"
        )
    if not fields.int16(0x236) & KERNEL_64:
        raise ImageError("a 32-bit kernel: XLF_KERNEL_64 is not set in xloadflags; build it with CONFIG_64BIT")
    if not fields.byte(0x211) & LOADED_HIGH:
        raise ImageError("a zImage, which is loaded below 1 MiB: LOADED_HIGH is not set in loadflags")


def _place_kernel(slots: list[tuple[int, int]], header: SetupHeader, firmware: Firmware) -> range:
    """Where the kernel prefers to be, or, if it can be elsewhere, the lowest place for it; mapped at the entry."""
    candidates = [header.preferred]
    if header.is_relocatable:
        free_from = [LOWEST, *(base for base, _ in slots), *(area.stop for area in firmware.reserved)]
        candidates += sorted(-(-max(address, LOWEST) // header.alignment) * header.alignment for address in free_from)
    for start in candidates:
        place = range(start, start + header.memory_bytes)
        if place.start >= LOWEST and _fits(slots, place) and not any(overlaps(place, it) for it in firmware.reserved):
            return place
    where = f"at {header.preferred:#x}" + (", or elsewhere" if header.is_relocatable else "; it is not relocatable")
    raise ImageError(
        f"no room for the kernel, which needs {header.memory_bytes / (1 << 20):.1f} MiB in the first GiB, {where}: "
        f"guest memory is {slots}; give it more"
    )


def _fits(slots: list[tuple[int, int]], place: range) -> bool:
    return any(base <= place.start and place.stop <= min(base + size, MAPPED_END) for base, size in slots)


class _Fields:
    """The setup header's numbers, by their offsets in the file."""

    def __init__(self, image: bytes) -> None:
        self._image = image

    def byte(self, at: int) -> int:
        return self._image[at]

    def int16(self, at: int) -> int:
        return int.from_bytes(self._image[at : at + 2], "little")

    def int32(self, at: int) -> int:
        return int.from_bytes(self._image[at : at + 4], "little")

    def int64(self, at: int) -> int:
        return int.from_bytes(self._image[at : at + 8], "little")
