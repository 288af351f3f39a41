"""What a machine boots from: an image and what it is told, loaded as often as the machine is reset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal, NamedTuple

from pvclock._memory import GuestMemory
from pvclock.boot import elf, flat, linux64, multiboot, pvh
from pvclock.boot.entry import EntryState
from pvclock.errors import ImageError

__all__ = ["PROTOCOLS", "BootSource", "Protocol"]

Protocol = Literal["multiboot", "pvh", "linux64", "flat"]
PROTOCOLS: Final[tuple[Protocol, ...]] = ("multiboot", "pvh", "linux64", "flat")
LOADERS: Final[dict[Protocol, Callable[[GuestMemory, bytes, str, bytes], EntryState]]] = {
    "multiboot": multiboot.load,
    "pvh": pvh.load,
    "linux64": linux64.load,
}


class BootSource(NamedTuple):
    """image: a multiboot-1, PVH or 64-bit Linux (vmlinux) image, or flat real-mode code.

    cmdline, initrd: for all but flat code; none if empty.  An initrd is the first module of multiboot and PVH.
    protocol: how to enter the image; if it is None the first of PROTOCOLS that the image's content tells of.
    """

    image: bytes
    cmdline: str = ""
    initrd: bytes = b""
    protocol: Protocol | None = None

    def load(self, memory: GuestMemory) -> EntryState:
        """Load it by its protocol; ImageError, with memory untouched, if it cannot be."""
        protocol = self.protocol or _protocol_of(self.image)
        if protocol == "flat":
            if self.initrd:
                raise ImageError("a flat image takes no initrd; give it a multiboot header")
            return flat.load(memory, self.image)
        return LOADERS[protocol](memory, self.image, self.cmdline, self.initrd)


def _protocol_of(image: bytes) -> Protocol:
    """How an image is to be entered by what is in it; an ELF file is never taken for flat code."""
    if multiboot.find_header(image) is not None:
        return "multiboot"
    if not image.startswith(elf.MAGIC):
        return "flat"
    executable = elf.parse(image)
    if pvh.find_entry(executable) is not None:
        return "pvh"
    if executable.bits != 64:
        raise ImageError("a 32-bit ELF file with no multiboot header and no PVH note, one of which it needs")
    return "linux64"
