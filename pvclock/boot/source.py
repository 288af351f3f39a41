"""What a machine boots from: an image and what it is told, loaded as often as the machine is reset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal, NamedTuple

from pvclock._memory import GuestMemory
from pvclock.boot import bzimage, elf, flat, linux64, multiboot, pvh
from pvclock.boot.entry import EntryState
from pvclock.boot.information import NO_FIRMWARE, BootInformation, BootModule, Firmware
from pvclock.errors import ConfigError, ImageError

__all__ = ["PROTOCOLS", "BootSource", "Protocol"]

Protocol = Literal["multiboot", "pvh", "linux64", "bzimage", "flat"]
PROTOCOLS: Final[tuple[Protocol, ...]] = ("multiboot", "pvh", "linux64", "bzimage", "flat")
LOADERS: Final[dict[Protocol, Callable[[GuestMemory, bytes, BootInformation], EntryState]]] = {
    "multiboot": multiboot.load,
    "pvh": pvh.load,
    "linux64": linux64.load,
    "bzimage": bzimage.load,
}
TAKE_MODULES: Final = ("multiboot", "pvh")


class BootSource(NamedTuple):
    """image: a multiboot-1, PVH or 64-bit Linux image (vmlinux or bzImage), or flat real-mode code.

    cmdline, initrd: for all but flat code; none if empty.  An initrd is the first module of multiboot and PVH.
    protocol: how to enter the image; if it is None the first of PROTOCOLS that the image's content tells of.
    modules: more of them, each with a string, for multiboot and PVH.
    """

    image: bytes
    cmdline: str = ""
    initrd: bytes = b""
    protocol: Protocol | None = None
    modules: tuple[BootModule, ...] = ()

    def load(self, memory: GuestMemory, firmware: Firmware = NO_FIRMWARE) -> EntryState:
        """Load it by its protocol; ImageError, with memory untouched, if it cannot be; ConfigError as check().

        firmware: what is in memory already; flat code is not told of it.
        """
        self.check()
        protocol = self.entered_by
        if protocol == "flat":
            if self.initrd:
                raise ImageError("a flat image takes no initrd; give it a multiboot header")
            return flat.load(memory, self.image, firmware=firmware)
        initrd = (BootModule(self.initrd),) if self.initrd else ()
        return LOADERS[protocol](memory, self.image, BootInformation(self.cmdline, (*initrd, *self.modules), firmware))

    def check(self) -> None:
        """ConfigError for modules that the image's protocol has no place for; ImageError as of entered_by."""
        if not self.modules or self.entered_by in TAKE_MODULES:
            return
        if self.entered_by == "flat":
            raise ConfigError("a flat image takes no modules; give it a multiboot header")
        raise ConfigError(
            "Linux takes one initrd and no modules; several are one initrd, too, behind one another as `cat` has them"
        )

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
