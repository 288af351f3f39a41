"""Mutants that nobody thought of: `python -m tests.mutants.operators`, a sample of all that operators make.

Of the Python files of the arithmetic cosmic-ray makes them (`pip install cosmic-ray`), of the C headers, which hold the
arithmetic and the publish protocol, the table below.  A sample is the same at each run.  What lives is judged by a
person, in operators-judged.tsv: it is like the original, or the tests are to be better.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from tests.mutants import campaign, progress
from tests.mutants.mutant import HERE, ROOT, Mutant

JUDGED = HERE / "operators-judged.tsv"
SEED = 13
SECONDS_MAX = 330.0
QUICK = "not (kvm or long)"

NATIVE_TESTS = tuple(
    f"unit/test_{name}.py"
    for name in ("math_header", "anchor_header", "anchor_header_limits", "publish_header", "records_header")
)
"""Of all headers; each is a C program over them."""

TESTS_OF_HEADERS = {
    "math": ("unit/test_scale.py", "unit/test_guest_clock.py"),
    "anchor": ("unit/test_guest_clock.py", "unit/test_late_publish.py", "unit/test_reading.py"),
    "publish": ("unit/test_guest_clock.py", "unit/test_reading.py", "unit/test_kvm_provider.py"),
    "tsc": ("unit/test_publish_wait.py", "unit/test_counter.py", "unit/test_sampling.py"),
    "own_line": ("unit/test_virtualbox_pages.py",),
    "words": ("unit/test_kvm_provider.py", "unit/test_kvm_steal_time.py"),
    "records": ("unit/test_kvm_steal_time.py", "unit/test_kvm_pv_eoi.py", "unit/test_kvm_wall_clock.py"),
}
TESTS_OF_PYTHON = {
    "timekeeping/timeline": ("timeline", "time_operations", "event_timeline", "guest_clock", "tsc_glitches", "restore"),
    "timekeeping/catchup": ("catchup", "time_operations"),
    "timekeeping/discipline": ("discipline", "following"),
    "timekeeping/timers": ("timers", "timers_bounds", "timers_dilated"),
    "timekeeping/sampling": ("sampling", "following"),
    "tsc/vcpu_tsc": ("tsc", "tsc_core", "tsc_msrs", "tsc_repair", "palacios"),
    "tsc/agreement": ("tsc_repair", "tsc_sync"),
    "tsc/emulation": ("tsc_core", "palacios"),
}
SLOW_OF_HEADERS = (
    *("unit/test_time_operations.py", "unit/test_transaction.py", "unit/test_publish_wait.py"),
    *("unit/test_tsc_glitches.py", "unit/test_c_guide.py"),
    *("stress/test_single_step.py", "stress/test_record_stress.py", "stress/test_publish_stress.py"),
)
SLOW_OF_PYTHON = (
    "unit/test_discipline.py::test_noise_temperature_and_outliers",
    "unit/test_discipline.py::test_a_step_of_an_hour_takes_its_time",
    "unit/test_restore.py::test_migrations",
    "unit/test_following.py::test_a_hundred_thousand_ticks",
)
"""Run for those alone that all others let live."""

UNWANTED = ("Decorator", "Exception", "Variable", "Pow", "_Is", "_Div", "Div_", "ZeroIteration")
"""Of cosmic-ray's operators those that fail by type or name, or need options."""

COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
C_OPERATORS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("sum", r"(?<= )[+-](?= )", ("+", "-")),
    ("product", r"(?<= )[*/](?= )", ("*", "/")),
    ("shift", r"(?<= )(?:<<|>>)(?= )", ("<<", ">>")),
    ("shift in place", r"(?<= )(?:<<=|>>=)(?= )", ("<<=", ">>=")),
    ("addition in place", r"(?<= )(?:\+=|-=)(?= )", ("+=", "-=")),
    ("bits", r"(?<= )[&|^](?= )", ("&", "|")),
    ("comparison", r"(?<= )(?:<=|>=|<|>)(?= )", ("<", "<=", ">", ">=")),
    ("equality", r"(?<= )(?:==|!=)(?= )", ("==", "!=")),
    ("logic", r"(?<= )(?:&&|\|\|)(?= )", ("&&", "||")),
    ("number", r"(?<![\w.\"%])\d+(?=[uUlL]*\b)(?![\w.]*\")", ("+1", "-1")),
    ("statement", r"(?<=\t)(?:[a-z_>.\[\]-]+(?: [-+|&<>]*= |\())[^;{}]*;", ("(void)0;",)),
    ("fence", r"[ml]fence(?:\\n\\t|; )", ("",)),
)
"""Kind, what is changed, and what it may become."""


def main() -> int:
    """Run a sample; the exit status is 1 where a mutant lives that nobody judged."""
    it = argparse.ArgumentParser(prog="python -m tests.mutants.operators", description=__doc__)
    it.add_argument("--sample", type=int, default=500, metavar="N", help="default: 500, half of them of C")
    it.add_argument(
        "--log", type=Path, default=ROOT / "build" / "operators.jsonl", help="default: build/operators.jsonl"
    )
    it.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="copies at work at once; default: one a CPU")
    arguments = it.parse_args()
    arguments.log.parent.mkdir(parents=True, exist_ok=True)
    mutants = {mutant.name: mutant for mutant in sample(arguments.sample)}
    known = campaign.logged(arguments.log)
    missing = [mutant for mutant in mutants.values() if mutant.name not in known]
    known |= run(missing, arguments, [f"--deselect=tests/{test}" for test in SLOW_OF_PYTHON])
    lives = [mutant for mutant in mutants.values() if known[mutant.name].verdict == campaign.SURVIVED]
    slow = [it._replace(dies_in=SLOW_OF_HEADERS if it.is_compiled else SLOW_OF_PYTHON) for it in lives]
    known |= run(slow, arguments, [])
    return report([known[name] for name in mutants])


def run(mutants: list[Mutant], arguments: argparse.Namespace, options: list[str]) -> dict[str, campaign.Result]:
    """Run mutants' tests with options of pytest's."""
    options = ["-x", "-m", QUICK, *options]
    return progress.run(
        mutants,
        arguments.log,
        arguments=lambda mutant: [*options, *(f"tests/{test}" for test in mutant.dies_in)],
        jobs=arguments.jobs,
        seconds=SECONDS_MAX,
    )


def report(results: list[campaign.Result]) -> int:
    """Print what lives and what was judged of it; return the exit status."""
    judged = {line.split("\t")[0] for line in JUDGED.read_text(encoding="utf-8").splitlines()[1:]}
    lives = [result for result in results if result.verdict not in {campaign.DIED, campaign.HUNG}]
    for result in lives:
        print(result.mutant, result.verdict, "judged" if result.mutant in judged else result.why, sep="\t")
    unjudged = [result for result in lives if result.mutant not in judged]
    print(f"{len(results) - len(lives)} of {len(results)} died; {len(lives) - len(unjudged)} that live are judged")
    return int(bool(unjudged))


def sample(count: int) -> list[Mutant]:
    """Return so many mutants, half of C and half of Python, the same at each run of a tree."""
    chooser = random.Random(SEED)  # noqa: S311 - no secret
    of_c = [mutant for name in TESTS_OF_HEADERS for mutant in of_header(name)]
    of_python = [mutant for name in TESTS_OF_PYTHON for mutant in of_module(name)]
    chosen = [mutant for mutant in chooser.sample(of_c, len(of_c)) if compiles(mutant)][: count // 2]
    return chosen + chooser.sample(of_python, min(count - count // 2, len(of_python)))


def compiles(mutant: Mutant) -> bool:
    """Whether a C compiler takes a mutant of a header."""
    file = ROOT / mutant.file
    command = ["cc", "-std=c11", "-fsyntax-only", "-w", f"-I{file.parent}", "-x", "c", "-"]
    changed = mutant.applied(file.read_text(encoding="utf-8"))
    return subprocess.run(command, input=changed.encode(), capture_output=True, check=False).returncode == 0


def of_header(header: str) -> Iterator[Mutant]:
    """Give each mutant of a C header, by the table above."""
    file = f"pvclock/include/pvclock_{header}.h"
    source = (ROOT / file).read_text(encoding="utf-8")
    tests = (*NATIVE_TESTS, *TESTS_OF_HEADERS[header])
    code = COMMENT.sub(lambda comment: re.sub(r"[^\n]", " ", comment[0]), source)
    for kind, pattern, becomes in C_OPERATORS:
        for match in re.finditer(pattern, code):
            for new in becomes:
                changed = str(int(match[0]) + int(new)) if kind == "number" else new
                if changed == match[0] or is_outside_of_functions(code, match.start()):
                    continue
                begin, end = lines_around(source, match.start(), match.end())
                text = source[begin:end]
                replacement = source[begin : match.start()] + changed + source[match.end() : end]
                line = source.count("\n", 0, match.start()) + 1
                name = f"{Path(file).name}:{line}: {match[0]!r} at {match.start()} to {changed!r}"
                yield Mutant(name, "", kind, file, text, replacement, tests)


def is_outside_of_functions(code: str, at: int) -> bool:
    """Whether a place in C code is no line of a function's body."""
    line = code.rfind("\n", 0, at) + 1
    return code[line] != "\t" or code.rfind("\n{\n", 0, at) < code.rfind("\n}", 0, at)


def lines_around(source: str, begin: int, end: int) -> tuple[int, int]:
    """Return the fewest whole lines around a place that stand once in a source."""
    begin, end = source.rfind("\n", 0, begin) + 1, source.index("\n", end)
    while source.count(source[begin:end]) > 1:
        begin, end = source.rfind("\n", 0, begin - 1) + 1, source.index("\n", end + 1)
    return begin, end


def of_module(module: str) -> Iterator[Mutant]:
    """Give each mutant of a Python file that cosmic-ray's operators make and that is not only an annotation's."""
    mutate_code = import_module("cosmic_ray.mutating").mutate_code  # no part of the project's environment
    plugins = import_module("cosmic_ray.plugins")

    file = f"pvclock/{module}.py"
    source = (ROOT / file).read_text(encoding="utf-8")
    tests = tuple(f"unit/test_{name}.py" for name in TESTS_OF_PYTHON[module])
    seen = {meaning(source), ""}
    for operator in sorted(plugins.operator_names()):
        if any(word in operator for word in UNWANTED):
            continue
        number = 0
        while (changed := mutate_code(source, plugins.get_operator(operator)(), number)) is not None:
            number += 1
            if (means := meaning(changed)) not in seen:
                seen.add(means)
                name = f"{module}.py: {operator.removeprefix('core/')} {number}"
                yield Mutant(name, "", operator, file, source, changed, tests)


def meaning(source: str) -> str:
    """Return what a Python source says, without its annotations; nothing where it is none."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return ""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign):
            node.annotation = ast.Constant(None)
        if isinstance(node, ast.FunctionDef):
            node.returns = None
    return ast.dump(tree)


if __name__ == "__main__":
    sys.exit(main())
