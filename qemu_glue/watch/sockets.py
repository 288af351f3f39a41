"""The QMP sockets of a fleet: which there are now, and what their VMs are called."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from qemu_glue.watch.target import socket_name

__all__ = ["VmNames", "is_pattern", "sockets_now"]


def is_pattern(text: str) -> bool:
    """Does it name sockets as a shell's pattern does?  A file of that very name is no pattern."""
    return glob.has_magic(text) and not Path(text).exists()


def sockets_now(named: Sequence[str]) -> list[str]:
    """The paths that match these patterns, or are these, in order; one socket once, whatever links lead to it."""
    paths: dict[tuple[int, int], str] = {}
    for each in named:
        for path in _matching(each) if is_pattern(each) else [each]:
            try:
                file = Path(path).stat()
            except OSError:  # it is not there yet, or no more
                continue
            if not is_pattern(each) or Path(path).is_socket():
                paths.setdefault((file.st_dev, file.st_ino), path)
    return list(paths.values())


def _matching(pattern: str) -> list[str]:
    return sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207  # a Path has no patterns from the root


class VmNames:
    """The names of VMs by their sockets: the file's, or the whole path where another VM has that.

    A name stays as long as the socket, so that a VM's metrics do; one that comes later gives way.
    """

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def forget(self, path: str) -> None:
        """The socket is gone."""
        self._names.pop(path, None)

    def of(self, path: str) -> str:
        """The name of the VM at `path`, which name() was told."""
        return self._names[path]

    def name(self, paths: Iterable[str]) -> None:
        """Name those that have no name yet; those that come together and would have one name get none of it."""
        new = [path for path in paths if path not in self._names]
        wanted = Counter([*self._names.values(), *map(socket_name, new)])
        self._names |= {path: socket_name(path) if wanted[socket_name(path)] == 1 else path for path in new}
