"""A file that is replaced as a whole or stays as it was, whatever happens meanwhile: power loss, SIGKILL, a full disk.

The new content is written beside it, as `.NAME.new`, and takes its place by rename once it is on the disk.  Who writes
holds a lock on `.NAME.new`, so that writers take turns.  A killed writer leaves that one file behind, without its lock;
the next one takes it over, so they never pile up, and nobody ever reads it.
"""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path
from typing import Final

__all__ = ["replace"]

NEW_FILE_MODE: Final = 0o600
"""A VM's state is its owner's business; a file that is there keeps its mode."""


def replace(path: str | os.PathLike[str], content: bytes) -> None:
    """Let `content` be what file `path` holds, on the disk when this returns; a symbolic link is followed.

    OSError if that cannot be: the file is as it was, unless the very last step failed, to put the new name on the disk.
    """
    target = Path(os.path.realpath(path))
    mode = _mode(target)
    temporary = target.with_name(f".{target.name}.new")
    file = _lock(temporary)
    try:
        os.ftruncate(file, 0)
        os.fchmod(file, mode)
        _write(file, content)
        os.fsync(file)
        temporary.rename(target)
    finally:
        _discard(file, temporary)
    _sync_folder(target.parent)


def _mode(target: Path) -> int:
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return NEW_FILE_MODE
    if not stat.S_ISREG(mode):
        raise OSError(f"{target} is no ordinary file")
    return mode & 0o777


def _lock(temporary: Path) -> int:
    """Open the file, new or left behind, as its only writer."""
    while True:
        # Read-write: a FIFO that somebody put there does not block.
        file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, NEW_FILE_MODE)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file, temporary):
                _refuse_foreign(file, temporary)
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # who held the lock has renamed or removed it


def _is_at(file: int, path: Path) -> bool:
    """Does `path` name this open file?"""
    try:
        return os.path.samestat(os.fstat(file), path.lstat())
    except FileNotFoundError:
        return False


def _refuse_foreign(file: int, temporary: Path) -> None:
    """In a folder that others can write, the name may have been taken on purpose."""
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink != 1:
        raise OSError(f"{temporary} is in the way and not ours; remove it")


def _write(file: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(file, rest) :]


def _discard(file: int, temporary: Path) -> None:
    """Remove the file unless it has been renamed, and let the next writer go on."""
    try:
        if _is_at(file, temporary):
            temporary.unlink()
        fcntl.flock(file, fcntl.LOCK_UN)  # a process forked meanwhile has the descriptor, too
    finally:
        os.close(file)


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
