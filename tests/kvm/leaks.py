"""What this process holds: descriptors, threads and guest RAM, to be compared before and after."""

from __future__ import annotations

import os
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

PROCESS = Path("/proc/self")


class Held(NamedTuple):
    """A process's possessions, as far as virtual machines add to them."""

    descriptors: list[str]
    threads: list[str]
    ram_mappings: int

    def is_no_more_than(self, before: Held) -> bool:
        """Is nothing here that was not there before?  A thread of an earlier test may have ended since."""
        lists = ((self.descriptors, before.descriptors), (self.threads, before.threads))
        return not any(Counter(now) - Counter(then) for now, then in lists) and self.ram_mappings <= before.ram_mappings


def open_descriptors() -> list[str]:
    """What every open descriptor refers to, but the one that looks, and what a thread closes at this moment."""
    found = []
    for entry in (PROCESS / "fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(str(entry.readlink()))
    return sorted(found)


def held() -> Held:
    """All of it, at this moment."""
    for thread in threading.enumerate():
        if type(thread).__module__ == "rich.live":
            thread.join(1)  # a progress display tells its thread to end, and does not wait for it
    return Held(open_descriptors(), sorted(thread.name for thread in threading.enumerate()), ram_mappings())


def ram_mappings(process: Path = PROCESS) -> int:
    """How many machines' RAM `process` has in its address space."""
    return (process / "maps").read_text().count("pvclock-ram")


def is_others(file: Path, place: Path) -> bool:
    """Is it in the address space of a process that is neither this one nor one that it started with TMPDIR=`place`?

    Other tests may run on this machine at the same time, and what they share is theirs.
    """
    for process in set(Path("/proc").glob("[0-9]*")) - {Path(f"/proc/{os.getpid()}")}:
        with suppress(OSError):  # it has just ended, or is another user's
            if str(file) in (process / "maps").read_text() and not _began_in(process, place):
                return True
    return False


def _began_in(process: Path, place: Path) -> bool:
    return f"TMPDIR={place}".encode() in (process / "environ").read_bytes().split(b"\0")
