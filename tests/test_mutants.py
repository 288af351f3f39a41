"""The mutants are of this tree and enough, a sample of them dies, and what runs them tells one that lives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conformance import verdicts
from tests.mutants import campaign, schemata
from tests.mutants.mutant import ROOT, BadMutant, Mutant, load, of_file
from tests.mutants.worker import Outcome
from tests.waiting import HANG_S

pytestmark = pytest.mark.row("style")

OF_EACH_ROW_LEAST = 3
SAMPLE = 16
A_MUTANT = Mutant("K-10.1", "K-10", "a page stays", "it.py", "x + 1", "x", ("unit/test_it.py::test_it",))

PASSED = Outcome("tests/unit/test_it.py::test_it[1]", "call", "passed", "")
FAILED = PASSED._replace(outcome="failed", error="AssertionError")


def test_mutants_are_of_this_tree() -> None:
    """Each one's text stands once in its file, and the tests that are to notice it are there."""
    mutants = load()
    assert len({mutant.name for mutant in mutants}) == len(mutants) > 0
    for mutant in mutants:
        assert mutant.applied((ROOT / mutant.file).read_text(encoding="utf-8"))
        for test in mutant.dies_in:
            file, _, function = test.partition("::")
            assert f"def {function}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), mutant.name


def test_each_row_that_must_be_has_three() -> None:
    """Of each `must` row that is said to be built."""
    count = Counter(mutant.row for mutant in load())
    owed = {row.row for row in verdicts.rows() if row.need == "must" and row.verdict in verdicts.CLAIMED}
    assert owed
    assert {row: count[row] for row in owed if count[row] < OF_EACH_ROW_LEAST} == {}
    assert count.keys() <= {row.row for row in verdicts.rows()}


def test_a_sample_dies(tmp_path: Path) -> None:
    """Some of those that take no build, others at each commit."""
    command = [sys.executable, "-m", "tests.mutants", f"--sample={SAMPLE}", "--jobs=1", "--json"]
    done = subprocess.run(
        [*command, f"--log={tmp_path / 'log'}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each for each in results if each["verdict"] != campaign.DIED] == []
    assert (len(results), done.returncode) == (SAMPLE, 0), done.stderr


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        ([FAILED], campaign.DIED),
        ([PASSED, FAILED._replace(error="RangeError")], campaign.DIED),
        ([PASSED], campaign.SURVIVED),
        ([FAILED._replace(error="NameError")], campaign.TRIVIAL),
        ([FAILED._replace(phase="setup")], campaign.TRIVIAL),
        ([FAILED._replace(phase="collection")], campaign.TRIVIAL),
        ([PASSED, PASSED._replace(outcome="skipped")], campaign.NOT_RUN),
        ([], campaign.NOT_RUN),
        (None, campaign.HUNG),
    ],
)
def test_what_becomes_of_a_mutant(outcomes: list[Outcome] | None, verdict: str) -> None:
    """Only a test's own failure is a death; all else is a finding, which says why."""
    result = campaign.judged(A_MUTANT, outcomes, 0.5)
    assert result.verdict == verdict
    assert result.is_finding is (verdict != campaign.DIED)
    assert bool(result.why) is result.is_finding
    assert result.noticed_by == (("unit/test_it.py::test_it",) if verdict == campaign.DIED else ())


@pytest.mark.parametrize("source", ["", "x + 1 and x + 1"])
def test_a_mutant_that_does_not_apply_is_told(source: str) -> None:
    """Its text has gone, or stands in two places."""
    with pytest.raises(BadMutant, match=r"K-10\.1: its text is [02] times in it\.py, not once"):
        A_MUTANT.applied(source)


@pytest.mark.parametrize(
    "changed",
    [
        'breaks = "b"\nfile = "f"\ntext = "t"\nreplacement = "r"\n',
        'breaks = "b"\nfile = "f"\ntext = "t"\nreplacement = "t"\ndies_in = ["a::b"]\n',
        'breaks = "b"\nfile = "f"\ntext = "t"\nreplacement = "r"\ndies_in = ["a.py"]\n',
        'breaks = "b"\nfile = "f"\ntext = "t"\nreplacement = "r"\ndies_in = []\n',
        'breaks = "b"\nfile = "f"\ntext = "t"\nreplacement = "r"\ndies_in = ["a::b"]\nextra = 1\n',
    ],
)
def test_data_that_describe_none_are_refused(changed: str, tmp_path: Path) -> None:
    """A field too few or too many, no change, or no test."""
    file = tmp_path / "some.toml"
    file.write_text(f"[[K-10]]\n{changed}")
    with pytest.raises(BadMutant, match=r"some\.toml: K-10\.1 "):
        list(of_file(file))


HEADER = """\
#define SCALE 10

static inline int twice(int value)
{
	return 2 * value;
}
"""
PROGRAM = '#include "it.h"\n#include <stdio.h>\nint main(void) { printf("%d", twice(3) + SCALE); return 0; }\n'


def test_a_headers_mutants_are_chosen_at_run_time(tmp_path: Path) -> None:
    """Two of one function and one of a macro, in one build, each by its number; without a number there is none."""
    changes = ("2 * value", "3 * value"), ("return 2", "value++;\n\treturn 2"), ("10", "20")
    mutants = {
        number: A_MUTANT._replace(file="it.h", text=text, replacement=replacement)
        for number, (text, replacement) in enumerate(changes, start=1)
    }
    (tmp_path / "it.h").write_text(HEADER)
    (tmp_path / "it.c").write_text(PROGRAM)
    schemata.write(tmp_path, mutants)
    subprocess.run(["cc", "-Wall", "-Wextra", "-Werror", tmp_path / "it.c", "-o", tmp_path / "it"], check=True)
    assert [printed_by(tmp_path / "it", number) for number in ("0", "1", "2", "3", "4")] == [16, 19, 18, 26, 16]


def printed_by(program: Path, number: str) -> int:
    """Return what a program prints with a mutant chosen."""
    return int(subprocess.run([program], env={schemata.CHOICE: number}, capture_output=True, check=True).stdout)


def test_cythons_mutants_are_chosen_at_run_time() -> None:
    """Whole statements become an `if`, anything else an expression."""
    source = '"""Doc."""\n\ndef f(x: int) -> int:\n    y = x\n    y += 1\n    return y * 2\n'
    statements = A_MUTANT._replace(file="it.pyx", text="y = x\n    y += 1", replacement="y = x")
    expression = A_MUTANT._replace(file="it.pyx", text="y * 2", replacement="y * 3")
    names: dict[str, int] = {"pvclock_mutant": 0}
    _, _, body = schemata.cython(source, {1: statements, 2: expression}).rpartition("const int pvclock_mutant\n")
    exec(body, names)  # noqa: S102 - what is above
    assert [called(names, number) for number in range(4)] == [8, 6, 12, 8]


def called(names: dict[str, int], number: int) -> int:
    """Call f(3) with a mutant chosen."""
    names["pvclock_mutant"] = number
    return int(eval("f(3)", names))  # noqa: S307 - the test's own function


TESTS = """\
import os
import subprocess
import pytest

@pytest.mark.row("K-10")
def test_that_fails():
    assert False

@pytest.mark.row("K-10", "K-11")
@pytest.mark.parametrize("x", [1, 2])
def test_that_passes(x):
    assert x

@pytest.mark.row("K-12")
def test_that_hangs():
    qemu = subprocess.Popen(["sleep", "1000"], process_group=0)
    with open("pids", "w") as file:
        print(os.getpid(), qemu.pid, file=file)
    while True:
        pass

@pytest.mark.row("K-13")
def test_that_ends_the_run():
    pytest.exit("so")

@pytest.mark.row("K-14")
def test_that_ends_the_interpreter():
    os._exit(3)
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A worker in a folder with TESTS."""
    (tmp_path / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "tests.mutants.worker"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        yield process


def ask(worker: subprocess.Popen[str], row: str, seconds: float = 20, *arguments: str) -> None:
    """Have a worker run TESTS of a row."""
    request = {"arguments": [*arguments, "test_it.py"], "row": row, "seconds": seconds, "environment": {}}
    print(json.dumps(request), file=worker.stdin, flush=True)


def answer(worker: subprocess.Popen[str]) -> Any:  # noqa: ANN401 - as JSON has it
    """Return what a worker says."""
    assert worker.stdout
    return json.loads(worker.stdout.readline())


def test_a_workers_answers(worker: subprocess.Popen[str]) -> None:
    """A worker runs the tests that name a row, each request in a child of its own."""
    failed = [["test_it.py::test_that_fails", "call", "failed", "AssertionError"]]
    passed = [[f"test_it.py::test_that_passes[{x}]", "call", "passed", ""] for x in (1, 2)]
    ask(worker, "K-10")
    assert answer(worker) == [*failed, *passed]
    ask(worker, "K-11")
    assert answer(worker) == passed


@pytest.mark.parametrize(
    ("row", "arguments", "what"),
    [("K-13", [], "pytest"), ("K-14", [], "the interpreter"), ("K-10", ["--no"], "pytest")],
)
def test_a_run_that_is_none_fails(
    row: str, arguments: list[str], what: str, worker: subprocess.Popen[str], tmp_path: Path
) -> None:
    """A run that is broken off, that dies, or that pytest does not begin, as where conftest.py is not imported."""
    ask(worker, row, 20, *arguments)
    assert [each[:3:2] for each in answer(worker) if each[2] == "failed"] == [[what, "failed"]]
    (tmp_path / "conftest.py").write_text("import nothing_of_this_name")
    ask(worker, "K-11")
    ((where, _, outcome, error),) = answer(worker)
    assert (where, outcome) == ("pytest", "failed")
    assert "nothing_of_this_name" in error


@pytest.mark.parametrize("waits", [True, False])
def test_what_hangs_is_killed(worker: subprocess.Popen[str], tmp_path: Path, *, waits: bool) -> None:
    """With all that it started: after its time, and as soon as nobody waits any more."""
    pids = tmp_path / "pids"
    ask(worker, "K-12", 2 if waits else 1000)
    if waits:
        assert answer(worker) is None
    else:
        until = time.monotonic() + HANG_S
        while not (pids.exists() and pids.read_text().endswith("\n")) and time.monotonic() < until:
            time.sleep(0.02)
        assert worker.stdin
        worker.stdin.close()
        assert worker.wait(timeout=HANG_S) == 0
    assert [pid for pid in pids.read_text().split() if Path(f"/proc/{pid}").exists()] == []
