"""Who may use a saved state's file: that stays as it was, and what is no file is neither waited for nor read."""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pvclock import StateFileError
from pvclock.state import atomic_file, clock_state
from tests.saved_states import LEAST, TYPICAL
from tests.waiting import HANG_S

ROOT = Path(__file__).parents[2]
NOBODY, OWNER, GROUP, STRANGER = 65534, 1234, 2345, 4321

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other users: run as root")


# What is no file


def make_fifo(path: Path) -> None:
    """A FIFO without a writer."""
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    """A socket that nobody listens at."""
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(path))


def make_link_to_zeroes(path: Path) -> None:
    """A symbolic link to a device that never ends."""
    path.symlink_to("/dev/zero")


SPECIAL: dict[str, Callable[[Path], None]] = {
    "a FIFO": make_fifo,
    "a socket": make_socket,
    "a character device": make_link_to_zeroes,
    "a directory": Path.mkdir,
}


@pytest.mark.row("P-25", "E9")
def test_check_waits_for_nothing(tmp_path: Path) -> None:
    """`state check` of FIFOs, sockets, devices and folders has a line for each, and a good file's after them."""
    for number, make in enumerate(SPECIAL.values()):
        make(tmp_path / str(number))
    clock_state.write(tmp_path / "good", TYPICAL)
    files = sorted(map(str, tmp_path.iterdir()))
    command = [sys.executable, "-m", "pvclock", "state", "check", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 1
    *lines, last = done.stdout.splitlines()
    assert last.startswith(f"{files[-1]}: valid: ")
    for line, file, found in zip(lines, files, SPECIAL, strict=False):
        assert line == f"{file}: NOT VALID: file: found {found}; supported: a regular file that can be read"


@pytest.mark.row("P-25", "E9")
@pytest.mark.parametrize("found", SPECIAL)
def test_what_takes_the_files_place(found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What becomes something else after it was looked at, and before it is opened, is refused unread, too."""
    path = tmp_path / "clock.json"
    clock_state.write(path, TYPICAL)
    open_ = os.open

    def exchanged(name: str, flags: int) -> int:
        assert flags & os.O_NONBLOCK  # else a FIFO makes this test wait for ever
        Path(name).unlink()
        SPECIAL[found](Path(name))
        return open_(name, flags)

    def unread(*_: object) -> bytes:
        raise AssertionError

    monkeypatch.setattr(os, "open", exchanged)
    monkeypatch.setattr(os, "read", unread)
    with pytest.raises(StateFileError) as caught:
        clock_state.read(path)
    assert caught.value.found == ("No such device or address" if found == "a socket" else found)


@pytest.mark.row("P-25", "E9")
def test_a_file_that_would_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a regular file has nothing yet, as some of /proc do, loading is an error and not a wait."""
    path = tmp_path / "clock.json"
    clock_state.write(path, TYPICAL)
    reader, writer = os.pipe2(os.O_NONBLOCK)
    read = os.read
    monkeypatch.setattr(os, "read", lambda _, length: read(reader, length))
    with pytest.raises(StateFileError, match="found Resource temporarily unavailable"):
        clock_state.read(path)
    os.close(reader)
    os.close(writer)


@pytest.mark.row("P-25")
def test_a_read_that_takes_a_byte_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system call that reads less than was asked for is called again."""
    path = tmp_path / "clock.json"
    clock_state.write(path, TYPICAL)
    read = os.read
    monkeypatch.setattr(os, "read", lambda file, length: read(file, min(length, 1)))
    assert clock_state.read(path) == TYPICAL


# Owner, group and mode


class Access(NamedTuple):
    """Owner, group, mode and ACL of a file."""

    uid: int
    gid: int
    mode: int
    acl: bytes | None = None


def access_of(path: Path) -> Access:
    """The file's."""
    found = path.stat()
    acl = os.getxattr(path, atomic_file.ACL) if atomic_file.ACL in os.listxattr(path) else None
    return Access(found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode), acl)


def give(path: Path, access: Access) -> None:
    """Let the file have it."""
    os.chown(path, access.uid, access.gid)
    path.chmod(access.mode)
    if access.acl is not None:
        set_acl(path, atomic_file.ACL, access.acl)


def set_acl(path: Path, name: str, acl: bytes) -> None:
    """Give the file or folder an ACL, which not every file system has."""
    try:
        os.setxattr(path, name, acl)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            pytest.skip(f"{path}: no ACLs in this file system: set TMPDIR to one with them")
        raise


def acl(user_bits: int, named_bits: int, group_bits: int, mask: int) -> bytes:
    """An ACL as the kernel stores it, of owner, a named user, group and mask; others have none."""
    no_id = 0xFFFFFFFF
    entries = (
        (1, user_bits, no_id),
        (2, named_bits, STRANGER),
        (4, group_bits, no_id),
        (0x10, mask, no_id),
        (0x20, 0, no_id),
    )
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


WITH_ACL = acl(6, 6, 0, 6)
"""Its mode reads 0660, and yet the group may do nothing: the group's bits of a mode are the mask."""


@pytest.fixture
def saved() -> Iterator[Path]:
    """A file with a state in a folder that everybody can write."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o777)
        path = Path(name) / "clock.json"
        clock_state.write(path, TYPICAL)
        yield path


def as_user(uid: int, groups: list[int], action: Callable[[], Any]) -> None:
    """Do it in a child that is that user, with none of root's rights; fail with the child's traceback if it raises."""
    hear, tell = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgroups(groups)
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            action()
        except BaseException:  # noqa: BLE001  # told to the parent
            os.write(tell, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(tell)
    with open(hear, encoding="utf-8") as heard:  # noqa: PTH123  # a descriptor
        assert not heard.read()
    os.waitpid(child, 0)


@needs_root
@pytest.mark.row("P-25")
@pytest.mark.parametrize(
    "access",
    [Access(OWNER, GROUP, 0o640), Access(OWNER, 0, 0o604), Access(0, GROUP, 0o660), Access(OWNER, GROUP, 0o000)],
)
def test_root_takes_nobodys_access_away(access: Access, saved: Path) -> None:
    """A file of another owner and group, written by root, is theirs as before, also by way of a link."""
    give(saved, access)
    link = saved.with_name("latest")
    link.symlink_to(saved.name)
    clock_state.write(link, LEAST)
    assert access_of(saved) == access
    assert clock_state.read(saved) == LEAST


@needs_root
@pytest.mark.row("P-25")
@pytest.mark.parametrize(
    ("mode", "in_group", "in_no_group"),
    [
        (0o600, 0o600, 0o600),
        (0o640, 0o640, 0o600),
        (0o660, 0o660, 0o600),
        (0o664, 0o664, 0o644),
        (0o604, 0o604, 0o600),
        (0o266, 0o222, 0o222),
    ],
    ids=oct,
)
def test_others_grant_nobody_more(mode: int, in_group: int, in_no_group: int, saved: Path) -> None:
    """Who may not give the file to its owner owns it, with its group only if that is one of theirs."""
    give(saved, Access(OWNER, GROUP, mode))
    as_user(NOBODY, [GROUP], lambda: clock_state.write(saved, LEAST))
    assert access_of(saved) == (NOBODY, GROUP, in_group, None)
    give(saved, Access(OWNER, GROUP, mode))
    as_user(NOBODY, [], lambda: clock_state.write(saved, TYPICAL))
    assert access_of(saved) == (NOBODY, NOBODY, in_no_group, None)
    assert clock_state.read(saved) == TYPICAL


@needs_root
@pytest.mark.row("P-25")
@pytest.mark.parametrize(("groups", "gid", "mode"), [([GROUP], GROUP, 0o640), ([], NOBODY, 0o600)])
def test_an_owner_outside_of_the_files_group(groups: list[int], gid: int, mode: int, saved: Path) -> None:
    """An owner who has left the file's group can no longer give it to that, so the group's access ends."""
    give(saved, Access(NOBODY, GROUP, 0o640))
    as_user(NOBODY, groups, lambda: clock_state.write(saved, LEAST))
    assert access_of(saved) == (NOBODY, gid, mode, None)


@pytest.mark.row("P-25")
def test_no_mode_grants_anybody_more() -> None:
    """Of all modes, changes of owner and group, and users: nobody but the new owner may do what they could not."""
    for mode, owner_kept, group_kept in product(range(0o1000), (False, True), (False, True)):
        old = atomic_file._Access(mode, OWNER, GROUP, None)
        new = (OWNER if owner_kept else NOBODY, GROUP if group_kept else NOBODY)
        after = atomic_file._mode_elsewhere(old, os.stat_result((0, 0, 0, 1, *new, 0, 0, 0, 0)))
        assert not after & ~mode & 0o700
        for user, groups in product((OWNER, STRANGER), ([], [GROUP], [NOBODY], [GROUP, NOBODY])):
            assert not bits(after, *new, user, groups) & ~bits(mode, OWNER, GROUP, user, groups)


def bits(mode: int, uid: int, gid: int, user: int, groups: list[int]) -> int:
    """What a user may do with a file: as its owner, else as one of its group, else as one of the others."""
    return mode >> (6 if user == uid else 3 if gid in groups else 0) & 7


# Access control lists


@needs_root
@pytest.mark.row("P-25")
def test_an_acl_is_kept_with_its_owner_and_lost_without(saved: Path) -> None:
    """An ACL stays where owner and group do; where they do not, the file is its new owner's only."""
    give(saved, Access(OWNER, GROUP, 0o600, WITH_ACL))
    kept = access_of(saved)
    assert kept == (OWNER, GROUP, 0o660, WITH_ACL)
    clock_state.write(saved, LEAST)
    assert access_of(saved) == kept
    as_user(NOBODY, [GROUP], lambda: clock_state.write(saved, LEAST))
    assert access_of(saved) == (NOBODY, GROUP, 0o600, None)


@pytest.mark.row("P-25")
def test_a_folders_default_acl_is_not_for_a_file_that_is_there(saved: Path) -> None:
    """A file without an ACL, in a folder whose new files let another user in, has none after it was replaced."""
    saved.chmod(0o660)
    set_acl(saved.parent, "system.posix_acl_default", WITH_ACL)
    clock_state.write(saved, LEAST)
    assert access_of(saved) == (os.geteuid(), os.getegid(), 0o660, None)


# Killed writers


@needs_root
@pytest.mark.row("P-25")
def test_what_a_killed_root_had_given_away_is_taken_over(saved: Path) -> None:
    """A leftover that is the file's owner's already is not in root's way; what is another's is."""
    access = Access(OWNER, GROUP, 0o640)
    give(saved, access)
    leftover = saved.with_name(".clock.json.new")
    leftover.write_text("half a state, and longer than the new one" * 1000)
    give(leftover, access)
    clock_state.write(saved, LEAST)
    assert (access_of(saved), clock_state.read(saved)) == (access, LEAST)

    def refused() -> None:
        with pytest.raises(StateFileError, match="in the way and not ours"):
            clock_state.write(saved, TYPICAL)

    leftover.write_text("not ours")
    give(leftover, Access(STRANGER, GROUP, 0o666))
    refused()
    give(leftover, Access(OWNER, GROUP, 0o666))
    as_user(NOBODY, [], refused)
    assert (access_of(saved), clock_state.read(saved), leftover.read_text()) == (access, LEAST, "not ours")
