"""Another process, whose memory is known here (known_memory.py); and what another user may do."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import pytest

from pvclock.meter.watch.ram_blocks import RamBlock
from pvclock.quantities import Gpa
from tests.unit import known_memory

__all__ = ["KnownProcess", "as_nobody", "known_process", "needs_last_pid", "needs_root", "with_pid"]

NOBODY: Final = 65534
LAST_PID: Final = Path("/proc/sys/kernel/ns_last_pid")
TRIES: Final = 200

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user: run as root")

needs_last_pid = pytest.mark.skipif(not LAST_PID.exists(), reason="this kernel lets nobody choose the next pid")

T = TypeVar("T")


class KnownProcess(NamedTuple):
    """Where it has the three mappings, and the number of its descriptor of the shared one."""

    process: subprocess.Popen[str]
    private: int
    shared: int
    closed: int
    shared_fd: int

    @property
    def pid(self) -> int:
        """Its id."""
        return self.process.pid

    def block(self, kind: str, gpa: int = 0) -> RamBlock:
        """Return one of the mappings as guest RAM."""
        return RamBlock(Gpa(gpa), known_memory.LENGTH, getattr(self, kind))

    def allocated(self) -> tuple[int, int]:
        """Return how much memory the shared file has, in blocks of 512 bytes, and how much of `private` is resident."""
        blocks = Path(f"/proc/{self.pid}/fd/{self.shared_fd}").stat().st_blocks
        lines = Path(f"/proc/{self.pid}/smaps").read_text(encoding="utf-8").splitlines()
        begin = next(number for number, line in enumerate(lines) if line.startswith(f"{self.private:x}-"))
        rss = next(line for line in lines[begin:] if line.startswith("Rss:"))
        return blocks, int(rss.removeprefix("Rss:").removesuffix("kB"))


@contextmanager
def known_process() -> Iterator[KnownProcess]:
    """Have one; it is killed at the end."""
    command = [sys.executable, "-S", known_memory.__file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield KnownProcess(process, **json.loads(process.stdout.readline()))
        finally:
            process.kill()


@contextmanager
def with_pid(pid: int) -> Iterator[None]:
    """Have another process that has this free pid."""
    for _ in range(TRIES):  # something else may take it first
        LAST_PID.write_text(str(pid - 1), encoding="utf-8")
        with subprocess.Popen(["sleep", "600"]) as process:
            try:
                if process.pid == pid:
                    yield
                    return
            finally:
                process.kill()
    raise AssertionError(f"no new process got pid {pid}")


def as_nobody(call: Callable[[], T]) -> T:
    """Return what `call` returns, or raise what it raises, in a child that has given up root."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            try:
                outcome: object = (call(), None)
            except Exception as error:  # noqa: BLE001  # raised by the parent
                outcome = (None, error)
            os.write(write_end, pickle.dumps(outcome))
        except BaseException:  # noqa: BLE001  # nothing of pytest may go on in the child
            traceback.print_exc()
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        found, raised = pickle.load(pipe)  # noqa: S301  # our own
    os.waitpid(child, 0)
    if raised is not None:
        raise raised
    return found  # type: ignore[no-any-return]
