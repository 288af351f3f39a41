"""What a QEMU does to its guest beside stop, cont and reset: save and load."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from pvclock import StateError
from qemu_glue.errors import QmpFailed
from qemu_glue.peer.vmm import Vmm

__all__ = ["loading", "save", "saved", "wait_until_loaded"]

STREAM_LIMIT_S: Final = 60.0


@contextmanager
def saved(qemu: Vmm) -> Iterator[tuple[str, str]]:
    """The paused VM of `qemu` as a stream in memory, and the arguments with which another QEMU loads it.

    Errors of save().
    """
    fd = os.memfd_create("pvclock-stream", os.MFD_CLOEXEC)
    try:
        path = f"/proc/{os.getpid()}/fd/{fd}"
        save(qemu, path)
        yield loading(path)
    finally:
        os.close(fd)


def save(qemu: Vmm, path: str) -> None:
    """Write the VM of `qemu` to file `path` as a stream; it stands still afterwards.

    QEMU before 8.2 writes it to no file by itself, so a shell does.  QmpFailed, StateError if it cannot be saved.
    """
    qemu.execute("migrate", uri=f"exec:cat > {shlex.quote(path)}")
    _wait_until(lambda: _has_saved(qemu), "saved")


def loading(path: str) -> tuple[str, str]:
    """The arguments with which a QEMU loads the VM in that file."""
    return "-incoming", f"exec:cat {shlex.quote(path)}"


def wait_until_loaded(qemu: Vmm) -> None:
    """Return when a QEMU with -incoming has its VM; QemuExited if that failed, StateError if it does not come."""
    _wait_until(lambda: qemu.execute("query-status")["status"] != "inmigrate", "loaded")


def _has_saved(qemu: Vmm) -> bool:
    answer = qemu.execute("query-migrate")
    if answer["status"] == "failed":
        raise QmpFailed("migrate", answer.get("error-desc", "it failed"))
    return bool(answer["status"] == "completed")


def _wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + STREAM_LIMIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise StateError("save", f"QEMU has not {what} its VM after {STREAM_LIMIT_S:g} s", "try again")
        time.sleep(0.001)
