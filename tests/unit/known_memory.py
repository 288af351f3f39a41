"""A process whose memory is known page by page: private, shared by a memfd, and shared by one that it has closed.

Imports little, to start quickly; known_process.py starts it.
"""

import ctypes
import hashlib
import json
import os
import sys
from mmap import MADV_NOHUGEPAGE, MAP_ANONYMOUS, MAP_PRIVATE, PAGESIZE, mmap
from pathlib import Path

PAGES = 512
LENGTH = PAGES * PAGESIZE
RUNS = ((1, 1), (3, 4), (100, 60), (PAGES - 1, 1))
"""(first, count) of the pages that were written, in each of the three."""


def content() -> bytes:
    """Return what is in each of the three mappings."""
    found = bytearray(LENGTH)
    for first, count in RUNS:
        found[first * PAGESIZE : (first + count) * PAGESIZE] = hashlib.shake_128(b"%d" % first).digest(count * PAGESIZE)
    return bytes(found)


CONTENT = content()


def main() -> None:
    """Fill the mappings, tell where they are, and stay until the parent lets go."""
    files = [os.memfd_create(name) for name in ("known-shared", "known-closed")]
    for fd in files:
        os.ftruncate(fd, LENGTH)
    mappings = [mmap(-1, LENGTH, flags=MAP_PRIVATE | MAP_ANONYMOUS), *(mmap(fd, LENGTH) for fd in files)]
    for mapping in mappings:
        mapping.madvise(MADV_NOHUGEPAGE)
        for first, count in RUNS:
            piece = slice(first * PAGESIZE, (first + count) * PAGESIZE)
            mapping[piece] = CONTENT[piece]
    private, shared, closed = (ctypes.addressof(ctypes.c_char.from_buffer(mapping)) for mapping in mappings)
    for entry in list(Path("/proc/self/fd").iterdir()):  # a mapping of Python's has a descriptor of its own
        if entry.is_symlink() and "known-closed" in str(entry.readlink()):
            os.close(int(entry.name))
    print(json.dumps({"private": private, "shared": shared, "closed": closed, "shared_fd": files[0]}), flush=True)  # noqa: T201  # to the parent
    sys.stdin.read()


if __name__ == "__main__":
    main()
