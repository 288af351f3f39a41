"""Run tests again and again, each time in a child of its own, in the tree that this is started in.

A line of standard input is a JSON object with the arguments of run(); the line that answers it on standard output is
what run() returned.  pytest is imported once; what the tests use, the mutated tree, is imported by each child anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import tempfile
from collections.abc import Generator
from typing import NamedTuple

import hypothesis
import pytest

PROFILE = "mutants"
COLLECTION = "collection"


class Outcome(NamedTuple):
    """What one phase of a test, or the collection of a file, came to; a test that passed has one, of its call."""

    test: str
    phase: str
    outcome: str
    error: str
    """The exception's type, where there was one."""


class Recorder:
    """A pytest plugin for a row's tests: keeps what they came to; has hypothesis try the same examples each time."""

    def __init__(self, row: str) -> None:
        self.row = row
        self.outcomes: list[Outcome] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_configure(self) -> None:
        """Do without shrinking, too: what failed is not read by a person."""
        phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
        hypothesis.settings.register_profile(PROFILE, deadline=None, derandomize=True, database=None, phases=phases)
        hypothesis.settings.load_profile(PROFILE)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave the tests that name the row."""
        if self.row:
            items[:] = [item for item in items if any(self.row in mark.args for mark in item.iter_markers("row"))]

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
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)


def run(arguments: list[str], row: str, seconds: float, environment: dict[str, str]) -> list[Outcome] | None:
    """Run pytest with these arguments in a child process, on tests that name the row; None: it took too long."""
    with tempfile.TemporaryFile() as results, tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            os.setsid()
            os.environ.update(environment, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for standard in (1, 2):
                os.dup2(output.fileno(), standard)
            judge(arguments, row, results.fileno())
        descriptor = os.pidfd_open(child)
        ended = select.select([descriptor], [], [], seconds)[0]
        os.close(descriptor)
        for who in (os.kill, os.killpg):  # a child that has ended may have left others
            with contextlib.suppress(ProcessLookupError):
                who(child, signal.SIGKILL)
        os.waitpid(child, 0)
        results.seek(0)
        output.seek(0)
        answer, printed = results.read(), output.read().decode(errors="replace")
    if not ended:
        return None
    if not answer:
        return [Outcome("the interpreter", "life", "failed", printed[-2000:])]
    return [Outcome(*each) for each in json.loads(answer)]


def judge(arguments: list[str], row: str, results: int) -> None:
    """Run tests in this process, write down what they came to, and end it."""
    recorder = Recorder(row)
    try:
        pytest.main(["-q", "-p", "no:cacheprovider", *arguments], [recorder])
        os.write(results, json.dumps(recorder.outcomes).encode())
    finally:
        os._exit(0)


if __name__ == "__main__":
    main()
