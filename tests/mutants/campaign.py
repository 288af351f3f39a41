"""Running mutants: copies of the tree, a worker in each, and a log that an interrupted run goes on from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from tests.mutants import schemata
from tests.mutants.mutant import ROOT, BadMutant, Mutant
from tests.mutants.worker import Outcome

LEFT_OUT = {
    ".git",
    ".venv",
    "build",
    "dist",
    ".hypothesis",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
    ".benchmarks",
}
SECONDS_MAX = 120.0
"""How long the tests that are to notice a mutant may take, which hangs else."""

# What a mutant comes to. All but the first are findings.
DIED, SURVIVED, STALE, TRIVIAL, HUNG, NOT_RUN = "died", "survived", "does not apply", "trivial", "hung", "not run"

# What a mistake that was not meant raises: it would fail in any test, whatever that one says.
TRIVIAL_ERRORS = {
    "ImportError",
    "ModuleNotFoundError",
    "NameError",
    "SyntaxError",
    "IndentationError",
    "UnboundLocalError",
}


class Result(NamedTuple):
    """What became of a mutant."""

    mutant: str
    verdict: str
    why: str
    """Of a finding, what was found."""
    noticed_by: tuple[str, ...]
    seconds: float

    @property
    def is_finding(self) -> bool:
        """Whether somebody has to look at it."""
        return self.verdict != DIED


def judged(mutant: Mutant, outcomes: list[Outcome] | None, seconds: float) -> Result:
    """Return the result of a mutant by what its tests came to; None where they did not end."""
    failed = [each for each in outcomes or () if each.outcome == "failed"]
    noticed = [each for each in failed if each.phase == "call" and each.error not in TRIVIAL_ERRORS]
    skipped = [each for each in outcomes or () if each.outcome == "skipped"]
    if outcomes is None:
        verdict, why = HUNG, f"its tests did not end within {seconds:.0f} s"
    elif noticed:
        verdict, why = DIED, ""
    elif failed:
        first = failed[0]
        verdict, why = TRIVIAL, f"{first.test} fails in its {first.phase}: {first.error}"
    elif skipped or not outcomes:
        verdict, why = (
            NOT_RUN,
            f"skipped: {skipped[0].test}" if skipped else f"no test that names {mutant.row} was found",
        )
    else:
        verdict, why = SURVIVED, f"{mutant.breaks}: {', '.join(mutant.dies_in)} did not notice"
    names = sorted({each.test.partition("[")[0].removeprefix("tests/") for each in noticed})
    return Result(mutant.name, verdict, why, tuple(names), round(seconds, 2))


class Copy:
    """A copy of the tree, and a worker process in it."""

    def __init__(self, root: Path) -> None:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(ROOT, root, ignore=lambda _, names: LEFT_OUT.intersection(names), symlinks=True)
        self.root = root
        self.mtime = 0
        environment = os.environ | {"PYTHONPATH": str(root)}
        self.worker = subprocess.Popen(
            [sys.executable, "-m", "tests.mutants.worker"],
            cwd=root,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        """End the worker and remove the copy."""
        self.worker.communicate()
        shutil.rmtree(self.root)

    def ask(self, **request: object) -> list[Outcome] | None:
        """Have the worker run tests; arguments and result as worker.run()."""
        assert self.worker.stdin
        assert self.worker.stdout
        print(json.dumps(request), file=self.worker.stdin, flush=True)
        answer = json.loads(self.worker.stdout.readline())
        return None if answer is None else [Outcome(*each) for each in answer]

    def run(self, mutant: Mutant, number: int, arguments: list[str], seconds: float) -> Result:
        """Run a mutant's tests on it, for that long at most; `number` chooses it where it was built in."""
        begun = time.monotonic()
        file = self.root / mutant.file
        status, source = file.stat(), file.read_text(encoding="utf-8")
        try:
            if not mutant.is_compiled:
                file.write_text(mutant.applied(source), encoding="utf-8")
                self.mtime += 1  # Python knows a compiled source by its size and second: each is to be another
                os.utime(file, (self.mtime, self.mtime))
            environment = {schemata.CHOICE: str(number)}
            outcomes = self.ask(arguments=arguments, row=mutant.row, seconds=seconds, environment=environment)
        except BadMutant as why:
            return Result(mutant.name, STALE, str(why), (), 0.0)
        finally:
            if not mutant.is_compiled:
                file.write_text(source, encoding="utf-8")
                os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        return judged(mutant, outcomes, time.monotonic() - begun)

    def build(self, chosen: dict[int, Mutant]) -> None:
        """Build these mutants into the copy, each to be chosen by its number; errors as schemata.write()."""
        for file in {mutant.file for mutant in chosen.values()}:
            shutil.copy2(ROOT / file, self.root / file)
        schemata.write(self.root, chosen)
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", f"--parallel={os.cpu_count()}"]
        built = subprocess.run(command, cwd=self.root, capture_output=True, text=True, check=False)
        if built.returncode:
            raise BadMutant(f"the mutants of {sorted(chosen)} do not compile:\n{built.stderr[-3000:]}")

    def take_build(self, other: Copy) -> None:
        """Take over what another copy was built to."""
        shutil.copytree(other.root / "pvclock", self.root / "pvclock", dirs_exist_ok=True)


def tree_hash() -> str:
    """Return what identifies the sources and tests that a result is of."""
    digest = hashlib.sha256()
    for folder in ("pvclock", "qemu_glue", "tests"):
        for file in sorted((ROOT / folder).rglob("*")):
            if (
                file.suffix in {".py", ".pyx", ".pxd", ".h", ".s", ".c", ".toml", ".pml"}
                and "__pycache__" not in file.parts
            ):
                digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def logged(log: Path) -> dict[str, Result]:
    """Return the results of this tree that a log holds, by mutant."""
    if not log.exists():
        return {}
    tree = tree_hash()
    lines = map(json.loads, log.read_text(encoding="utf-8").splitlines())
    of_tree = (line["result"] for line in lines if line["tree"] == tree)
    return {name: Result(name, verdict, why, tuple(tests), took) for name, verdict, why, tests, took in of_tree}


def run(
    mutants: list[Mutant],
    work: Path,
    *,
    arguments: Callable[[Mutant], list[str]],
    jobs: int,
    seconds: float = SECONDS_MAX,
    report: Callable[[str], None] = lambda _: None,
) -> Iterator[Result]:
    """Give the result of each mutant as it comes; copies stand in `work` meanwhile.

    arguments: pytest's, for a mutant.
    seconds: how long a mutant's tests may take; one that takes longer hangs.
    report: is told of what takes long beside the tests.
    """

    def run_one(copy: Copy, mutant: Mutant, number: int) -> Result:
        return copy.run(mutant, number, arguments(mutant), seconds)

    copies = [Copy(work / f"copy{number}") for number in range(max(1, min(jobs, len(mutants))))]
    try:
        with ThreadPoolExecutor(len(copies)) as pool:
            plain = [(mutant, 0) for mutant in mutants if not mutant.is_compiled]
            yield from shared_out(pool, copies, plain, run_one)
            compiled = []
            for mutant in (mutant for mutant in mutants if mutant.is_compiled):
                try:
                    schemata.span(mutant, ROOT)
                except BadMutant as why:
                    yield Result(mutant.name, STALE, str(why), (), 0.0)
                else:
                    compiled.append(mutant)
            numbers = {mutant.name: number for number, mutant in enumerate(compiled, start=1)}
            for build in schemata.groups(compiled, ROOT):
                report(f"building {len(build)} mutants of compiled files")
                copies[0].build({numbers[mutant.name]: mutant for mutant in build})
                for copy in copies[1:]:
                    copy.take_build(copies[0])
                those = [(mutant, numbers[mutant.name]) for mutant in build]
                yield from shared_out(pool, copies, those, run_one)
    finally:
        for copy in copies:
            copy.close()


def shared_out(
    pool: ThreadPoolExecutor,
    copies: list[Copy],
    mutants: list[tuple[Mutant, int]],
    run_one: Callable[[Copy, Mutant, int], Result],
) -> Iterator[Result]:
    """Run mutants on the copies that are free; those that need the machine one after the other."""
    free: SimpleQueue[Copy] = SimpleQueue()
    for copy in copies:
        free.put(copy)
    machine = threading.Lock()

    def one(mutant: Mutant, number: int) -> Result:
        copy = free.get()
        try:
            with machine if mutant.needs_machine else nullcontext():
                return run_one(copy, mutant, number)
        finally:
            free.put(copy)

    yield from pool.map(lambda each: one(*each), mutants)
