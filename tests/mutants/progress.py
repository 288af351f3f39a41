"""Running mutants under a person's eyes: progress on standard error, findings as they come, each result in a log."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.mutants import campaign
from tests.mutants.mutant import Mutant


def run(
    mutants: list[Mutant],
    log: Path | None,
    *,
    arguments: Callable[[Mutant], list[str]],
    jobs: int,
    seconds: float = campaign.SECONDS_MAX,
) -> dict[str, campaign.Result]:
    """Run mutants and return the results by mutant; arguments, jobs, seconds and errors as campaign.run().

    log: takes each result at once; without one, whatever comes is told, not findings alone.
    """
    tree = campaign.tree_hash()
    columns = (TextColumn("{task.description}", markup=False), MofNCompleteColumn(), TimeElapsedColumn())
    results = {}
    with (
        tempfile.TemporaryDirectory(prefix="pvclock-mutants-") as work,
        Progress(*columns, console=Console(stderr=True)) as progress,
        closing(
            campaign.run(
                mutants,
                Path(work),
                arguments=arguments,
                jobs=jobs,
                seconds=seconds,
                report=lambda what: progress.update(bar, description=what),
            )
        ) as of_each,
    ):
        bar = progress.add_task("mutants", total=len(mutants))
        for result in of_each:
            results[result.mutant] = result
            if log:
                append(log, {"tree": tree, "result": result})
            progress.update(bar, advance=1, description=f"{result.mutant} {result.verdict}")
            if result.is_finding or not log:
                told = "\n  ".join((f"{result.mutant}: {result.verdict}. {result.why}", *result.noticed_by))
                progress.console.print(told, soft_wrap=True, highlight=False, markup=False)
    return results


def append(log: Path, what: object) -> None:
    """Append one line of JSON to a log."""
    with log.open("a", encoding="utf-8") as file:
        print(json.dumps(what), file=file)
