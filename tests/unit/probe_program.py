"""Running the probe for Linux as a process of its own, and reading the line that it prints."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from tests.probe_line import Line, one_line
from tests.waiting import HANG_S

__all__ = ["NOBODY", "Result", "line_of", "run_executable"]

NOBODY: Final = 65534
HERE_FIRST: Final = "import os, sys\n{}\nos.execv(sys.argv[1], sys.argv[1:])"


class Result(NamedTuple):
    """What a run of the probe printed, and its exit status."""

    status: int
    stdout: str
    stderr: str


def run_executable(program: Path, *options: str, first: str = "", nobody: bool = False) -> Result:
    """Run the probe with options.

    first: Python that its process runs before.
    nobody: as a user without rights, where this one has them.
    """
    before: Sequence[str] = (sys.executable, "-c", HERE_FIRST.format(first)) if first else ()
    is_other = nobody and os.geteuid() == 0
    done = subprocess.run(
        [*before, str(program), *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_S,
        user=NOBODY if is_other else None,
        group=NOBODY if is_other else None,
        extra_groups=[] if is_other else None,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def line_of(result: Result) -> Line:
    """The JSON object that is all of standard output, in one line."""
    assert result.status == 0, result.stderr
    (line,) = result.stdout.splitlines()
    return one_line(line)
