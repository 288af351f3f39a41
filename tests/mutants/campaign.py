"""Running mutants: copies of the tree, a worker in each, and a log that an interrupted run goes on from."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext, suppress
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from typing import IO, NamedTuple

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
SOURCES = {".py", ".pyx", ".pxd", ".h", ".s", ".S", ".c", ".ld", ".toml", ".pml", ".json"}
SECONDS_MAX = 300.0
"""How long the tests that are to notice a mutant may take, which hangs else: twice what a test waits for, and more."""

AT_ONCE_MAX = 10
"""How many times that long the tests of all mutants may take, run once without any."""

# What a mutant comes to. All but the first are findings.
DIED, SURVIVED, STALE, TRIVIAL, HUNG, NOT_RUN = "died", "survived", "does not apply", "trivial", "hung", "not run"
UNSOUND = "fails without it"
OF_THE_MACHINE = {NOT_RUN, UNSOUND}
"""What may come of a device that is missing: it is run again, though a log has it."""

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


def judged(
    mutant: Mutant, outcomes: list[Outcome] | None, seconds: float, unsound: Collection[str] = frozenset()
) -> Result:
    """Return the result of a mutant by what its tests came to; None where they did not end.

    unsound: tests that fail without a mutant.
    """
    of_itself = [each.test for each in outcomes or () if each.outcome == "failed" and each.test in unsound]
    failed = [each for each in outcomes or () if each.outcome == "failed" and each.test not in unsound]
    noticed = [each for each in failed if each.phase == "call" and each.error not in TRIVIAL_ERRORS]
    skipped = [each for each in outcomes or () if each.outcome == "skipped"]
    if outcomes is None:
        verdict, why = HUNG, f"its tests did not end within {seconds:.0f} s"
    elif noticed:
        verdict, why = DIED, ""
    elif failed:
        first = failed[0]
        verdict, why = TRIVIAL, f"{first.test} fails in its {first.phase}: {first.error}"
    elif of_itself:
        verdict, why = UNSOUND, f"{of_itself[0]} fails without a mutant too"
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
        shutil.copytree(ROOT, root, ignore=lambda _, names: LEFT_OUT.intersection(names), symlinks=True)
        self.root = root
        self.mtime = 0
        self.originals: dict[str, str] = {}
        """The sources that mutants were built into."""
        self.worker: subprocess.Popen[str] | None = None
        self.is_closed = False

    def stop(self) -> None:
        """End the worker, whatever it is doing."""
        self.is_closed = True
        if worker := self.worker:
            end(worker, worker.stdin)

    def remove(self) -> None:
        """End the worker and remove the copy; no thread may be asking it."""
        self.stop()
        if self.worker:
            end(self.worker, self.worker.stdout)
        shutil.rmtree(self.root, ignore_errors=True)

    def started(self) -> subprocess.Popen[str]:
        """Start a worker, out of reach of Ctrl-C: it ends with its standard input."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        return subprocess.Popen(
            [sys.executable, "-m", "tests.mutants.worker"],
            cwd=self.root,
            env=kept | {"PYTHONPATH": str(self.root)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def ask(self, **request: object) -> list[Outcome] | None:
        """Have the worker run tests; arguments and result as worker.run().  One that dies is replaced."""
        if self.is_closed:
            return []
        worker = self.worker = self.worker or self.started()
        assert worker.stdin
        assert worker.stdout
        with suppress(BrokenPipeError):
            print(json.dumps(request), file=worker.stdin, flush=True)
        answer = worker.stdout.readline()
        if not answer.endswith("\n"):
            self.worker = None
            return [Outcome("the worker", "life", "failed", f"status {end(worker, worker.stdin, worker.stdout)}")]
        outcomes = json.loads(answer)
        return None if outcomes is None else [Outcome(*each) for each in outcomes]

    @contextmanager
    def holding(self, mutant: Mutant) -> Iterator[None]:
        """Have a mutant's file hold the mistake, and the probe be built of it if it is a source of that.

        Raises:
            BadMutant: as Mutant.source() and Mutant.applied(), or it does not compile.
        """
        source = mutant.source(self.root)
        changed = mutant.applied(source)
        file = self.root / mutant.file
        status = file.stat()
        try:
            file.write_text(changed, encoding="utf-8")
            self.mtime += 1  # Python knows a compiled source by its size and second: each is to be another
            os.utime(file, (self.mtime, self.mtime))
            if mutant.is_of_the_probe:
                self.build_probe(mutant)
            yield
        finally:
            file.write_text(source, encoding="utf-8")
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
            if mutant.is_of_the_probe:
                self.build_probe(mutant)

    def run(self, mutant: Mutant, number: int, arguments: list[str], seconds: float, unsound: set[str]) -> Result:
        """Run a mutant's tests on it, for that long at most; `number` chooses it where it was built in.

        unsound: tests that fail without a mutant.
        """
        begun = time.monotonic()
        environment = {schemata.CHOICE: str(number)}
        rows = [mutant.row] if mutant.row else []  # an operator's is of no row
        try:
            with nullcontext() if mutant.is_compiled else self.holding(mutant):
                outcomes = self.ask(arguments=arguments, rows=rows, seconds=seconds, environment=environment)
        except BadMutant as why:
            return Result(mutant.name, STALE, str(why), (), 0.0)
        return judged(mutant, outcomes, time.monotonic() - begun, unsound)

    def unsound(self, arguments: list[str], rows: list[str], seconds: float) -> set[str]:
        """Return the tests that fail without a mutant, and so say nothing of one.

        Raises:
            BadMutant: they do not run at all, or do not end.
        """
        outcomes = self.ask(arguments=arguments, rows=rows, seconds=seconds, environment={schemata.CHOICE: "0"})
        failed = {each.test: each for each in outcomes or () if each.outcome == "failed"}
        if outcomes is None or any("::" not in test for test in failed):
            why = next(iter(failed.values())).error if failed else f"they do not end within {seconds:.0f} s"
            raise BadMutant(f"without a mutant the tests cannot be run: {why}")
        return set(failed)

    def build(self, chosen: dict[int, Mutant]) -> None:
        """Build these mutants into the copy, each to be chosen by its number; errors as schemata.write()."""
        for name, source in self.originals.items():
            (self.root / name).write_text(source, encoding="utf-8")
        self.originals |= {mutant.file: mutant.source(self.root) for mutant in chosen.values()}
        schemata.write(self.root, chosen)
        setup = self.root / "setup.py"  # a mistake may be one that a compiler warns of
        setup.write_text(setup.read_text(encoding="utf-8").replace(', "-Werror"', ""), encoding="utf-8")
        self.build_modules(", ".join(mutant.name for mutant in chosen.values()))

    def build_probe(self, mutant: Mutant) -> None:
        """Build the probe of its sources as they are, whenever they were changed."""
        products = ("build/temp*/probe/*", "build/lib*/pvclock/probe/_images*.so", "pvclock/probe/_images*.so")
        for product in (found for pattern in products for found in self.root.glob(pattern)):
            product.unlink()
        self.build_modules(mutant.name)

    def build_modules(self, names: str) -> None:
        """Build what is older than its sources.

        Raises:
            BadMutant: one of the mutants of these names does not compile.
        """
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", f"--parallel={os.cpu_count()}"]
        built = subprocess.run(command, cwd=self.root, capture_output=True, text=True, check=False)
        if built.returncode:
            raise BadMutant(f"does not compile: {names}\n{built.stderr[-3000:]}")

    def take_build(self, other: Copy) -> None:
        """Take over what another copy was built to."""
        shutil.copytree(other.root / "pvclock", self.root / "pvclock", dirs_exist_ok=True)


def end(worker: subprocess.Popen[str], *pipes: IO[str] | None) -> int:
    """Close pipes to a worker, which ends it if its standard input is one; return its status."""
    for pipe in filter(None, pipes):
        with suppress(BrokenPipeError):
            pipe.close()
    return worker.wait()


def tree_hash() -> str:
    """Return what identifies the sources and tests that a result is of."""
    digest = hashlib.sha256()
    folders = [(ROOT / folder).rglob("*") for folder in ("pvclock", "qemu_glue", "tests")]
    for file in sorted(chain(ROOT.glob("*"), *folders)):
        name = str(file.relative_to(ROOT))
        is_generated = name.startswith("pvclock/") and file.match("_*.c")
        if file.suffix in SOURCES and not is_generated:
            digest.update(f"{name}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def logged(log: Path) -> dict[str, Result]:
    """Return the results of this tree that a log holds, by mutant, but those that another machine may not have."""
    if not log.exists():
        return {}
    tree = tree_hash()
    found = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):  # a line that was not finished
            logged_line = json.loads(line)
            if logged_line["tree"] == tree:
                name, verdict, why, tests, took = logged_line["result"]
                found[name] = Result(name, verdict, why, tuple(tests), took)
    return {name: result for name, result in found.items() if result.verdict not in OF_THE_MACHINE}


def run(
    mutants: list[Mutant],
    work: Path,
    *,
    arguments: Callable[[Mutant], list[str]],
    jobs: int,
    seconds: float = SECONDS_MAX,
    report: Callable[[str], None] = lambda _: None,
) -> Generator[Result, None, None]:
    """Give the result of each mutant as it comes; copies stand in `work` until the generator is closed.

    arguments: pytest's, for a mutant.
    seconds: how long a mutant's tests may take; one that takes longer hangs.
    report: is told of what takes long beside the tests.

    Raises:
        BadMutant: without a mutant the tests cannot be run.
    """

    def tested(those: list[Mutant], numbers: dict[str, int]) -> Iterator[Result]:
        if not those:
            return
        report(f"running the tests of {len(those)} mutants without one")
        every = dict.fromkeys(chain.from_iterable(map(arguments, those)))
        every.pop("-x", None)
        rows = sorted({mutant.row for mutant in those} - {""})
        unsound = copies[0].unsound(list(every), rows, seconds * min(len(those), AT_ONCE_MAX))
        yield from shared_out(
            pool,
            copies,
            those,
            lambda copy, mutant: copy.run(mutant, numbers.get(mutant.name, 0), arguments(mutant), seconds, unsound),
        )

    pool = ThreadPoolExecutor(max(1, jobs))
    copies: list[Copy] = []
    try:
        copies.extend(Copy(work / f"copy{number}") for number in range(min(max(1, jobs), len(mutants))))
        yield from tested([mutant for mutant in mutants if not mutant.is_compiled], {})
        yield from of_compiled([mutant for mutant in mutants if mutant.is_compiled], copies, tested, report)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for copy in copies:
            copy.stop()  # a thread that waits for an answer gets none
        pool.shutdown()
        for copy in copies:
            copy.remove()


def of_compiled(
    mutants: list[Mutant],
    copies: list[Copy],
    tested: Callable[[list[Mutant], dict[str, int]], Iterator[Result]],
    report: Callable[[str], None],
) -> Iterator[Result]:
    """Give the results of mutants of compiled files, as many of them in one build as can be; as run()."""
    if not mutants:
        return
    tree = copies[0].root  # the tree that this runs in may be changed meanwhile
    numbers: dict[str, int] = {}
    applicable = []
    for number, mutant in enumerate(mutants, start=1):
        try:
            schemata.span(mutant, tree)
        except BadMutant as why:
            yield Result(mutant.name, STALE, str(why), (), 0.0)
        else:
            applicable.append(mutant)
            numbers[mutant.name] = number
    builds = schemata.groups(applicable, tree)
    while builds:
        build = builds.pop(0)
        report(f"building {len(build)} mutants of compiled files")
        try:
            copies[0].build({numbers[mutant.name]: mutant for mutant in build})
        except BadMutant as why:
            if len(build) == 1:
                yield Result(build[0].name, TRIVIAL, str(why), (), 0.0)
            else:
                builds[:0] = divided(build, numbers, str(why))
            continue
        for copy in copies[1:]:
            copy.take_build(copies[0])
        yield from tested(build, numbers)


def divided(build: list[Mutant], numbers: dict[str, int], why: str) -> tuple[list[Mutant], list[Mutant]]:
    """Divide mutants that do not compile together: those that a compiler named from the others, else in halves."""
    named = {int(number) for number in re.findall(r"_mutant_(\d+)", why)}
    suspects = [mutant for mutant in build if numbers[mutant.name] in named]
    if len(suspects) in {0, len(build)}:
        suspects = build[::2]
    return suspects, [mutant for mutant in build if mutant not in suspects]


def shared_out(
    pool: ThreadPoolExecutor, copies: list[Copy], mutants: list[Mutant], run_one: Callable[[Copy, Mutant], Result]
) -> Iterator[Result]:
    """Run mutants on the copies that are free, and then those that need the machine, one after the other."""
    free: SimpleQueue[Copy] = SimpleQueue()
    for copy in copies:
        free.put(copy)

    def one(mutant: Mutant) -> Result:
        copy = free.get()
        try:
            return run_one(copy, mutant)
        finally:
            free.put(copy)

    for future in as_completed([pool.submit(one, mutant) for mutant in mutants if not mutant.needs_machine]):
        yield future.result()
    yield from (one(mutant) for mutant in mutants if mutant.needs_machine)
