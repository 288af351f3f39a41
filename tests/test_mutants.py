"""The mutants are of this tree and enough, a sample of them dies, and what runs them tells one that lives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing
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
SAMPLE = 30
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


@pytest.mark.long
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
    """Whole statements become an `if`, anything else an expression, whatever another one brings in."""
    source = '"""Doc."""\n\ndef f(x: int) -> int:\n    y = x\n    y += 1\n    return y * 2\n'
    statements = A_MUTANT._replace(file="it.pyx", text="y = x\n    y += 1", replacement="return x + x * 1 or y * 2")
    expression = A_MUTANT._replace(file="it.pyx", text="y * 2", replacement="y * 3")
    names: dict[str, int] = {"pvclock_mutant": 0}
    _, _, body = schemata.cython(source, {1: statements, 2: expression}).rpartition("const int pvclock_mutant\n")
    exec(body, names)  # noqa: S102 - what is above
    assert [called(names, number) for number in range(4)] == [8, 6, 12, 8]


def test_mutants_that_overlap_are_built_one_after_the_other(tmp_path: Path) -> None:
    """But for those of images, which are assembled one by one."""
    for name in ("it.pyx", "it.s"):
        (tmp_path / name).write_text("x + 1 + 2\nz")
    one, other = A_MUTANT, A_MUTANT._replace(name="K-10.2", text="1 + 2")
    beside = A_MUTANT._replace(name="K-10.3", text="z")
    for file, sizes in (("it.pyx", [2, 1]), ("it.s", [3])):
        mutants = [mutant._replace(file=file) for mutant in (one, other, beside)]
        assert [len(build) for build in schemata.groups(mutants, tmp_path)] == sizes


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
    request = {"arguments": [*arguments, "test_it.py"], "rows": [row], "seconds": seconds, "environment": {}}
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


MODULE = """\
import os

def one():
    value = 1
    return value
"""
TESTS_OF_MODULE = """\
import os
import pytest
from pvclock import it

@pytest.mark.row("K-10")
def test_one():
    assert it.one() == 1

@pytest.mark.row("K-10")
def test_that_fails_anyway():
    assert False

@pytest.mark.row("K-10")
def test_of_compiled():
    assert os.environ["PVCLOCK_MUTANT"] == "0"

@pytest.mark.row("K-10")
def test_of_the_probe():
    with open("pvclock/probe/built") as program:
        assert program.read() == "x = 1"
"""
SETUP = """\
import pathlib, sys
sources = [pathlib.Path(name).read_text() for name in ("pvclock/it.pyx", "pvclock/probe/it.c")]
pathlib.Path("pvclock/probe/built").write_text(sources[1])
sys.exit(any("nonsense" in source for source in sources))
"""
CYTHON = '"""Doc."""\n\na = 1\nb = 2\nc = 3\n'


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree with one module, its tests, and a compiled file whose compiler knows one mistake."""
    root = tmp_path / "tree"
    for name, text in {
        "pvclock/__init__.py": "",
        "pvclock/it.py": MODULE,
        "pvclock/it.pyx": CYTHON,
        "pvclock/probe/it.c": "x = 1",
        "pvclock/probe/built": "x = 1",
        "tests/unit/test_it.py": TESTS_OF_MODULE,
        "tests/mutants/worker.py": (ROOT / "tests" / "mutants" / "worker.py").read_text(),
        "setup.py": SETUP,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(campaign, "ROOT", root)
    return root


def changed(text: str, replacement: str, test: str = "test_one", file: str = "pvclock/it.py") -> Mutant:
    """Return a mutant of the tree above, called by what it is changed to."""
    return Mutant(replacement, "K-10", "it", file, text, replacement, (f"unit/test_it.py::{test}",))


def campaign_of(mutants: list[Mutant], work: Path, jobs: int = 1) -> Generator[campaign.Result, None, None]:
    """Return a campaign with these mutants."""
    arguments = {mutant.name: [f"tests/{test}" for test in mutant.dies_in] for mutant in mutants}
    return campaign.run(mutants, work, arguments=lambda mutant: arguments[mutant.name], jobs=jobs)


def test_a_campaign_tells_each_end(tree: Path, tmp_path: Path) -> None:
    """One that ends its worker or does not compile takes no other with it; the tree itself stays as it is."""
    cython = {"test": "test_of_compiled", "file": "pvclock/it.pyx"}
    probe = {"test": "test_of_the_probe", "file": "pvclock/probe/it.c"}
    verdicts_of = {
        changed("value = 1", "value = 2"): campaign.DIED,
        changed("value = 1", "value = 1 + 0"): campaign.SURVIVED,
        changed("value = 1", "os.kill(os.getppid(), 9)"): campaign.TRIVIAL,
        changed("value = 1", "value = 3"): campaign.DIED,
        changed("value = 1", "value = 4", "test_that_fails_anyway"): campaign.UNSOUND,
        changed("return value", "return nothing"): campaign.TRIVIAL,
        changed("import os", "import nothing"): campaign.TRIVIAL,
        changed("gone", "value"): campaign.STALE,
        changed("value", "no_value", file="pvclock/gone.py"): campaign.STALE,
        changed("gone", "1", **cython): campaign.STALE,
        changed("a = 1", "a = 2", **cython): campaign.DIED,
        changed("b = 2", "nonsense", **cython): campaign.TRIVIAL,
        changed("c = 3", "a = 1", **cython): campaign.DIED,
        changed("x = 1", "x = 2", **probe): campaign.DIED,
        changed("x = 1", "x = 1 + nonsense", **probe): campaign.STALE,
        changed("x = 1", "x = 3", **probe): campaign.DIED,
    }
    with closing(campaign_of(list(verdicts_of), tmp_path)) as results:
        found = {result.mutant: result.verdict for result in results}
    assert found == {mutant.name: verdict for mutant, verdict in verdicts_of.items()}
    assert ((tree / "pvclock/it.py").read_text(), (tree / "pvclock/it.pyx").read_text()) == (MODULE, CYTHON)
    assert list(tmp_path.iterdir()) == [tree]


@pytest.mark.usefixtures("tree")
def test_a_campaign_can_be_broken_off(tmp_path: Path) -> None:
    """What ended is told before what began earlier; closing ends what hangs, and leaves no copy and no process."""
    pid = tmp_path / "pid"
    hangs = changed("value = 1", f"open({str(pid)!r}, 'w').write(str(os.getpid()))\n    while True: pass")
    results = campaign_of([hangs, changed("value = 1", "value = 2"), *[hangs] * 9], tmp_path / "work", jobs=2)
    assert next(results).verdict == campaign.DIED
    results.close()
    assert list((tmp_path / "work").iterdir()) == []
    assert not (pid.exists() and Path(f"/proc/{pid.read_text()}").exists())


def test_tests_that_cannot_be_run_are_told(tree: Path, tmp_path: Path) -> None:
    """Where they fail without a mutant in another way than by themselves, no mutant is said to have died."""
    (tree / "tests" / "conftest.py").write_text("import nothing_of_this_name")
    with pytest.raises(BadMutant, match=r"the tests cannot be run: [^$]*nothing_of_this_name"):
        list(campaign_of([changed("value = 1", "value = 2")], tmp_path))


@pytest.mark.parametrize(
    ("why", "suspects"),
    [
        ("error in f_mutant_12", "c"),
        ("f_mutant_10, f_mutant_11", "ab"),
        ("a line", "ac"),
        ("_mutant_10_mutant_99", "a"),
    ],
)
def test_mutants_that_do_not_compile_together_are_divided(why: str, suspects: str) -> None:
    """A compiler names the function, and so the mutant; where it does not, half of them it is."""
    numbers = {"a": 10, "b": 11, "c": 12}
    found = campaign.divided([A_MUTANT._replace(name=name) for name in numbers], numbers, why)
    names = ["".join(mutant.name for mutant in part) for part in found]
    assert names == [suspects, "".join(name for name in numbers if name not in suspects)]


def test_what_a_result_is_of(tree: Path) -> None:
    """Sources, tests and how they are built; not what the build makes, nor what a person judged."""
    before = campaign.tree_hash()
    for made in ("pvclock/_it.c", "pvclock/it.so", "tests/judged.tsv"):
        (tree / made).write_text("made")
        assert campaign.tree_hash() == before
    for written in ("pvclock/it.pyx", "pvclock/probe/it.c", "tests/unit/test_it.py", "setup.py", "tests/native.c"):
        (tree / written).write_text("changed")
        assert campaign.tree_hash() != before
        before = campaign.tree_hash()


def test_a_log_is_gone_on_from(tmp_path: Path) -> None:
    """A line that was broken off, one of another tree, and what may be the machine's fault do not count."""
    tree = campaign.tree_hash()
    of_verdict = {verdict: campaign.Result(verdict, verdict, "", ("a",), 1.5) for verdict in (campaign.DIED, "not run")}
    lines = [json.dumps({"tree": tree, "result": result}) for result in of_verdict.values()]
    lines += [lines[0].replace(tree, "another").replace(campaign.DIED, "other"), lines[0][:-9]]
    (tmp_path / "log").write_text("\n".join(lines))
    assert campaign.logged(tmp_path / "log") == {campaign.DIED: of_verdict[campaign.DIED]}
    assert campaign.logged(tmp_path / "none") == {}
