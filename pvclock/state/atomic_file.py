"""A file that is replaced as a whole or stays as it was, whatever happens meanwhile: power loss, SIGKILL, a full disk.

The new content is written beside it, as `.NAME.new`, and takes its place by rename once it is on the disk.  Who writes
holds a lock on `.NAME.new`, so that writers take turns.  A killed writer leaves that one file behind, without its lock;
the next one takes it over, so they never pile up, and nobody ever reads it.

Who may use the file stays as it was, as far as the kernel lets the writer say so: else fewer may, never more.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

__all__ = ["read", "reading", "replace"]

NEW_FILE_MODE: Final = 0o600
"""A VM's state is its owner's business; a file that is there keeps its mode."""

ACL: Final = "system.posix_acl_access"
NO_ACL: Final = frozenset({errno.ENODATA, errno.EOPNOTSUPP})
MAY_NOT: Final = frozenset({errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP})
"""An owner cannot be set by this user, has no id in this user namespace, or is not known to this file system."""

KINDS: Final = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}
CHUNK_BYTES: Final = 1 << 20


@contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[Iterator[bytes]]:
    """The chunks of what regular file `path` holds, none above 1 MiB; a symbolic link is followed.

    OSError if it cannot be read or is something else.  Never waits: for no writer of a FIFO, nor for a device.
    """
    _refuse_special(Path(path).stat())  # first: to open a device may set it going
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        _refuse_special(os.fstat(file))  # another may have taken its place
        yield iter(partial(os.read, file, CHUNK_BYTES), b"")
    finally:
        os.close(file)


def read(path: str | os.PathLike[str], bytes_max: int) -> bytes:
    """As reading(), whole, but no more than `bytes_max` of it."""
    content = bytearray()
    with reading(path) as chunks:
        while len(content) < bytes_max and (chunk := next(chunks, b"")):
            content += chunk
    return bytes(content[:bytes_max])


def replace(path: str | os.PathLike[str], content: Iterable[bytes]) -> None:
    """Let the chunks of `content` be what file `path` holds, on disk when this returns; a symbolic link is followed.

    Each chunk is written before the next one is asked for, so a VM's RAM need not be held twice.

    A new file has mode 0600.  One that is there keeps its mode, owner, group and POSIX ACL.  Where this process may not
    set that owner or group, the writer's take their place, the ACL goes, and the mode grants nobody what it did not
    (0640 becomes 0600 in another group).  Not kept: other extended attributes (security labels), set-ID and sticky
    bits, and further names: hard links have the old content.

    OSError if that cannot be: the file is as it was, unless the very last step failed, to put the new name on the disk.
    It is as it was, too, if `content` raises; that comes out.
    """
    target = Path(os.path.realpath(path))
    access = _access(target)
    temporary = target.with_name(f".{target.name}.new")
    file = _lock(temporary, access)
    try:
        os.fchmod(file, NEW_FILE_MODE)
        os.ftruncate(file, 0)
        for chunk in content:
            _write(file, chunk)
        _permit(file, access)
        os.fsync(file)
        temporary.rename(target)
    finally:
        _discard(file, temporary)
    _sync_folder(target.parent)


# Who may use the file


class _Access(NamedTuple):
    """Who may read and write a file: by mode, owner, group, and what ACL (as the kernel stores it) there is."""

    mode: int
    uid: int
    gid: int
    acl: bytes | None


def _access(target: Path) -> _Access | None:
    """The file's as it is; None if there is none."""
    try:
        found = target.stat()
    except FileNotFoundError:
        return None
    _refuse_special(found)
    try:
        acl = os.getxattr(target, ACL)
    except OSError as error:
        if error.errno not in NO_ACL:
            raise
        acl = None
    return _Access(found.st_mode & 0o777, found.st_uid, found.st_gid, acl)


def _refuse_special(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(KINDS.get(stat.S_IFMT(found.st_mode), "no regular file"))


def _permit(file: int, old: _Access | None) -> None:
    """Give the new file, so far its writer's only, to those who could use the old one."""
    if old is None:
        return
    _give(file, old.uid, old.gid)
    new = os.fstat(file)
    kept = (new.st_uid, new.st_gid) == (old.uid, old.gid)
    _set_acl(file, old.acl if kept else None)
    os.fchmod(file, old.mode if kept else _mode_elsewhere(old, new))


def _give(file: int, uid: int, gid: int) -> None:
    """Set owner and group, or the group alone, or neither: as much as this process may."""
    for owner in (uid, -1):
        try:
            os.fchown(file, owner, gid)
        except OSError as error:
            if error.errno not in MAY_NOT:
                raise
        else:
            return


def _mode_elsewhere(old: _Access, new: os.stat_result) -> int:
    """The old file's mode in so far as it grants nobody more, now that owner or group are others.

    Whoever was the owner is one of the group or of the others now, and members of either group may have changed sides.
    """
    if old.acl is not None:
        return NEW_FILE_MODE  # the group's bits are a mask of entries that are gone
    user, group, other = old.mode >> 6, old.mode >> 3 & 7, old.mode & 7
    if new.st_uid != old.uid:
        group, other = group & user, other & user
    if new.st_gid != old.gid:
        group = other = group & other
    return user << 6 | group << 3 | other


def _set_acl(file: int, acl: bytes | None) -> None:
    """Let this be the file's ACL; one that it has by the folder's default goes."""
    try:
        if acl is None:
            os.removexattr(file, ACL)
        else:
            os.setxattr(file, ACL, acl)
    except OSError as error:
        if acl is not None or error.errno not in NO_ACL:
            raise


# The file beside it


def _lock(temporary: Path, access: _Access | None) -> int:
    """Open the file, new or left behind, as its only writer."""
    while True:
        # Read-write: a FIFO that somebody put there does not block.
        file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, NEW_FILE_MODE)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file, temporary):
                _refuse_foreign(file, temporary, access)
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


def _refuse_foreign(file: int, temporary: Path, access: _Access | None) -> None:
    """In a folder that others can write, the name may have been taken on purpose.

    Root may find it the target's owner's: another root that was killed had just given it to them, as this one will.
    """
    found, user = os.fstat(file), os.geteuid()
    owners = {user} if user or access is None else {user, access.uid}
    if not stat.S_ISREG(found.st_mode) or found.st_uid not in owners or found.st_nlink != 1:
        raise OSError(f"{temporary} is in the way and not ours; remove it")


def _write(file: int, chunk: bytes) -> None:
    rest = memoryview(chunk)
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
