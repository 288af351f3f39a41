"""Two VMs at once on one host, kernel kvmclock and engine, and how far their guests' clocks drift from the host's.

    .venv/bin/python -m bench.drift --seconds 600 --output docs/drift

Both guests run clockprobe, which reads its clock all the time.  Once a second each is stopped for some us, and its
newest reading, a pair (tsc, ns), is compared with the reference at that very TSC.  At the end both clocks are
re-anchored in every way there is, which shows the steps that a guest sees (pvclock.meter.series).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pvclock import PvclockError, Reference
from pvclock.meter.machine_guest import MachineGuest
from pvclock.meter.reanchor import engine_reanchors, kernel_reanchors
from pvclock.meter.series import ENDS, Series, watch_drift

INTERVAL_S: Final = 1
SETTLE_S: Final = 20
"""The engine's clock has found its reference's rate by then; that time is shown, and not counted."""
CLOCK_NAMES: Final = {Reference.RAW: "MONOTONIC_RAW", Reference.MONOTONIC: "MONOTONIC"}


def watch(
    seconds: float, reference: Reference, progress: Callable[[float, Sequence[Series]], None]
) -> tuple[Series, Series]:
    """Watch both VMs for `seconds` after they have settled, and then re-anchor their clocks; the kernel's first."""
    with ExitStack() as resources:
        kernel, engine = guests = [
            resources.enter_context(MachineGuest("kernel", 1)),
            resources.enter_context(MachineGuest("engine", 1)),
        ]
        watched = watch_drift(
            kernel,
            engine,
            reference,
            seconds=seconds,
            settle_s=SETTLE_S,
            interval_s=INTERVAL_S,
            progress=progress,
        )
        ways = (kernel_reanchors(kernel, resources), engine_reanchors(engine))
        for series, each in zip(watched, ways, strict=True):
            for way in each:
                series.reanchor(way)
        for guest in guests:
            guest.finish()
    return watched


def report(watched: Sequence[Series], reference: Reference) -> dict[str, object]:
    """Everything that was found, for JSON."""
    return {
        "reference": str(reference),
        "clocks": [
            {
                "name": each.name,
                "rate_ppb": each.rate_ppb[0],
                "rate_bound_ppb": each.rate_ppb[1],
                "least_step_ns": min(each.steps_ns),
                "most_step_ns": max(each.steps_ns),
                "reanchors_ns": each.reanchors,
                "readings": [point._asdict() for point in each.points],
            }
            for each in watched
        ],
    }


def table(watched: Sequence[Series], reference: Reference) -> Table:
    """The report for people."""
    shown_table = Table("", *(each.name for each in watched), title=f"Guests' clocks against {reference}")
    rates = (f"{rate:+.3f} ppb, within {bound:.3f}" for rate, bound in (each.rate_ppb for each in watched))
    shown_table.add_row("rate", *rates)
    days = (f"{each.rate_ppb[0] * 86_400 / 1e6:+.3f} ms" for each in watched)
    shown_table.add_row("in a day", *days)
    steps = (f"{min(each.steps_ns)} to {max(each.steps_ns)} ns" for each in watched)
    shown_table.add_row("steps meanwhile, true to 1 ns", *steps)
    for place, each in enumerate(watched):
        for name, step_ns in each.reanchors.items():
            shown_table.add_row(name, *("" if other != place else f"{step_ns:+d} ns" for other in range(len(watched))))
    return shown_table


def plot(watched: Sequence[Series], reference: Reference, output: Path, formats: Sequence[str]) -> list[Path]:
    """Draw how far ahead each clock was, in each of the formats, a file each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    both, close = figure.subplots(2, sharex=True)
    colors = ["tab:red", "tab:blue"]
    for each, color in zip(watched, colors, strict=True):
        s, ahead_ns = [point.s for point in each.points], [point.ahead_ns for point in each.points]
        rate, bound = each.rate_ppb
        both.plot(s, [ns / 1000 for ns in ahead_ns], color=color, label=f"{each.name}: {rate:+.2f} ppb, ±{bound:.2f}")
    both.set(ylabel="ahead of the host, us", title=f"Two guests' clocks against CLOCK_{CLOCK_NAMES[reference]}")
    both.legend()
    engine = watched[-1]
    close.errorbar(
        [point.s for point in engine.points],
        [point.ahead_ns for point in engine.points],
        [point.bound_ns for point in engine.points],
        fmt=".",
        color=colors[-1],
        ecolor="lightsteelblue",
        label=f"{engine.name}, with the bound of each reading",
    )
    close.axvspan(0, SETTLE_S, color="whitesmoke", label="settling")
    close.set(xlabel="s", ylabel="ahead of the host, ns")
    close.legend()
    files = [output.with_suffix(f".{suffix}") for suffix in formats]
    for file in files:
        figure.savefig(file, dpi=110)
    return files


def main(arguments: list[str] | None = None) -> int:
    """Measure, show and write; 1 if it could not be done."""
    parser = argparse.ArgumentParser(prog="bench.drift", description="how far guests' clocks drift, and step")
    parser.add_argument("--seconds", type=float, default=600, help="how long to watch (default: %(default)s)")
    parser.add_argument("--reference", type=Reference, choices=list(Reference)[:2], default=Reference.RAW)
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and a plot, OUTPUT.png, which needs matplotlib")
    parser.add_argument("--svg", action="store_true", help="write the plot as OUTPUT.svg, too")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    if options.seconds < 2 * ENDS * INTERVAL_S:
        parser.error(f"{options.seconds:g} s is too short for {ENDS} readings at either end; at least {2 * ENDS} s")
    errors = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=errors) as progress:
            task = progress.add_task("watching", total=SETTLE_S + options.seconds)

            def show(passed_s: float, watched: Sequence[Series]) -> None:
                ahead = ", ".join(f"{each.name} {each.points[-1].ahead_ns:+.0f} ns" for each in watched)
                progress.update(task, completed=passed_s, description=ahead)

            watched = watch(options.seconds, options.reference, show)
    except PvclockError as error:
        errors.print(f"bench.drift: {error}", highlight=False)
        return 1
    found = report(watched, options.reference)
    if options.json:
        print(json.dumps(found))
    else:
        Console().print(table(watched, options.reference))
    if options.output:
        options.output.with_suffix(".json").write_text(json.dumps(found) + "\n", encoding="ascii")
        try:
            plot(watched, options.reference, options.output, ["png", "svg"] if options.svg else ["png"])
        except ImportError:
            errors.print("no plot without matplotlib; to get it: pip install 'pvclock[plot]'", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
