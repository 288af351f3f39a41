"""Runs the probe's Linux executable in a process of its own, from memory: no file is written, and no right is needed.

It ends with this process's wait for it: at Ctrl-C, and if it goes on for much longer than it was to.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Final

from pvclock.errors import ProbeNotRun

__all__ = ["run_probe"]

MFD_EXEC: Final = 0x10
"""Of Linux 6.3 on: the file may be executed, where vm.memfd_noexec is 1, too."""

POLL_S: Final = 0.1
GRACE_S: Final = 120.0
"""How much longer than asked it may take to begin and end, on a busy machine or an emulated one."""

SAID_MAX: Final = 2000

ELSEWHERE: Final = (
    "write it to a folder whose programs may run, and run it there: pvclock probe --linux --output ./pvclock-probe "
    "&& ./pvclock-probe | pvclock probe --judge -"
)


def run_probe(
    program: bytes, options: Sequence[str], seconds: float, progress: Callable[[float], None] = lambda _done_s: None
) -> bytes:
    """What `program`, an executable, prints when it is run with `options`; ProbeNotRun if that is not to be had.

    seconds: how long it will measure.  progress: is told every 0.1 s for how long it has run.
    """
    with _in_memory("pvclock-probe", program) as executable, _output("stdout") as output, _output("stderr") as errors:
        status = _run_to_end(executable, options, seconds, progress, output, errors)
        said = _content(errors)[-SAID_MAX:].decode(errors="replace").strip()
        if status != 0:
            raise ProbeNotRun(_why_ended(status), status, said)
        return _content(output)


# Inside


@contextmanager
def _in_memory(name: str, program: bytes) -> Iterator[int]:
    """A descriptor of an unnamed file with `program`, which may be executed."""
    try:
        file = _executable_memfd(name)
    except OSError as error:
        raise ProbeNotRun(f"no program may be made in memory here ({_named(error)}); {ELSEWHERE}") from None
    with os.fdopen(file, "wb") as content:
        content.write(program)
        content.flush()
        yield file


def _executable_memfd(name: str) -> int:
    try:
        return os.memfd_create(name, os.MFD_CLOEXEC | MFD_EXEC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.memfd_create(name, os.MFD_CLOEXEC)  # a kernel that does not know the flag, and needs none


@contextmanager
def _output(name: str) -> Iterator[IO[bytes]]:
    with os.fdopen(os.memfd_create(name, os.MFD_CLOEXEC), "w+b") as file:
        yield file


def _content(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()


def _run_to_end(
    executable: int,
    options: Sequence[str],
    seconds: float,
    progress: Callable[[float], None],
    output: IO[bytes],
    errors: IO[bytes],
) -> int:
    """Its exit status, or the signal that ended it, below 0."""
    command = [f"/proc/self/fd/{executable}", *options]
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, pass_fds=[executable]
        )
    except OSError as error:
        raise ProbeNotRun(f"a program in memory may not be run here ({_named(error)}); {ELSEWHERE}") from None
    try:
        return _awaited(process, seconds, progress)
    finally:
        process.kill()
        process.wait()


def _awaited(process: subprocess.Popen[bytes], seconds: float, progress: Callable[[float], None]) -> int:
    began_s = time.monotonic()
    while (done_s := time.monotonic() - began_s) < seconds + GRACE_S:
        try:
            return process.wait(POLL_S)
        except subprocess.TimeoutExpired:
            progress(done_s)
    raise ProbeNotRun(f"the probe was to measure for {seconds:g} s, and did not end within {done_s:.0f} s")


def _why_ended(status: int) -> str:
    if status == -signal.SIGSYS:
        return f"a seccomp filter ended the probe (SIGSYS); {ELSEWHERE}"
    if status < 0:
        return f"the probe was ended by signal {-status} ({signal.strsignal(-status)})"
    return f"the probe failed (exit status {status})"


def _named(error: OSError) -> str:
    """Such as "EACCES: Permission denied"."""
    number = error.errno or 0
    return f"{errno.errorcode.get(number, number)}: {os.strerror(number)}"
