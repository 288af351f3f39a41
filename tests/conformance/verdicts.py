"""The rows owed, what was decided of each, and whether a run bears that out.

A person decides and docs/verdicts.tsv says so; a run can refute a verdict, and never improves one.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
ROWS_TSV, VERDICTS_TSV = ROOT / "docs" / "rows.tsv", ROOT / "docs" / "verdicts.tsv"

WHOLE, PART, DEVIATES, NOT_APPLICABLE, OPEN = "whole", "part", "deviates", "not applicable", "open"
VERDICTS = (WHOLE, PART, DEVIATES, NOT_APPLICABLE, OPEN)
CLAIMED = {WHOLE, PART, DEVIATES}
"""Verdicts that tests have to bear out."""

# What a test came to, the worst of its phases and parameters.
PASSED, SKIPPED, FAILED, ERROR = "passed", "skipped", "failed", "error"
OUTCOMES = (PASSED, SKIPPED, FAILED, ERROR)
DEFINING_TESTS_MAX = 3


class Row(NamedTuple):
    """One behaviour owed, and what was decided of it."""

    row: str
    need: str
    source: str
    claim: str
    check: str
    verdict: str
    by: str
    why: str
    """Empty for a row that is whole and needs no remark."""


class Judged(NamedTuple):
    """A test function that names a row."""

    name: str
    """Its node id below tests/, without parameters."""
    line: int
    where: str
    outcome: str


def table(file: Path) -> list[list[str]]:
    """Return a .tsv file's fields, without its first line."""
    return [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()[1:]]


def rows() -> list[Row]:
    """Return all rows in their order.

    Raises:
        ValueError: the two files do not have the same rows, each once, or a verdict is none, or lacks its reason.
    """
    lines = table(VERDICTS_TSV)
    decided = {row: (verdict, by, why) for row, verdict, by, why in lines}
    owed = table(ROWS_TSV)
    if len(decided) != len(lines):
        raise ValueError(f"{VERDICTS_TSV.name} has {len(lines)} verdicts of {len(decided)} rows")
    if unequal := decided.keys() ^ {row for row, *_ in owed}:
        raise ValueError(f"{VERDICTS_TSV.name} and {ROWS_TSV.name} differ in {', '.join(sorted(unequal))}")
    for row, (verdict, by, why) in decided.items():
        if verdict not in VERDICTS or not by or (verdict != WHOLE and not why):
            raise ValueError(f"{VERDICTS_TSV.name}: {row} is {verdict!r} by {by!r} because {why!r}")
    return [Row(row, need, source, claim, check, *decided[row]) for row, need, source, claim, check in owed]


def named() -> frozenset[str]:
    """Return the rows that tests name, whether those are run or not."""
    return frozenset(
        argument.value
        for file in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(file.read_bytes()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "row"
        for argument in node.args
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    )


def worst(outcomes: Iterable[str]) -> str:
    """Return what a test came to by its phases and parameters."""
    return max(outcomes, key=OUTCOMES.index)


def defining(tests: list[Judged], noticing: list[str], rows_of: dict[str, int]) -> list[Judged]:
    """Return the tests that say most of a row: those that its mutants die in, then those that name few others.

    noticing: the tests that the row's mutants name, as often as they do.
    rows_of: how many rows each test names.
    """
    order = sorted(tests, key=lambda test: (-noticing.count(test.name), rows_of[test.name], test.name))
    return order[:DEFINING_TESTS_MAX]


def refutation(verdict: str, tests: list[Judged], *, is_named: bool) -> str | None:
    """Return what in a run speaks against a verdict, or None; `is_named`: whether there is a test, run or not."""
    bad = [test.name for test in tests if test.outcome in {FAILED, ERROR}]
    if bad:
        return f"{len(bad)} of {len(tests)} tests failed: {', '.join(bad[:DEFINING_TESTS_MAX])}"
    return "no test names it" if verdict in CLAIMED and not tests and not is_named else None


def not_run(verdict: str, tests: list[Judged], defining_tests: list[Judged]) -> str | None:
    """Return what a run had to leave open of a verdict, or None: a test that was skipped speaks for nothing."""
    if verdict not in CLAIMED:
        return None
    if not tests:
        return "no test that names it was run"
    skipped = [test.name for test in defining_tests if test.outcome == SKIPPED]
    if not any(test.outcome == PASSED for test in tests):
        skipped = [test.name for test in tests if test.outcome == SKIPPED][:DEFINING_TESTS_MAX]
    return f"skipped: {', '.join(skipped)}" if skipped else None
