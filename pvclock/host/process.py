"""A process of this host seen from outside: what /proc tells of it, and whether it still runs."""

from __future__ import annotations

import errno
import os
import re
import select
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import TracebackType
from typing import Final, NamedTuple, Self

from pvclock.errors import VmEnded, VmNotObservable

__all__ = ["Mapping", "Process"]

MAPS_LINE: Final = re.compile(
    r"([0-9a-f]+)-([0-9a-f]+) ([r-])([w-])[x-]([ps]) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) *(.*)"
)
DELETED: Final = " (deleted)"


class Mapping(NamedTuple):
    """A line of /proc/PID/maps: `length` bytes from address `start`, of a file from `offset` on if it has an inode.

    device, inode: as os.stat() has them; both 0 for memory of no file.  path: without " (deleted)"; "[heap]" and the
    like, or "", for memory of no file.
    """

    start: int
    length: int
    is_readable: bool
    is_writable: bool
    is_shared: bool
    offset: int
    device: int
    inode: int
    path: str


class Process:
    """A running process; a context manager that lets go of it.

    It is held by a pidfd and its folder in /proc, so another process that gets the same pid is never taken for it.
    name: its comm.  uid: its real one.  VmNotObservable without such a process; VmEnded, here and from each method,
    once it has ended.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        with ExitStack() as resources:
            self._pidfd = _pidfd(pid)
            resources.callback(os.close, self._pidfd)
            self._ended = select.poll()
            self._ended.register(self._pidfd, select.POLLIN)
            with self._looking_at(""):
                self._folder = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                resources.callback(os.close, self._folder)
            self.name = self.read("comm").rstrip("\n")
            self.uid = int(self.read("status").partition("\nUid:")[2].split(maxsplit=1)[0])
            self._resources = resources.pop_all()

    # Does it still run?

    @property
    def is_running(self) -> bool:
        """Has it not ended?  A zombie has."""
        return not self._ended.poll(0)

    def check_running(self) -> None:
        """VmEnded if it has ended."""
        if not self.is_running:
            raise VmEnded(self.pid)

    # What /proc tells

    def read(self, name: str) -> str:
        """All of the text file `name` in its folder; VmNotObservable if that is not permitted."""
        with self._looking_at(name):
            return self._text(name)

    def open(self, name: str) -> int:
        """A descriptor of `name` in its folder, to read from, until close(); errors of read()."""
        with self._looking_at(name):
            fd = self._opened(name)
            self._resources.callback(os.close, fd)  # also if the process has ended meanwhile
        return fd

    def stat(self, name: str) -> os.stat_result:
        """What `name` in its folder is, or leads to; errors of read()."""
        with self._looking_at(name):
            return os.stat(name, dir_fd=self._folder)

    def descriptors(self) -> dict[int, str]:
        """What each of its open descriptors refers to; errors of read()."""
        found = {}
        for number in self._listed("fd"):
            with self._looking_at("fd", may_vanish=True):
                found[number] = os.readlink(f"fd/{number}", dir_fd=self._folder)
        return found

    def threads(self) -> dict[int, str]:
        """The names of its threads by their ids, in order; errors of read()."""
        found = {}
        for tid in self._listed("task"):
            with self._looking_at("task", may_vanish=True):
                found[tid] = self._text(f"task/{tid}/comm").rstrip("\n")
        return found

    def mappings(self) -> list[Mapping]:
        """Its address space, in order of addresses; errors of read()."""
        lines = self.read("maps").splitlines()
        if not lines:
            self._check_not_ending()
        return [_mapping(line) for line in lines]

    def close(self) -> None:
        """Let go of it, and close what open() gave.  May be called twice."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _text(self, name: str) -> str:
        with os.fdopen(self._opened(name), encoding="utf-8", errors="surrogateescape") as file:
            return file.read()

    def _opened(self, name: str) -> int:
        return os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=self._folder)

    def _listed(self, name: str) -> list[int]:
        """The numbers in a folder."""
        with self._looking_at(name):
            fd = self._opened(name)
            try:
                return sorted(map(int, os.listdir(fd)))  # noqa: PTH208  # a descriptor has no path
            finally:
                os.close(fd)

    def _check_not_ending(self) -> None:
        """VmEnded also if it is about to end: its memory goes first, and takes a second to be freed if it is big."""
        self.check_running()
        with suppress(PermissionError):
            try:
                has_memory = bool(self._text("maps"))
            except (FileNotFoundError, ProcessLookupError):
                has_memory = False
            if not has_memory:
                raise VmEnded(self.pid)

    @contextmanager
    def _looking_at(self, name: str, *, may_vanish: bool = False) -> Iterator[None]:
        """Turn what can go wrong with a file of /proc into our errors, also that the process ends meanwhile."""
        try:
            yield
        except PermissionError:
            self._check_not_ending()
            why = f"/proc/{self.pid}/{name} may not be looked at; do it as root, or as the user that runs it"
            raise VmNotObservable(self.pid, why) from None
        except OSError as error:
            self._check_not_ending()
            if not (may_vanish and error.errno in {errno.ENOENT, errno.ESRCH}):
                raise VmNotObservable(self.pid, f"/proc/{self.pid}/{name}: {error.strerror}") from None
        self.check_running()


def _pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except (ProcessLookupError, OverflowError):
        raise VmNotObservable(pid, "there is no such process") from None
    except OSError as error:
        raise VmNotObservable(pid, f"it is no process, or a thread of one (pidfd_open: {error.strerror})") from None


def _mapping(line: str) -> Mapping:
    match = MAPS_LINE.fullmatch(line)
    assert match is not None  # noqa: S101  # Linux's documented format
    start, end, readable, writable, shared, offset, major, minor, inode, path = match.groups()
    return Mapping(
        int(start, 16),
        int(end, 16) - int(start, 16),
        readable == "r",
        writable == "w",
        shared == "s",
        int(offset, 16),
        os.makedev(int(major, 16), int(minor, 16)),
        int(inode),
        path.removesuffix(DELETED),
    )
