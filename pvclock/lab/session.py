"""How a command runs in the lab, from finding a kernel to ending all processes."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pvclock.errors import LabError
from pvclock.lab.inside import inner_script
from pvclock.lab.kernel import find_kernel
from pvclock.lab.machine import LabConfig, qemu_command
from pvclock.lab.streams import Streams
from pvclock.lab.tools import require_tools

__all__ = ["Outcome", "run_in_lab"]

BOOT_S = 120.0
"""Ten times what it takes on an idle host."""
POLL_S = 0.5

NOT_PASSED_ON = ("TMPDIR", "TEMP", "TMP")
"""Variables that name folders which the lab cannot write."""


class Outcome(NamedTuple):
    """A command's result: the kernel it ran on, its exit status, and the seconds from start to end."""

    kernel: str
    status: int
    seconds: float


def run_in_lab(
    command: Sequence[str],
    config: LabConfig = LabConfig(),  # noqa: B008 - immutable
    *,
    stdout: BinaryIO | None = None,
    stderr: BinaryIO | None = None,
    tell: Callable[[str], None] = lambda _text: None,
) -> Outcome:
    """Boot the lab, run `command` there, pass on its output as it comes, and return its exit status.

    tell: called with a line about downloads and the kernel.  LabError: something is missing, the lab did not boot, or
    the time limit passed.  However it ends, the lab is gone, with all that it wrote outside of config.writable.
    """
    start = time.monotonic()
    require_tools()
    kernel = find_kernel(config.kernel, tell)
    tell(f"Linux {kernel.version}, {config.cpus} CPU{'s' * (config.cpus > 1)}, {' '.join(config.kernel_parameters)}")
    with (
        tempfile.TemporaryDirectory(prefix="pvclock-lab-") as scratch,
        Streams(stdout or sys.stdout.buffer, stderr or sys.stderr.buffer, end=secrets.token_hex(16)) as streams,
    ):
        script = Path(scratch) / "inside.sh"
        script.touch(mode=0o600)  # the environment may hold secrets
        script.write_text(inner_script(command, _environment(), Path.cwd(), streams.end), encoding="utf-8")
        qemu = qemu_command(config, kernel, Path(scratch), script, streams.ports)
        with _running(qemu, streams):
            status = _wait(streams, time.monotonic(), config.timeout_s)
    return Outcome(kernel.release, status, time.monotonic() - start)


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in NOT_PASSED_ON}
    folders = (str(Path(sys.prefix) / "bin"), os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin")
    # No .pyc: folders beside the working directory are read-only.
    return kept | {"PATH": os.pathsep.join(folders), "PYTHONDONTWRITEBYTECODE": "1"}


@contextmanager
def _running(qemu: list[str], streams: Streams) -> Iterator[None]:
    # Its own session: Ctrl-C reaches this process alone.  setpriv: the kernel kills QEMU when this process is killed.
    guard = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
    with subprocess.Popen(
        [*guard, *qemu],
        stdin=subprocess.DEVNULL,
        stdout=streams.console,
        stderr=streams.console,
        pass_fds=streams.ports,
        start_new_session=True,
    ) as process:
        streams.close_writers()
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # not reaped yet, so the id is still its own


def _wait(streams: Streams, start: float, timeout_s: float) -> int:
    """Pass output on until the command exits; LabError if the lab ends before, or is too slow."""
    boot_s = min(BOOT_S, timeout_s)
    while not streams.complete:
        limit_s = timeout_s if streams.ready else boot_s
        left_s = start + limit_s - time.monotonic()
        if left_s <= 0:
            what = "the command did not end" if streams.ready else "the lab did not boot"
            raise LabError(f"{what} within {limit_s:g} s", streams.console_tail)
        if not streams.pump(min(left_s, POLL_S)):
            raise LabError("the lab ended before the command did", streams.console_tail)
        if streams.failure:
            raise LabError(f"inside the lab: {streams.failure}", streams.console_tail)
    return streams.status
