"""How a guest's RAM is best reached, where it is known in which process it lies."""

from __future__ import annotations

from collections.abc import Sequence

from pvclock.host.process import Process
from pvclock.meter.watch.process_ram import ProcessRam
from pvclock.meter.watch.ram_blocks import RamBlock
from pvclock.meter.watch.shared_ram import SharedRam, open_pieces
from pvclock.meter.watch.vm import GuestRam

__all__ = ["open_ram"]


def open_ram(process: Process, blocks: Sequence[RamBlock]) -> GuestRam:
    """`blocks` of the memory of `process`, to be read until that is closed.

    By the file where the VMM shares its RAM: blocks that are not shared, and smaller than the biggest that is, hold
    video memory or firmware, and are left out then.  Else all of them by process_vm_readv.  MemoryNotReadable if
    neither works; VmEnded.
    """
    pieces = open_pieces(process, blocks)
    shared = {piece.block for piece in pieces}
    biggest = max((block.length for block in shared), default=0)
    if pieces and all(block in shared or block.length < biggest for block in blocks):
        return SharedRam(process, pieces)
    return ProcessRam(process, blocks)
