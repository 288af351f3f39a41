"""Boot images: found out by their content, put into guest memory, entered as their protocol says."""

from __future__ import annotations

from pvclock._memory import GuestMemory
from pvclock.boot import flat, multiboot
from pvclock.boot.entry import EntryState, enter

__all__ = ["EntryState", "enter", "load"]


def load(memory: GuestMemory, image: bytes, cmdline: str = "") -> EntryState:
    """Load `image`: as multiboot if it is ELF or has that header, else as flat real-mode code, or raise ImageError."""
    if multiboot.find_header(image) is None and not image.startswith(multiboot.ELF_MAGIC):
        return flat.load(memory, image)
    return multiboot.load(memory, image, cmdline)
