"""The programs that the lab needs, and the commands that install them."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec

from pvclock.errors import LabError

__all__ = ["find_program", "install_commands", "require_tools"]

SYSTEM_FOLDERS = ("/usr/sbin", "/sbin")
"""modprobe and depmod are here; a user's PATH may lack these folders."""

PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "modprobe": "kmod",
    "depmod": "kmod",
    "file": "file",  # virtme-ng asks it for the kernel's version
}
"""Program: the Debian package that has it."""


def find_program(name: str) -> str | None:
    """A program's path, or None; PATH is searched first."""
    path = os.environ.get("PATH", os.defpath)
    if not path:
        return None
    return shutil.which(name, path=os.pathsep.join((path, *SYSTEM_FOLDERS)))


def install_commands() -> list[str]:
    """The commands that install the missing programs: Debian's packages as root, and virtme-ng."""
    packages = sorted({package for program, package in PROGRAMS.items() if not find_program(program)})
    commands = [f"apt-get install -y {' '.join(packages)}"] if packages else []
    return commands if find_spec("virtme") else [*commands, "pip install virtme-ng"]


def require_tools() -> None:
    """Raise LabError, with the commands that help, if a program is missing."""
    if commands := install_commands():
        raise LabError(f"not all of the lab's programs are here; as root (Debian, Ubuntu): {' && '.join(commands)}")
