"""Run tests again and again, each time in a child of its own, in the tree that this is started in.

A line of standard input is a JSON object with the arguments of run(); the line that answers it on standard output is
what run() returned.  pytest is imported once; what the tests use, the mutated tree, is imported by each child anew.
Nobody sends a request before the last one was answered; where standard input ends meanwhile, the tests are killed.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest

PROFILE = "mutants"
COLLECTION = "collection"
PR_SET_CHILD_SUBREAPER = 36
CHILDREN = Path(f"/proc/self/task/{os.getpid()}/children")
WHOLE_RUNS = {pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED}


class Outcome(NamedTuple):
    """What one phase of a test, or the collection of a file, came to; a test that passed has one, of its call."""

    test: str
    phase: str
    outcome: str
    error: str
    """The exception's type, where there was one."""


class Recorder:
    """A pytest plugin for rows' tests: keeps what they came to; has hypothesis try the same examples each time."""

    def __init__(self, rows: list[str]) -> None:
        self.rows = set(rows)
        self.outcomes: list[Outcome] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_configure(self) -> None:
        """Do without shrinking, too: what failed is not read by a person."""
        hypothesis.settings.register_profile(
            PROFILE,
            deadline=None,
            derandomize=True,
            database=None,
            phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
            suppress_health_check=[hypothesis.HealthCheck.too_slow],  # else a busy machine would notice a mutant
        )
        hypothesis.settings.load_profile(PROFILE)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave the tests that name one of the rows, or all where there are none."""
        if self.rows:
            items[:] = [item for item in items if any(self.rows & {*mark.args} for mark in item.iter_markers("row"))]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Keep what could not be collected."""
        if report.failed:
            self.outcomes.append(Outcome(report.nodeid, COLLECTION, "failed", str(report.longrepr)))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Keep each test's call, and of its setup and teardown what did not pass."""
        report = yield
        if report.when == "call" or not report.passed:
            error = call.excinfo.typename if call.excinfo else ""
            self.outcomes.append(Outcome(item.nodeid, str(report.when), report.outcome, error))
        return report


def main() -> None:
    """Answer requests until standard input ends."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)


def run(arguments: list[str], rows: list[str], seconds: float, environment: dict[str, str]) -> list[Outcome] | None:
    """Run pytest with these arguments in a child process, on tests that name such a row; None: it took too long."""
    with (
        tempfile.TemporaryFile() as results,
        tempfile.TemporaryFile() as output,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch,
    ):
        child = os.fork()
        if child == 0:
            os.setsid()
            os.environ.update(environment, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", TMPDIR=scratch)
            tempfile.tempdir = None  # what was found before the fork
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for standard in (1, 2):
                os.dup2(output.fileno(), standard)
            judge([f"--basetemp={scratch}/pytest", *arguments], rows, results.fileno())
        has_ended = wait_and_kill(child, seconds)
        results.seek(0)
        output.seek(0)
        answer, printed = results.read(), output.read().decode(errors="replace")
    if not has_ended:
        return None
    if not answer:
        return [Outcome("the interpreter", "life", "failed", printed[-2000:])]
    status, found = json.loads(answer)
    outcomes = [Outcome(*each) for each in found]
    if status not in WHOLE_RUNS and not any(each.outcome == "failed" for each in outcomes):
        outcomes.append(Outcome("pytest", "run", "failed", printed[-2000:]))
    return outcomes


def wait_and_kill(child: int, seconds: float) -> bool:
    """Wait for a child, and kill what is left of it and its descendants; return whether it ended in time.

    Raises:
        SystemExit: standard input ended first, so that nobody waits for an answer.
    """
    descriptor = os.pidfd_open(child)
    ready = select.select([descriptor, sys.stdin.fileno()], [], [], seconds)[0]
    os.close(descriptor)
    while children := CHILDREN.read_text().split():  # what loses its parent becomes one of this process
        for each in map(int, children):
            os.kill(each, signal.SIGKILL)
            os.waitpid(each, 0)
    if sys.stdin.fileno() in ready:
        sys.exit()
    return bool(ready)


def judge(arguments: list[str], rows: list[str], results: int) -> None:
    """Run tests in this process, write down what pytest's status is and what they came to, and end it."""
    recorder = Recorder(rows)
    try:
        status = pytest.main(["-q", "-p", "no:cacheprovider", *arguments], [recorder])
        os.write(results, json.dumps([status, recorder.outcomes]).encode())
    finally:
        os._exit(0)


if __name__ == "__main__":
    main()
