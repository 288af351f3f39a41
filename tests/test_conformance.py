"""A verdict is a person's: a run can refute it, and never makes it better than it is."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import revision
from tests.conformance import page, verdicts
from tests.conformance.verdicts import ERROR, FAILED, PASSED, SKIPPED, Judged

pytestmark = pytest.mark.row("style")

ROOT = verdicts.ROOT


def a_test(outcome: str, name: str = "unit/test_it.py::test_it") -> Judged:
    """Return a test that came to this."""
    return Judged(name, 1, "library", outcome)


@pytest.mark.parametrize("verdict", verdicts.VERDICTS)
@pytest.mark.parametrize(
    ("tests", "is_refuted", "is_run"),
    [
        ([], True, False),
        ([PASSED], False, True),
        ([PASSED, SKIPPED], False, False),
        ([SKIPPED], False, False),
        ([PASSED, FAILED], True, True),
        ([PASSED, ERROR], True, True),
        ([PASSED, PASSED, PASSED, SKIPPED], False, True),
        ([SKIPPED, SKIPPED, SKIPPED, PASSED], False, False),
    ],
)
def test_what_a_run_says_of_a_verdict(verdict: str, tests: list[str], *, is_refuted: bool, is_run: bool) -> None:
    """No test at all, or a failure anywhere, refutes; a skip, or tests that were not run, leave it open.

    Open rows are refuted by failures alone.
    """
    those = [a_test(outcome) for outcome in tests]
    first = those[: verdicts.DEFINING_TESTS_MAX]
    needs_proof = verdict in {"whole", "part", "deviates"}
    refutation = verdicts.refutation(verdict, those, is_named=False)
    assert (refutation is not None) is (is_refuted and (needs_proof or tests != []))
    if not tests:
        assert verdicts.refutation(verdict, those, is_named=True) is None
    assert (verdicts.not_run(verdict, those, first) is None) is (is_run or not needs_proof)


def test_the_worst_of_a_tests_outcomes_counts() -> None:
    """Of its parameters and phases: an error in the fixture of one outweighs all that passed."""
    assert verdicts.worst([PASSED, SKIPPED]) == SKIPPED
    assert verdicts.worst([FAILED, PASSED, SKIPPED]) == FAILED
    assert verdicts.worst([PASSED, ERROR, FAILED]) == ERROR


def test_the_defining_tests_are_those_that_mutants_die_in() -> None:
    """Then those that name the fewest rows; three at most."""
    tests = [a_test(PASSED, name) for name in ("a", "b", "c", "d", "e")]
    rows_of = {"a": 9, "b": 2, "c": 1, "d": 5, "e": 3}
    assert [it.name for it in verdicts.defining(tests, ["d", "a", "d"], rows_of)] == ["d", "a", "c"]
    assert [it.name for it in verdicts.defining(tests[:2], [], rows_of)] == ["b", "a"]


def test_every_row_has_a_verdict() -> None:
    """And each that is not whole a reason, and somebody who decided."""
    rows = verdicts.rows()
    assert len(rows) > 250
    assert {row.row for row in rows if row.verdict not in verdicts.VERDICTS or not row.by} == set()
    assert {row.row for row in rows if row.verdict != verdicts.WHOLE and not row.why} == set()


def test_a_deviations_reason_is_in_a_document() -> None:
    """Each links to it, and whatever a verdict links to is there."""
    rows = verdicts.rows()
    assert {row.row for row in rows if row.verdict == verdicts.DEVIATES and not page.DOCUMENT.search(row.why)} == set()
    links = {link for row in rows for link in page.DOCUMENT.findall(row.why)}
    assert links
    assert {link for link in links if not leads_somewhere(link)} == set()


def leads_somewhere(link: str) -> bool:
    """Whether a document is there, and a heading of the link's anchor in it."""
    name, _, anchor = link.partition("#")
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    headings = [line.lstrip("#").strip() for line in text.splitlines() if line.startswith("#")]
    return not anchor or anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("line", ["K-01\tpasses\tsomebody\t", "K-01\tpart\tsomebody\t", "K-01\twhole\t\t"])
def test_a_verdict_that_is_none_is_refused(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another word, no reason, or nobody who decided; and a row that the other file lacks."""
    for name, text in (("VERDICTS_TSV", line), ("ROWS_TSV", "K-01\tmust\tseed\tclaim\t")):
        (tmp_path / name).write_text(f"head\n{text}\n")
        monkeypatch.setattr(verdicts, name, tmp_path / name)
    with pytest.raises(ValueError, match="VERDICTS_TSV: K-01 is"):
        verdicts.rows()
    (tmp_path / "ROWS_TSV").write_text("head\n")
    with pytest.raises(ValueError, match="differ in K-01"):
        verdicts.rows()
    (tmp_path / "VERDICTS_TSV").write_text("head\nK-01\twhole\tus\t\nK-01\topen\tus\twhy\n")
    with pytest.raises(ValueError, match="has 2 verdicts of 1 rows"):
        verdicts.rows()


TESTS = """\
import os
import pytest

@pytest.fixture
def broken():
    raise RuntimeError

@pytest.fixture
def ends_badly():
    yield
    raise RuntimeError

@pytest.mark.row("K-01")
def test_whose_fixture_fails(broken):
    pass

@pytest.mark.row("K-02")
def test_whose_fixture_ends_badly(ends_badly):
    pass

@pytest.mark.row("K-03")
def test_that_skips_itself():
    pytest.skip("no device")

@pytest.mark.row("K-04")
@pytest.mark.skipif(True, reason="no device")
def test_without_a_device():
    pass

@pytest.mark.row("K-05")
@pytest.mark.xfail(strict=True)
def test_that_is_expected_to_fail():
    assert False

@pytest.mark.row("K-06", "E6")
@pytest.mark.kvm
def test_that_passes():
    assert True

@pytest.mark.row("K-07")
@pytest.mark.xfail(strict=False)
def test_that_passes_and_was_not_expected_to():
    assert True

@pytest.mark.row("K-08")
def test_that_takes_its_process_along():
    if "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)
"""


def run_of_tests(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run TESTS in a folder, and have the plugin write there."""
    (folder / "test_it.py").write_text(TESTS)
    plugin = ["-p", "tests.conformance.plugin", "--conformance", str(folder), "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", *plugin, *arguments, "test_it.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_what_is_no_pass_in_a_real_run(tmp_path: Path) -> None:
    """A fixture's error, a skip anywhere and a missing device; a row that is open stays so, whatever passes."""
    (tmp_path / "test_none.py").write_text("import nothing_of_this_name")
    done = run_of_tests(tmp_path, "-n1", "test_none.py")
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout
    assert "REFUTED K-01 (whole): 1 of 1 tests failed: test_it.py::test_whose_fixture_fails" in done.stdout
    found = json.loads((tmp_path / "conformance.json").read_text())
    rows = {row["row"]: row for row in found["rows"]}
    outcomes = [rows[f"K-0{number}"]["defining"][0]["outcome"] for number in range(1, 8)]
    assert outcomes == [ERROR, ERROR, SKIPPED, SKIPPED, SKIPPED, PASSED, SKIPPED]
    assert [rows[f"K-0{number}"]["refuted"] is None for number in range(1, 7)] == [False, False, True, True, True, True]
    assert [rows[f"K-0{number}"]["not_run"] is None for number in range(1, 7)] == [
        True,
        True,
        False,
        False,
        False,
        True,
    ]
    assert rows["E6"]["verdict"] == verdicts.OPEN
    assert rows["K-06"]["defining"][0] == {
        "name": "test_it.py::test_that_passes",
        "line": TESTS[: TESTS.index('@pytest.mark.row("K-06"')].count("\n") + 1,
        "where": "real vCPU",
        "outcome": PASSED,
    }
    assert found["lost"] == ["test_none.py", "test_it.py::test_that_takes_its_process_along"]
    assert (rows["K-08"]["refuted"], rows["K-08"]["not_run"]) == (None, "no test that names it was run")
    assert (tmp_path / "conformance.md").read_text() == page.markdown(found, tmp_path)


@pytest.mark.parametrize("arguments", [["--collect-only"], ["-k", "nothing_of_this_name"], ["test_none.py"]])
def test_a_run_that_is_none_writes_nothing(arguments: list[str], tmp_path: Path) -> None:
    """Nor does one that was broken off: it would refute whatever it had not come to."""
    (tmp_path / "test_none.py").write_text("import nothing_of_this_name")
    run_of_tests(tmp_path, *arguments)
    assert [file.name for file in tmp_path.glob("conformance.*")] == []


def a_row(**changes: Any) -> dict[str, Any]:  # noqa: ANN401 - a field's value
    """Return a row as conformance.json has it."""
    row: dict[str, Any] = {"row": "K-01", "need": "must", "source": "a seed", "claim": "c [x] | y", "check": "looks"}
    row |= {"verdict": "whole", "by": "us", "why": "", "refuted": None, "not_run": None, "mutants": 3}
    row |= {"defining": [a_test(PASSED)._asdict()], "others": [a_test(PASSED)._asdict()]}
    return row | changes


def test_a_page_says_it_all(tmp_path: Path) -> None:
    """Totals by seed and need, each row with check, verdict, tests and their lines, refutations, deviations."""
    deviates = a_row(row="K-02", verdict="deviates", why="on purpose", refuted="no test passed", need="may")
    run = {"commit": "abc", "date": "2026-01-01", "host": "a CPU", "kernel": "6.1", "python": "3.11"}
    text = page.markdown({"run": run, "lost": ["a::b"], "rows": [a_row(), deviates]}, tmp_path)
    assert "of commit abc: a CPU, Linux 6.1, Python 3.11" in text
    assert "| [a seed](#a-seed) | must | 1 | 1 |  |  |  |  |" in text
    assert r"- **K-01** (must): c \[x\] | y" in text
    assert f"{page.LOST}\n\n- a::b\n" in text
    assert "[test_it](../tests/unit/test_it.py#L1), library, passed" in text
    assert "  - 1 more test passed, 3 mutants" in text
    assert "- **K-02** (deviates): no test passed" in text
    assert r"| K-02 | a seed | c \[x\] \| y | on purpose |" in text
    assert max(map(len, re.sub(r"\[.*\]\(.*\)|\|.*\|", "", text).splitlines())) <= page.WIDTH + 2


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("WALL_CLOCK_NEW", "WALL_CLOCK_NEW"),
        ("_x_ *y* [z] <a>", r"\_x\_ \*y\* \[z\] \<a\>"),
        ("`<khz>` per [core]", r"`<khz>` per \[core\]"),
        ("a ` alone", "a ' alone"),
        ("~d~ \\ &lt; & &#1; a && b", r"\~d\~ \\ \&lt; & \&#1; a && b"),
    ],
)
def test_a_claim_is_shown_as_it_stands(text: str, shown: str) -> None:
    """Whatever Markdown would take it for."""
    assert page.escaped(text) == shown


def test_documents_are_linked() -> None:
    """From docs/, where the page stands, with their anchors."""
    assert page.linked("see docs/c.md#a-b, docs/x.md.") == "see [docs/c.md#a-b](c.md#a-b), [docs/x.md](x.md)."


@pytest.mark.parametrize("first", ["- a", "+ b", "# c", "1. d", "2) e", "=== f", "---"])
def test_a_claim_begins_no_block_of_its_own(first: str) -> None:
    """Wherever its lines are broken, it is one paragraph with its own signs."""
    filler = "x" * (page.WIDTH - 3)
    text = page.wrapped(f"- {filler} {first} {filler}", "  ")
    (line,) = re.findall(r"^  (?!x).*", text, re.MULTILINE)
    assert re.match(r"  \d*\\[-+=#.)]", line)
    assert page.wrapped(f"{filler} 2026-01) #UD") == f"{filler}\n2026-01) #UD"
    assert line.replace("\\", "").strip() == first


def test_a_heading_is_linked_as_github_names_it() -> None:
    """Without its punctuation."""
    assert page.anchor("VirtualBox TM: a/b, (c-d)") == "virtualbox-tm-ab-c-d"


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git: apt install git")
def test_a_commit_and_what_differs_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs write is no change; without a repository, and without git, there is none to name."""
    monkeypatch.setattr(revision, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert (revision.commit(), revision.revision()) == ("no git", "no git")
    person = ("-c", "user.name=n", "-c", "user.email=e")
    (tmp_path / "docs").mkdir()
    for name in (*revision.WRITTEN_BY_RUNS, "it.py"):
        (tmp_path / name).write_text("before")
    for command in (("init", "-q"), ("add", "."), (*person, "commit", "-qm", "it", "--no-gpg-sign")):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    (tmp_path / revision.WRITTEN_BY_RUNS[0]).write_text("after")
    assert re.fullmatch("[0-9a-f]{40}", revision.revision())
    (tmp_path / "it.py").write_text("after")
    assert revision.revision() == f"{revision.commit()} and changes"
    monkeypatch.setenv("PATH", "")
    assert revision.revision() == "no git"
