"""C programs in which readers race a writer: built from tests/native/, and run until there was something to count."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import HANG_S

ROOT = Path(__file__).parents[2]
INCLUDE = ROOT / "pvclock" / "include"
COMPILE = ("cc", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread")

Report = dict[str, Any]
Stress = Callable[..., Report]

needs_two_cpus = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="a race needs two CPUs: widen the affinity (taskset -c 0,1)"
)


def built(name: str, folder: Path) -> Stress:
    """Build the program `name` in a folder; return a function that runs it: flags as they are, options as keywords."""
    program = folder / name
    source = ROOT / "tests" / "native" / f"{name}.c"
    subprocess.run([*COMPILE, f"-I{INCLUDE}", str(source), "-o", str(program)], check=True)

    def run(*flags: str, **options: str | float) -> Report:
        arguments = [*flags, *(f"--{option.replace('_', '-')}={value}" for option, value in options.items())]
        done = subprocess.run([program, *arguments], check=True, capture_output=True, timeout=HANG_S)
        report: Report = json.loads(done.stdout)
        return report

    return run


def runs() -> Iterator[int]:
    """Numbers of runs, for HANG_S; one is enough unless other programs keep both threads from running at once."""
    end_s = time.monotonic() + HANG_S
    for number in count():
        if time.monotonic() > end_s:
            return
        yield number


def race(stress: Stress, least: dict[str, int], **options: str | float) -> list[Report]:
    """Run the program until its reports add up to the least counts, on however slow a machine."""
    reports: list[Report] = []
    for _ in runs():
        reports.append(stress(**options))
        if all(sum(report[name] for report in reports) >= enough for name, enough in least.items()):
            return reports
    pytest.fail(f"nothing was raced: {reports[-1]}")
