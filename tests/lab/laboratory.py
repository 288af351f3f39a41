"""Running `pvclock lab` as a user does, and seeing what it leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from pvclock.errors import LabError
from pvclock.lab.kernel import Kernel, find_kernel
from pvclock.lab.tools import require_tools

ROOT = Path(__file__).parents[2]
LIMIT_S = 600.0
PROGRAM = """
import signal, sys
from pvclock.commands import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would we
sys.exit(main())
"""


class Result(NamedTuple):
    """What a run of `pvclock lab` printed, and its exit status."""

    status: int
    stdout: str
    stderr: str


def lab_command(*arguments: str | Path) -> list[str]:
    """Return the command line of `pvclock lab`."""
    return [sys.executable, "-c", PROGRAM, "lab", *map(str, arguments)]


def run_lab(*arguments: str | Path, scratch: Path, cwd: Path = ROOT, **variables: str) -> Result:
    """Run `pvclock lab` with its temporary files in `scratch`; no file and no process may be left."""
    environment = {**os.environ, "TMPDIR": str(scratch), **variables}
    done = subprocess.run(
        lab_command(*arguments),
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    assert_nothing_left(scratch)
    return Result(done.returncode, done.stdout, done.stderr)


def assert_nothing_left(scratch: Path) -> None:
    """No file of a lab is in `scratch`, and no process has one on its command line."""
    assert list(scratch.iterdir()) == []
    assert processes_naming(scratch) == []


def processes_naming(path: Path) -> list[str]:
    """Return the command lines of running processes that name `path`."""
    lines = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(process.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
    return [line for line in lines if str(path) in line]


def usable_kernel() -> Kernel:
    """Return the lab's kernel, downloaded if need be; skip the test where there can be no lab."""
    try:
        require_tools()
        return find_kernel(None, lambda _text: None)
    except LabError as error:
        pytest.skip(f"no lab here: {error}")
