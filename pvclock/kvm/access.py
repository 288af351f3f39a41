"""Why can this process not open /dev/kvm, and what helps?

For most reasons the errno says it.  For EACCES the device's owner, group and mode do: joining a group helps only where
the device has a group of its own that may read and write.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
from contextlib import suppress
from typing import Final

__all__ = ["ADVICE", "advice"]

DEVICE: Final = "/dev/kvm"

ADVICE: Final = {
    errno.ENOENT: "load the kvm_intel or kvm_amd module and enable virtualisation in the firmware (in a VM: nested "
    "virtualisation; in a container: start it with --device /dev/kvm)",
    errno.EACCES: "run as root",
    errno.EPERM: "the container's device policy forbids it: start the container with --device /dev/kvm",
    errno.EBUSY: "another hypervisor (VirtualBox, VMware) uses the CPU's virtualisation; stop its VMs first",
    errno.ENODEV: "the CPU's virtualisation is off or in use; enable it in the firmware",
}

GROUP_MAY: Final = stat.S_IRGRP | stat.S_IWGRP
OTHERS_MAY: Final = stat.S_IROTH | stat.S_IWOTH


def advice(path: str, reason: int) -> str:
    """How to fix the errno `reason` of opening the device at `path`; empty if nothing is known to help."""
    if path != DEVICE and reason != errno.EACCES:
        return f"KVM's device is {DEVICE}"
    if reason == errno.EACCES:
        with suppress(OSError):  # a folder above it is locked
            return _how_to_get_the_right(path, os.stat(path))  # noqa: PTH116  # follows links, as open does
    return ADVICE.get(reason, "")


def _how_to_get_the_right(path: str, device: os.stat_result) -> str:
    group = _group_name(device.st_gid)
    permissions = stat.S_IMODE(device.st_mode)
    found = f"it is {_user_name(device.st_uid)}:{group}, mode {permissions:04o}"
    if permissions & OTHERS_MAY == OTHERS_MAY:
        return f"{found}, which allows it, so a security module (AppArmor, SELinux) or a folder above it forbids it"
    if permissions & GROUP_MAY == GROUP_MAY and device.st_gid != 0:
        if _is_listed(group):
            return f"{found}, and you were put into that group after this login: log in again, or newgrp {group}"
        return f"{found}: run as root, or join that group: sudo usermod -aG {group} $USER, then log in again"
    opened = f"sudo chgrp kvm {path}; sudo chmod 0660 {path}; sudo usermod -aG kvm $USER"
    return f"{found}, so no group's member may open it: run as root, or open it to one: {opened}; then log in again"


def _is_listed(group: str) -> bool:
    """Does the system's list have this user in `group`, whatever this process's own groups are?"""
    with suppress(KeyError):
        return _user_name(os.geteuid()) in grp.getgrnam(group).gr_mem
    return False


def _user_name(uid: int) -> str:
    with suppress(KeyError):
        return pwd.getpwuid(uid).pw_name
    return str(uid)


def _group_name(gid: int) -> str:
    with suppress(KeyError):
        return grp.getgrgid(gid).gr_name
    return str(gid)
