"""Atomic replacement of a file: all of the new content or none, even after power loss, SIGKILL or on a full disk.

The writer writes `.NAME.new` beside the file, syncs it to disk and renames it.  It holds a lock on `.NAME.new`, so
writers take turns.  A killed writer leaves that one file unlocked; the next one reuses it, so they never pile up, and
nothing reads it.

Access rights stay as they were as far as this process may set them; otherwise they shrink, never grow.
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

__all__ = ["opened", "read", "reading", "replace"]

NEW_FILE_MODE: Final = 0o600
"""Mode of a new file: a VM's state is private to its owner.  An existing file keeps its mode."""

ACL: Final = "system.posix_acl_access"
NO_ACL: Final = frozenset({errno.ENODATA, errno.EOPNOTSUPP})
MAY_NOT: Final = frozenset({errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP})
"""fchown() errors: this user may not set the owner, or the user namespace or file system has no such owner."""

KINDS: Final = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}
CHUNK_BYTES: Final = 1 << 20


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[int]:
    """A descriptor of regular file `path`, for reading; follows a symbolic link.

    OSError if it cannot be read or is not a regular file.  Never blocks on a FIFO or a device.
    """
    _refuse_special(Path(path).stat())  # before open(), which may start a device
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        _refuse_special(os.fstat(file))  # it may have been replaced in between
        yield file
    finally:
        os.close(file)


@contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[Iterator[bytes]]:
    """The content of regular file `path` in chunks of up to 1 MiB; errors as opened()."""
    with opened(path) as file:
        yield iter(partial(os.read, file, CHUNK_BYTES), b"")


def read(path: str | os.PathLike[str], bytes_max: int) -> bytes:
    """The first `bytes_max` bytes of regular file `path`; errors as opened()."""
    content = bytearray()
    with reading(path) as chunks:
        while len(content) < bytes_max and (chunk := next(chunks, b"")):
            content += chunk
    return bytes(content[:bytes_max])


def replace(path: str | os.PathLike[str], content: Iterable[bytes], mode: int | None = None) -> None:
    """Replace the content of file `path` by the chunks of `content`, synced to disk; follows a symbolic link.

    mode: the file's access rights afterwards, for what is no secret; by default they stay as they were.

    Writes each chunk before it asks for the next, so a VM's RAM is not copied as a whole.

    A new file has mode 0600.  An existing one keeps its mode, owner, group and POSIX ACL.  If this process may not set
    that owner or group, the file gets the writer's, loses the ACL, and its mode grants no user more than before (0640
    becomes 0600 in another group).  Not kept: other extended attributes (security labels), set-ID and sticky bits, and
    hard links, which keep the old content.

    OSError on failure: the file is unchanged, unless the last step failed, the sync of the folder.  If `content`
    raises, the file is unchanged and the error passes through.
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
        if mode is not None:
            os.fchmod(file, mode)
        os.fsync(file)
        temporary.rename(target)
    finally:
        _discard(file, temporary)
    _sync_folder(target.parent)


# Who may use the file


class _Access(NamedTuple):
    """A file's access rights: mode, owner, group, and the ACL as the kernel stores it."""

    mode: int
    uid: int
    gid: int
    acl: bytes | None


def _access(target: Path) -> _Access | None:
    """The access rights of `target`; None if it does not exist."""
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
        raise OSError(KINDS.get(stat.S_IFMT(found.st_mode), "not a regular file"))


def _permit(file: int, old: _Access | None) -> None:
    """Give the new file, until now private to the writer, the old one's access rights."""
    if old is None:
        return
    _give(file, old.uid, old.gid)
    new = os.fstat(file)
    kept = (new.st_uid, new.st_gid) == (old.uid, old.gid)
    _set_acl(file, old.acl if kept else None)
    os.fchmod(file, old.mode if kept else _mode_elsewhere(old, new))


def _give(file: int, uid: int, gid: int) -> None:
    """Set owner and group, or the group alone, or neither, whichever this process may."""
    for owner in (uid, -1):
        try:
            os.fchown(file, owner, gid)
        except OSError as error:
            if error.errno not in MAY_NOT:
                raise
        else:
            return


def _mode_elsewhere(old: _Access, new: os.stat_result) -> int:
    """The old file's mode, reduced so that it grants no user more under the new owner or group.

    The old owner now counts as group or other, and members of either group may have moved between group and other.
    """
    if old.acl is not None:
        return NEW_FILE_MODE  # the group bits were the mask of ACL entries that are gone
    user, group, other = old.mode >> 6, old.mode >> 3 & 7, old.mode & 7
    if new.st_uid != old.uid:
        group, other = group & user, other & user
    if new.st_gid != old.gid:
        group = other = group & other
    return user << 6 | group << 3 | other


def _set_acl(file: int, acl: bytes | None) -> None:
    """Set the file's ACL; None removes the one that it inherited from the folder's default."""
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
    """Open `temporary`, new or left behind by a killed writer, and lock it."""
    while True:
        # Read-write, so that open() does not block on a FIFO put there by someone else.
        file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, NEW_FILE_MODE)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file, temporary):
                _refuse_foreign(file, temporary, access)
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # the previous holder of the lock renamed or removed it


def _is_at(file: int, path: Path) -> bool:
    """Does `path` name this open file?"""
    try:
        return os.path.samestat(os.fstat(file), path.lstat())
    except FileNotFoundError:
        return False


def _refuse_foreign(file: int, temporary: Path, access: _Access | None) -> None:
    """OSError if another user made `temporary`: in a folder that others can write, that may be an attack.

    Root may find it owned by the target's owner: a killed root writer had already given it to them.
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
    """Remove the file unless it was renamed, and unlock it for the next writer."""
    try:
        if _is_at(file, temporary):
            temporary.unlink()
        fcntl.flock(file, fcntl.LOCK_UN)  # close() would not unlock it if a fork shares the descriptor
    finally:
        os.close(file)


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
