"""A pytest plugin that holds the verdicts of docs/verdicts.tsv against a run, and writes down what it found.

`make conformance` runs all tests with `-p tests.conformance.plugin --conformance docs`: conformance.json and
conformance.md.  The exit status is not 0 when a verdict was refuted.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import re
from collections import Counter, defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.conformance import page, verdicts
from tests.mutants.mutant import load
from tests.revision import revision

ROWS, WHERE = "conformance rows", "conformance where"  # of a report's user_properties
WHOLE_RUNS = {pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED}
KVM = Path("/dev/kvm")


class Key(NamedTuple):
    """A test function."""

    name: str
    line: int
    where: str


class Conformance:
    """Collects what tests came to, by row."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outcomes: dict[Key, set[str]] = defaultdict(set)
        self.rows: dict[Key, set[str]] = defaultdict(set)
        self.lost: list[str] = []
        """Tests whose process died, and files that could not be collected: it is not known which rows they name."""
        self.refuted: list[str] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Keep a file that cannot be collected, which each process of pytest -n says; others go on without it."""
        if report.failed and report.nodeid not in self.lost:
            self.lost.append(report.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """File one phase of a test under its rows: what setup or teardown came to counts, unless they passed."""
        if report.when != "call" and report.passed:
            return
        said = dict(report.user_properties)
        if WHERE not in said:
            self.lost.append(report.nodeid)
            return
        line = report.location[1] or 0
        name = report.nodeid.partition("[")[0].removeprefix("tests/")
        key = Key(name, line + 1, str(said[WHERE]))
        self.rows[key].update(str(said[ROWS]).split())
        self.outcomes[key].add(outcome_of(report))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write both files; a refuted verdict fails the run.  One that was broken off says nothing, and writes none."""
        if session.exitstatus not in WHOLE_RUNS or not (self.outcomes or self.lost):
            return
        found = self.found()
        (self.folder / "conformance.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (self.folder / "conformance.md").write_text(page.markdown(found, self.folder), encoding="utf-8")
        self.refuted = [f"{row['row']} ({row['verdict']}): {row['refuted']}" for row in found["rows"] if row["refuted"]]
        if self.refuted and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say which verdicts were refuted."""
        for line in self.refuted:
            terminalreporter.line(f"REFUTED {line}", red=True)

    def found(self) -> dict[str, Any]:
        """Return what conformance.json holds."""
        tests: dict[str, list[verdicts.Judged]] = defaultdict(list)
        for key, outcomes in sorted(self.outcomes.items()):
            for name in self.rows[key]:
                tests[name].append(verdicts.Judged(*key, verdicts.worst(outcomes)))
        noticing: dict[str, list[str]] = defaultdict(list)
        mutants = load()
        for mutant in mutants:
            noticing[mutant.row] += mutant.dies_in
        rows_of = {key.name: len(names) for key, names in self.rows.items()}
        count = Counter(mutant.row for mutant in mutants)
        named = verdicts.named()
        rows = []
        for row in verdicts.rows():
            of_row = tests[row.row]
            first = verdicts.defining(of_row, noticing[row.row], rows_of)
            others = [test for test in of_row if test not in first]
            rows.append(
                row._asdict()
                | {"refuted": verdicts.refutation(row.verdict, of_row, is_named=row.row in named)}
                | {"not_run": verdicts.not_run(row.verdict, of_row, first), "mutants": count[row.row]}
                | {"defining": [test._asdict() for test in first], "others": [test._asdict() for test in others]}
            )
        return {"run": this_run(), "lost": self.lost, "rows": rows}


def outcome_of(report: pytest.TestReport) -> str:
    """Return what one phase of a test came to; a test that is expected to fail passes for nothing."""
    if report.failed:
        return verdicts.FAILED if report.when == "call" else verdicts.ERROR
    return verdicts.SKIPPED if report.skipped or hasattr(report, "wasxfail") else verdicts.PASSED


def this_run() -> dict[str, str]:
    """Return of what and where this run is."""
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    has_kvm = "with" if os.access(KVM, os.R_OK | os.W_OK) else "without"
    return {
        "commit": revision(),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "host": f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} CPUs, {has_kvm} {KVM}",
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Give a report what the item's marks say of it, for it may go to another process."""
    report = yield
    rows = " ".join(row for mark in item.iter_markers("row") for row in mark.args)
    where = "real vCPU" if item.get_closest_marker("kvm") else "library"
    report.user_properties += [(ROWS, rows), (WHERE, where)]
    return report


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare --conformance."""
    parser.addoption("--conformance", type=Path, metavar="FOLDER", help="write conformance.json and .md to FOLDER")


def pytest_configure(config: pytest.Config) -> None:
    """Collect, if asked to."""
    folder = config.getoption("--conformance")
    if folder and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Conformance(folder))
