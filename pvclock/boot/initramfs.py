"""A root file system for a Linux guest that needs no disk: a cpio archive, and one with a shell in it.

Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from typing import Final

__all__ = ["archive", "with_shell"]

MAGIC: Final = b"070701"
"""The "new" format, without checksums: 13 fields of 8 hexadecimal digits follow."""
TRAILER: Final = "TRAILER!!!"

INIT: Final = b"""#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
export HOME=/ PATH=/bin
exec setsid cttyhack sh
"""
"""The console's shell is the first process; cttyhack makes the console its terminal, so that Ctrl-C works."""


def archive(files: Mapping[str, bytes]) -> bytes:
    """An archive of executable files by their paths, without the first slash; one whose content is b"" is a folder.

    A path's folders come before it.
    """
    entries = [(name, _mode(content), content) for name, content in files.items()] + [(TRAILER, 0, b"")]
    return b"".join(
        _padded(_header(number, mode, len(content), name) + name.encode() + b"\0") + _padded(content)
        for number, (name, mode, content) in enumerate(entries, start=1)
    )


def with_shell(busybox: bytes, programs: Mapping[str, bytes] | None = None) -> bytes:
    """An archive with a statically linked busybox, whose shell the kernel's console gets, and `programs` in /bin."""
    folders = dict.fromkeys(("bin", "dev", "proc", "sys", "tmp"), b"")
    further = {f"bin/{name}": content for name, content in (programs or {}).items()}
    return archive({**folders, "bin/busybox": busybox, **further, "init": INIT})


def _mode(content: bytes) -> int:
    return (stat.S_IFREG if content else stat.S_IFDIR) | 0o755


def _header(number: int, mode: int, length: int, name: str) -> bytes:
    links, name_length = 1, len(name) + 1
    fields = (number, mode, 0, 0, links, 0, length, 0, 0, 0, 0, name_length, 0)
    return MAGIC + b"".join(b"%08x" % field for field in fields)


def _padded(part: bytes) -> bytes:
    return part + bytes(-len(part) % 4)
