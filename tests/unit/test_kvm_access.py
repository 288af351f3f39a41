"""Why /dev/kvm does not open, and that the advice fits the device that is there: a file stands for it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pvclock.kvm import access
from pvclock.kvm.access import advice

pytestmark = pytest.mark.row("E13")

GROUP = os.getgid() or 1
"""A group that a file of ours can be given, and that is not root's."""

Device = Callable[[int, int], str]


@pytest.fixture
def device(tmp_path: Path) -> Device:
    """Return what makes a file of a group, with a mode, and gives its path."""

    def make(group: int, mode: int) -> str:
        path = tmp_path / "kvm"
        path.touch()
        if group != path.stat().st_gid:
            os.chown(path, -1, group)
        path.chmod(mode)
        return str(path)

    return make


def test_a_group_that_can_be_joined(device: Device) -> None:
    """Where the device's group may read and write, joining that group helps, whatever it is called."""
    told = advice(device(GROUP, 0o660), errno.EACCES)
    name = access._group_name(GROUP)
    assert told.startswith(f"it is {access._user_name(os.geteuid())}:{name}, mode 0660: run as root, or join")
    assert f"sudo usermod -aG {name} $USER, then log in again" in told


def test_a_group_that_was_joined_after_the_login(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is in it already has to log in again."""
    monkeypatch.setattr(access, "_is_listed", lambda _group: True)
    told = advice(device(GROUP, 0o660), errno.EACCES)
    assert "log in again" in told
    assert "usermod" not in told


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o620, 0o000])
def test_a_group_that_may_not(device: Device, mode: int) -> None:
    """Where the group may not, to join it cannot help: the device is to be given to a group first."""
    path = device(GROUP, mode)
    told = advice(path, errno.EACCES)
    assert f"mode {mode:04o}, so no group's member may open it" in told
    assert f"sudo chgrp kvm {path}; sudo chmod 0660 {path}; sudo usermod -aG kvm $USER" in told


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to its group: run the tests as root")
def test_roots_own_group_is_not_to_be_joined(device: Device) -> None:
    """root:root is no group for users, though it may read and write."""
    told = advice(device(0, 0o660), errno.EACCES)
    assert "root:root, mode 0660, so no group's member may open it" in told
    assert "usermod -aG root" not in told


def test_a_mode_that_allows_it(device: Device) -> None:
    """Where everybody may by the mode, it is not the mode."""
    told = advice(device(GROUP, 0o666), errno.EACCES)
    assert "mode 0666, which allows it, so a security module" in told


def test_a_device_that_cannot_be_looked_at() -> None:
    """Where not even its mode can be seen, there is what always helps."""
    assert advice("/nonexistent/kvm", errno.EACCES) == "run as root"


def test_an_unknown_reason() -> None:
    """Where nothing is known to help, nothing is said."""
    assert advice("/dev/kvm", errno.EIO) == ""


def test_who_is_listed() -> None:
    """A user is in a group by the system's list; a group that is not there has nobody."""
    assert not access._is_listed("no-such-group")
    assert access._group_name(2**31 - 7) == str(2**31 - 7)
    assert access._user_name(2**31 - 7) == str(2**31 - 7)
