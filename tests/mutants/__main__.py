"""Run the mutants: `python -m tests.mutants [NAME ...]`, where a name is a row or a mutant; all without one.

The exit status is 1 where there are findings, 2 where the mutants cannot be run, and 130 after Ctrl-C; then the same
command goes on from the log.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.mutants import campaign, progress
from tests.mutants.mutant import ROOT, BadMutant, Mutant, load
from tests.revision import commit, revision

CANNOT, INTERRUPTED = 2, 130
UNIT_TESTS = ("tests/unit", "tests/model")
ALL_TESTS = ("tests/unit", "tests/model", "tests/stress", "tests/kvm", "tests/qemu")


def main() -> int:
    """Run what the arguments say; return the exit status."""
    arguments = parser().parse_args()
    log = arguments.log
    begun, of = time.monotonic(), revision()
    try:
        mutants = chosen(arguments)
        log.parent.mkdir(parents=True, exist_ok=True)
        known = {} if arguments.afresh or arguments.find else campaign.logged(log)
        known |= progress.run(
            [mutant for mutant in mutants if mutant.name not in known],
            None if arguments.find else log,
            arguments=lambda mutant: tests_of(mutant, arguments.find),
            jobs=arguments.jobs,
        )
    except (BadMutant, OSError) as why:
        print(why, file=sys.stderr)
        return CANNOT
    except KeyboardInterrupt:
        print(f"interrupted; {log} has what was found", file=sys.stderr)
        return INTERRUPTED
    results = [known[mutant.name] for mutant in mutants]
    show(mutants, results, time.monotonic() - begun, as_json=arguments.json)
    if arguments.summary and not (arguments.names or arguments.sample or arguments.find):
        arguments.summary.write_text(summary(of, mutants, results), encoding="utf-8")
    return int(any(result.is_finding for result in results))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    it = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    it.add_argument("names", nargs="*", metavar="NAME", help="a row (K-10) or one mutant (K-10.2)")
    it.add_argument("--sample", type=int, metavar="N", help="N of those that die in unit tests without a build")
    it.add_argument("--find", choices=("unit", "all"), help="run all tests that name the row, and say which notice")
    it.add_argument("--afresh", action="store_true", help="do not go on from the log")
    it.add_argument("--log", type=Path, default=ROOT / "build" / "mutants.jsonl", help="default: build/mutants.jsonl")
    it.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="copies at work at once; default: one a CPU")
    it.add_argument(
        "--summary", type=Path, metavar="FILE", help="write what all came to; not of a NAME, --sample or --find"
    )
    it.add_argument("--json", action="store_true", help="print the results as JSON lines")
    return it


def chosen(arguments: argparse.Namespace) -> list[Mutant]:
    """Return the mutants that the arguments name.

    Raises:
        BadMutant: there is none of a name, or the data are wrong.
    """
    mutants = load()
    names = set(arguments.names)
    if unknown := names - {mutant.name for mutant in mutants} - {mutant.row for mutant in mutants}:
        raise BadMutant(f"no such row or mutant: {', '.join(sorted(unknown))}")
    if names:
        mutants = [mutant for mutant in mutants if mutant.name in names or mutant.row in names]
    if arguments.sample is not None:
        quick = [each for each in mutants if not (each.is_compiled or each.is_of_the_probe or each.needs_machine)]
        mutants = random.Random(commit()).sample(quick, min(arguments.sample, len(quick)))  # noqa: S311 - no secret
    return mutants


def tests_of(mutant: Mutant, find: str | None) -> list[str]:
    """Return pytest's arguments: the tests that are to notice a mutant, or all that name its row."""
    if find is None:
        return ["-x", *(f"tests/{test}" for test in mutant.dies_in)]
    return list({"unit": UNIT_TESTS, "all": ALL_TESTS}[find])


def summary(of: str, mutants: list[Mutant], results: list[campaign.Result]) -> str:
    """Return a whole run of a commit as JSON: of each row how many mutants there are, and the findings."""
    whole = {
        "commit": of,
        "mutants": len(mutants),
        "died": sum(not result.is_finding for result in results),
        "minutes": round(sum(result.seconds for result in results) / 60),
        "rows": Counter(mutant.row for mutant in mutants),
        "findings": [result._asdict() for result in results if result.is_finding],
    }
    return json.dumps(whole, indent=1) + "\n"


def show(mutants: list[Mutant], results: list[campaign.Result], seconds: float, *, as_json: bool) -> None:
    """Print the count of mutants and findings by row, and in all; and the findings, those that the log had, too."""
    if as_json:
        print(*(json.dumps(result._asdict()) for result in results), sep="\n")
        return
    rows = {mutant.name: mutant.row for mutant in mutants}
    verdicts: dict[str, Counter[str]] = defaultdict(Counter)
    for result in results:
        verdicts[rows[result.mutant]][result.verdict] += 1
    table = Table("row", "mutants", "died", "findings")
    for row, count in verdicts.items():
        others = ", ".join(f"{number} {verdict}" for verdict, number in count.items() if verdict != campaign.DIED)
        table.add_row(row, str(count.total()), str(count[campaign.DIED]), others)
    Console().print(table)
    for result in results:
        if result.is_finding:
            print(f"{result.mutant}: {result.verdict}. {result.why}")
    died = sum(count[campaign.DIED] for count in verdicts.values())
    print(f"{died} of {len(results)} mutants of {len(verdicts)} rows died; {seconds:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
