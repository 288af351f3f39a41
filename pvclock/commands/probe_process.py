"""Runs the probe's Linux executable in a process of its own, from memory: no file is written, and no right is needed.

It ends with the wait for it: at Ctrl-C, and if it goes on for much longer than it was to.  If this process is killed,
the kernel kills a probe that was told of it (--parent), and SIGPIPE ends any when it next says how far it is.
"""

from __future__ import annotations

import errno
import os
import re
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Final, cast

from pvclock.errors import ProbeNotRun

__all__ = ["run_probe"]

MFD_EXEC: Final = 0x10
"""Of Linux 6.3 on: the file may be executed, where vm.memfd_noexec is 1, too."""

NAME: Final = "pvclock-probe"
"""As process lists have it: it keeps all CPUs busy."""

GRACE_S: Final = 120.0
"""How much longer than asked it may take to begin and end, on a busy machine or an emulated one."""

CHUNK_BYTES: Final = 1 << 16
SAID_MAX: Final = 2000

PROGRESS: Final = re.compile(r"[\r\n]*[^\r\n]*?(\d{1,3}) ?%[^\r\n]*[\r\n]*")
ELSEWHERE: Final = (
    "write it to a folder whose programs may run, and run it there: pvclock probe --linux --output ./pvclock-probe "
    "&& ./pvclock-probe | pvclock probe --judge -"
)


def run_probe(
    program: bytes, options: Sequence[str], seconds: float, progress: Callable[[int], None] = lambda _percent: None
) -> bytes:
    """What `program`, an executable, prints when it is run with `options`; ProbeNotRun if that is not to be had.

    seconds: how long it will measure.  progress: is told how many percent are done.
    """
    with _in_memory(program) as executable, _unnamed_file() as output:
        process = _started(executable, options, output)
        with process:
            try:
                said = _heard_to_end(cast(IO[bytes], process.stderr), seconds, progress)
                process.wait()
            finally:
                process.kill()
        if process.returncode != 0:
            raise ProbeNotRun(_why_ended(process.returncode), process.returncode, said)
        output.seek(0)
        return output.read()


# Inside


@contextmanager
def _in_memory(program: bytes) -> Iterator[int]:
    """A descriptor of an unnamed file with `program`, which may be executed."""
    try:
        file = _executable_memfd()
    except OSError as error:
        raise ProbeNotRun(f"no program may be made in memory here ({_named(error)}); {ELSEWHERE}") from None
    with os.fdopen(file, "wb") as content:
        content.write(program)
        content.flush()
        yield file


def _executable_memfd() -> int:
    try:
        return os.memfd_create(NAME, os.MFD_CLOEXEC | MFD_EXEC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.memfd_create(NAME, os.MFD_CLOEXEC)  # a kernel that does not know the flag, and needs none


@contextmanager
def _unnamed_file() -> Iterator[IO[bytes]]:
    with os.fdopen(os.memfd_create("output", os.MFD_CLOEXEC), "w+b") as file:
        yield file


def _started(executable: int, options: Sequence[str], output: IO[bytes]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            [NAME, *options],
            executable=f"/proc/self/fd/{executable}",
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.PIPE,
            pass_fds=[executable],
        )
    except OSError as error:
        raise ProbeNotRun(f"a program in memory may not be run here ({_named(error)}); {ELSEWHERE}") from None


def _heard_to_end(errors: IO[bytes], seconds: float, progress: Callable[[int], None]) -> str:
    """Hear how far it is until its standard error ends; what else it said there, the last of it."""
    end_s = time.monotonic() + seconds + GRACE_S
    said = ""
    with selectors.DefaultSelector() as selector:
        selector.register(errors, selectors.EVENT_READ)
        while selector.select(end_s - time.monotonic()):
            chunk = os.read(errors.fileno(), CHUNK_BYTES)
            if not chunk:
                return said.strip()
            said += chunk.decode(errors="replace")
            for percent in PROGRESS.findall(said):
                progress(int(percent))
            said = PROGRESS.sub("", said)[-SAID_MAX:]
    raise ProbeNotRun(f"the probe was to measure for {seconds:g} s, and did not end within {GRACE_S:g} s more")


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
