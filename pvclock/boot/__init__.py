"""Boot images: told apart by their content, put into guest memory, entered as their protocol says."""

from pvclock.boot.entry import EntryState, enter
from pvclock.boot.information import BootModule
from pvclock.boot.source import PROTOCOLS, BootSource

__all__ = ["PROTOCOLS", "BootModule", "BootSource", "EntryState", "enter"]
