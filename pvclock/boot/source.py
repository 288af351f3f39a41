"""What a machine boots from: an image and what it is told, loaded as often as the machine is reset."""

from __future__ import annotations

from typing import NamedTuple

from pvclock._memory import GuestMemory
from pvclock.boot import flat, multiboot
from pvclock.boot.entry import EntryState

__all__ = ["BootSource"]


class BootSource(NamedTuple):
    """image: a multiboot-1 ELF or a flat real-mode image, which its content tells.  cmdline: for multiboot."""

    image: bytes
    cmdline: str = ""

    def load(self, memory: GuestMemory) -> EntryState:
        """Load it: as multiboot if it is ELF or has that header, else as flat real-mode code, or raise ImageError."""
        if multiboot.find_header(self.image) is None and not self.image.startswith(multiboot.ELF_MAGIC):
            return flat.load(memory, self.image)
        return multiboot.load(memory, self.image, self.cmdline)
