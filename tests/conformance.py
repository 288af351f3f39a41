"""A pytest plugin that writes docs/conformance.md: every row owed, and the tests that prove it.

`make conformance` runs all tests with `-p tests.conformance --conformance docs/conformance.md`.  A row without a
passing test is listed as open, one with a test that is expected to fail as deviating.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import Literal, NamedTuple

import pytest

ROWS_TSV = Path(__file__).parents[1] / "docs" / "rows.tsv"

ROWS, WHERE = "conformance rows", "conformance where"  # of a report's user_properties

HEAD = """# Conformance

Written by `make conformance`; do not edit. Each row of [rows.tsv](rows.tsv) with the tests that name it. **Where**:
*library* is the engine on a simulated host or in this process, *real vCPU* is a guest on /dev/kvm. A row may be
proven in part only: its tests say what they check. Rows without a passing test are *open*. A row *deviates* where a
test with the right value is expected to fail: [interfaces.md](interfaces.md#deviations) says what is done instead.

VMCALL, #UD and RDTSC exits never reach user space on KVM; rows about them can be proven in the library alone.
"""


class Proof(NamedTuple):
    """One test's outcome, for the rows that it names."""

    test: str
    where: str
    outcome: Literal["passes", "deviates", "fails"]


def outcome_of(report: pytest.TestReport) -> Literal["passes", "deviates", "fails"]:
    """Return what a test's call says: an expected failure is a deviation."""
    if report.skipped and hasattr(report, "wasxfail"):
        return "deviates"
    return "passes" if report.passed else "fails"


class Conformance:
    """Collects outcomes by row."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.proofs: dict[str, set[Proof]] = defaultdict(set)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """File a test's outcome under its rows."""
        if report.when != "call":
            return
        proven = dict(report.user_properties)
        proof = Proof(report.nodeid.partition("[")[0], str(proven[WHERE]), outcome_of(report))
        for row in str(proven[ROWS]).split():
            self.proofs[row].add(proof)

    def pytest_sessionfinish(self) -> None:
        """Write the document."""
        self.target.write_text(self.document(), encoding="utf-8")

    def document(self) -> str:
        """The whole of it."""
        rows = [line.split("\t") for line in ROWS_TSV.read_text(encoding="utf-8").splitlines()[1:]]
        lines = [self.line(row, need, claim) for row, need, _, claim, *_ in rows]
        count = Counter(result for result in ("open", "deviates") for line in lines if f"| {result} |" in line)
        proven = len(rows) - count.total()
        head = f"{HEAD}\n{proven} of {len(rows)} rows have a passing test; {count['deviates']} deviate.\n\n"
        return (
            head
            + "| row | need | claim | where | result | tests |\n|---|---|---|---|---|---|\n"
            + "\n".join(lines)
            + "\n"
        )

    def line(self, row: str, need: str, claim: str) -> str:
        """One row of the table."""
        proofs = self.proofs[row]
        failed = {proof.test for proof in proofs if proof.outcome == "fails"}
        outcomes = {proof.outcome for proof in proofs}
        verdict = "deviates" if "deviates" in outcomes else "passes"
        result = "open" if not proofs else f"FAILS: {len(failed)}" if failed else verdict
        where = ", ".join(sorted({proof.where for proof in proofs}))
        tests = "<br>".join(sorted({proof.test.removeprefix("tests/") for proof in proofs}))
        return f"| {row} | {need} | {claim.replace('|', '&#124;')} | {where} | {result} | {tests} |"


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
    parser.addoption("--conformance", type=Path, metavar="FILE", help="write the table of rows to FILE")


def pytest_configure(config: pytest.Config) -> None:
    """Collect, if asked to."""
    target = config.getoption("--conformance")
    if target and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Conformance(target))
