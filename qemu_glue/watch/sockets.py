"""The QMP sockets of a fleet: which there are now."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from qemu_glue.watch.names import FileId

__all__ = ["is_pattern", "sockets_now"]


def is_pattern(text: str) -> bool:
    """Does it name sockets as a shell's pattern does?  A file of that very name is no pattern."""
    return glob.has_magic(text) and not Path(text).exists()


def sockets_now(named: Sequence[str]) -> dict[FileId, str]:
    """The files that match these patterns, or are these, in order; each with the first path that leads to it."""
    paths: dict[FileId, str] = {}
    for each in named:
        for path in _matching(each) if is_pattern(each) else [each]:
            try:
                file = Path(path).stat()
            except OSError:  # it is not there yet, or no more
                continue
            if not is_pattern(each) or Path(path).is_socket():
                paths.setdefault(FileId(file.st_dev, file.st_ino), path)
    return paths


def _matching(pattern: str) -> list[str]:
    return sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207  # a Path has no patterns from the root
