"""What a machine boots from: an image and what it is told, loaded as often as the machine is reset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal, NamedTuple

from pvclock._memory import GuestMemory
from pvclock.boot import bzimage, elf, flat, linux64, multiboot, pvh
from pvclock.boot.entry import EntryState
from pvclock.boot.information import NO_FIRMWARE, Firmware
from pvclock.errors import ImageError

__all__ = ["PROTOCOLS", "BootSource", "Protocol"]

Protocol = Literal["multiboot", "pvh", "linux64", "bzimage", "flat"]
PROTOCOLS: Final[tuple[Protocol, ...]] = ("multiboot", "pvh", "linux64", "bzimage", "flat")
LOADERS: Final[dict[Protocol, Callable[[GuestMemory, bytes, str, bytes, Firmware], EntryState]]] = {
    "multiboot": multiboot.load,
    "pvh": pvh.load,
    "linux64": linux64.load,
    "bzimage": bzimage.load,
}


class BootSource(NamedTuple):
    """image: a multiboot-1, PVH or 64-bit Linux image (vmlinux or bzImage), or flat real-mode code.

    cmdline, initrd: for all but flat code; none if empty.  An initrd is the first module of multiboot and PVH.
    protocol: how to enter the image; if it is None the first of PROTOCOLS that the image's content tells of.
    """

    image: bytes
    cmdline: str = ""
    initrd: bytes = b""
    protocol: Protocol | None = None

    def load(self, memory: GuestMemory, firmware: Firmware = NO_FIRMWARE) -> EntryState:
        """Load it by its protocol; ImageError, with memory untouched, if it cannot be.

        firmware: what is in memory already; flat code is not told of it.
        """
        protocol = self.entered_by
        if protocol == "flat":
            if self.initrd:
                raise ImageError("a flat image takes no initrd; give it a multiboot header")
            return flat.load(memory, self.image, firmware=firmware)
        return LOADERS[protocol](memory, self.image, self.cmdline, self.initrd, firmware)

    @property
    def entered_by(self) -> Protocol:
        """The protocol that it is loaded by; ImageError for an ELF file that none of them enters."""
        return self.protocol or _protocol_of(self.image)


def _protocol_of(image: bytes) -> Protocol:
    """How an image is to be entered by what is in it; neither an ELF file nor a kernel is taken for flat code."""
    if multiboot.find_header(image) is not None:
        return "multiboot"
    if not image.startswith(elf.MAGIC):
        return "bzimage" if bzimage.is_bzimage(image) else "flat"
    executable = elf.parse(image)
    if pvh.find_entry(executable) is not None:
        return "pvh"
    if executable.bits != 64:
        raise ImageError("a 32-bit ELF file with no multiboot header and no PVH note, one of which it needs")
    return "linux64"
