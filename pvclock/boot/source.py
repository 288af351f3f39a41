"""What a machine boots from: an image and what it is told, loaded as often as the machine is reset."""

from __future__ import annotations

from typing import NamedTuple

from pvclock._memory import GuestMemory
from pvclock.boot import flat, multiboot
from pvclock.boot.entry import EntryState
from pvclock.errors import ImageError

__all__ = ["BootSource"]


class BootSource(NamedTuple):
    """image: a multiboot-1 ELF or a flat real-mode image, which its content tells.  cmdline, initrd: for multiboot.

    initrd: passed as the first multiboot module; none if empty.
    """

    image: bytes
    cmdline: str = ""
    initrd: bytes = b""

    def load(self, memory: GuestMemory) -> EntryState:
        """Load it: as multiboot if it is ELF or has that header, else as flat real-mode code, or raise ImageError."""
        if multiboot.find_header(self.image) is None and not self.image.startswith(multiboot.ELF_MAGIC):
            if self.initrd:
                raise ImageError("a flat image takes no initrd; give it a multiboot header")
            return flat.load(memory, self.image)
        return multiboot.load(memory, self.image, self.cmdline, self.initrd)
