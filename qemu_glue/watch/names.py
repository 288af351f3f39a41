"""What VMs are called, in lines and in metrics: printable text, although the name of a socket may be none."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain, count
from pathlib import PurePath
from typing import Final, NamedTuple

from pvclock.meter.inside.schema import printable

__all__ = ["FileId", "VmNames", "shown", "socket_name"]

SOCKET_SUFFIXES: Final = (".qmp", ".sock")


class FileId(NamedTuple):
    """Which file it is, whatever paths lead to it."""

    device: int
    number: int


def shown(words: str) -> str:
    r"""Words of the system, such as a path, on one line: what is no text in them as escapes, such as \xff or \n."""
    return printable(os.fsencode(words).decode("utf-8", "backslashreplace"))


def socket_name(path: str) -> str:
    """What a VM is called by its socket: the file's name, without .qmp and .sock."""
    name = PurePath(path).name
    for suffix in SOCKET_SUFFIXES:
        name = name.removesuffix(suffix) or name
    return shown(name)


class VmNames:
    """The names of VMs by their sockets: the file's, or the whole path where another VM has that; no two have one.

    A name stays as long as the socket, so that a VM's metrics do; one that comes later gives way.
    """

    def __init__(self) -> None:
        self._names: dict[FileId, str] = {}

    def forget(self, socket: FileId) -> None:
        """The socket is gone."""
        self._names.pop(socket, None)

    def of(self, socket: FileId) -> str:
        """The name of the VM at `socket`, which name() was told."""
        return self._names[socket]

    def name(self, paths: Mapping[FileId, str]) -> None:
        """Name those that have no name yet; those that come together and would have one name get none of it."""
        new = {socket: path for socket, path in paths.items() if socket not in self._names}
        wanted = Counter([*self._names.values(), *map(socket_name, new.values())])
        for socket, path in new.items():
            short = [socket_name(path)] * (wanted[socket_name(path)] == 1)
            taken = {*self._names.values()}
            self._names[socket] = next(each for each in chain(short, _by_path(path)) if each not in taken)


def _by_path(path: str) -> Iterator[str]:
    """Such as /run/web.qmp; then /run/web.qmp (2), of a socket that took another's place."""
    yield shown(path)
    yield from (f"{shown(path)} ({number})" for number in count(2))
