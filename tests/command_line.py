"""Running `pvclock` in a process of its own, as a shell does: with streams closed, full or unread, as nobody."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
import termios
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from pvclock.commands import main
from tests.waiting import HANG_S

ROOT = Path(__file__).parents[1]
NOBODY = 65534
AS_NOBODY = f"""
import contextlib, io, os, sys
from pvclock.commands import main
with contextlib.redirect_stdout(io.StringIO()):
    for arguments in (["--help"], ["doctor"], ["doctor", "--json"]):
        main(arguments)  # imports what {NOBODY} might not be allowed to read
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid({NOBODY})
    os.setuid({NOBODY})
sys.exit(main())
"""


class Result(NamedTuple):
    """What a run of `pvclock` printed, and its exit status as a shell has it."""

    status: int
    stdout: str
    stderr: str


def command(*arguments: str, nobody: bool = False) -> list[str]:
    """The command line of `pvclock`; `nobody`: as a user without rights, where this one has them."""
    return [sys.executable, *(("-c", AS_NOBODY) if nobody else ("-m", "pvclock")), *arguments]


def run_python(*arguments: str | Path, redirect: str = "") -> subprocess.CompletedProcess[str]:
    """Run this Python with this tree's pvclock; `redirect` is a shell's ("| head -1", ">/dev/full")."""
    return subprocess.run(
        ["sh", "-c", f'"$@" {redirect}', "sh", sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )


def run_pvclock(*arguments: str, redirect: str = "", nobody: bool = False, **variables: str | None) -> Result:
    """Run `pvclock`; `redirect` is a shell's (">&-", "2>/dev/full"), a variable that is None is unset."""
    changed = {**os.environ, "COLUMNS": None, **variables}
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirect}', "sh", *command(*arguments, nobody=nobody)],
        cwd=ROOT,
        env={name: value for name, value in changed.items() if value is not None},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_S,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def in_terminal(*arguments: str, columns: int = 80, **variables: str) -> str:
    """What `pvclock` shows in a terminal of so many columns."""
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        ["sh", "-c", f'stty cols {columns} rows 24; exec "$@"', "sh", *command(*arguments)],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        env={**environment, "TERM": "dumb", "NO_COLOR": "1", **variables},
    ):
        os.close(theirs)
        text = _read_to_end(ours).decode()
    os.close(ours)
    return text


def in_terminal_here(*arguments: str) -> str:
    """What `pvclock` shows in a terminal of 80 columns, in this process: for commands that do no more than show."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with ThreadPoolExecutor(1) as pool:
        shown = pool.submit(_read_to_end, ours)  # meanwhile: a terminal takes some KiB at once
        with os.fdopen(theirs, "w", encoding="utf-8") as terminal, contextlib.redirect_stdout(terminal):
            main(list(arguments))
        text = shown.result().decode()
    os.close(ours)
    return text


def _read_to_end(terminal: int) -> bytes:
    """All that comes out of a terminal until nobody has it open any more, which Linux tells by EIO."""
    text = b""
    with contextlib.suppress(OSError):
        while data := os.read(terminal, 1 << 16):
            text += data
    return text
