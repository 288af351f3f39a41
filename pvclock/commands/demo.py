"""Show a guest's clock at work: read on real vCPUs while it changes, beside the kernel's own and QEMU's.

Takes about 25 s.  Without /dev/kvm the same is shown in this process: threads read the pages that a guest would.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pvclock.commands import find_command
from pvclock.commands.doctor import examine
from pvclock.errors import KvmError
from pvclock.kvm.capabilities import open_kvm
from pvclock.machine.inprocess import in_process_storm
from pvclock.machine.observation import Observation, Storm, failures, observe, storm

__all__ = ["add_arguments", "run"]

STORM_S = 10.0
OBSERVE_S = 2.0
WALL_CLOCK_LIMIT_NS = 1_000_000
"""NTP may slew the host's time of day by 500 ppm while the guest runs."""

LEFT_OUT = (
    "Left out, for want of /dev/kvm: real vCPUs, the guest's own MSR accesses, and the kernel's kvmclock to compare "
    "with.  The pages, the publishing and the arithmetic are the same."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--seconds", type=_seconds, default=STORM_S, help="how long the pages are republished")
    parser.add_argument("--vcpus", type=int, default=2, help="how many vCPUs read (default 2)")


def run(arguments: argparse.Namespace) -> int:
    """Run the demonstration; 1 if a guest saw its clock misbehave, or the clocks disagree."""
    console = Console(quiet=arguments.json)
    why_no_kvm = _why_no_kvm()
    _show_host(console)
    if why_no_kvm:
        console.print(f"\n{why_no_kvm}\n{LEFT_OUT}")
    result = _storm(console, in_process_storm if why_no_kvm else storm, arguments)
    _show_storm(console, result)
    comparison = [] if why_no_kvm else _compare(console, arguments.vcpus)
    ok = not any(result.failures.values()) and all(row["ok"] for row in comparison)
    if arguments.json:
        print(json.dumps(_as_json(ok, why_no_kvm, result, comparison), indent=2))
    console.print("[green]Everything as it should be.[/]" if ok else "[red]Something is wrong; see the tables.[/]")
    return 0 if ok else 1


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no time to wait; give seconds, more than 0")
    return seconds


def _why_no_kvm() -> str | None:
    try:
        open_kvm().close()
    except KvmError as error:
        return str(error.strerror)
    return None


def _show_host(console: Console) -> None:
    findings = list(examine())
    table = Table("This host", "")
    for finding in findings:
        if not finding.name.startswith("KVM_CAP_"):
            table.add_row(finding.name, finding.found if finding.ok else f"[yellow]{finding.found}[/]")
    lacking = [finding.name for finding in findings if finding.name.startswith("KVM_CAP_") and not finding.ok]
    table.add_row("lacking, see pvclock doctor", ", ".join(lacking) or "nothing")
    console.print(table)


def _storm(console: Console, run_storm: Callable[..., Storm], arguments: argparse.Namespace) -> Storm:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("republishing under the readers", total=arguments.seconds)

        def show(so_far: Storm) -> None:
            bad = sum(so_far.failures.values())
            text = f"{so_far.churn.publishes:,} publishes, {so_far.reads:,} reads, {bad} wrong"
            progress.update(task, completed=so_far.seconds, description=text)

        return run_storm(arguments.seconds, arguments.vcpus, progress=show)


def _compare(console: Console, vcpus: int) -> list[dict[str, Any]]:
    """Lay the clocks side by side, each left alone: with QEMU's where there is one."""
    glue = find_command("crosscheck")
    lacking = "qemu_glue is not installed" if glue is None else glue.obstacle()
    if glue is None or lacking:
        console.print(f"Engine and kernel only: {lacking}")
        engine, kernel = _observe(console, vcpus)
        rows = _comparison(engine, kernel)
        console.print(_side_by_side(rows))
        return [row._asdict() for row in rows]
    checks = glue.crosscheck(vcpus, OBSERVE_S, console)
    console.print(glue.table(checks))
    return [check._asdict() for check in checks]


def _observe(console: Console, vcpus: int) -> tuple[Observation, Observation]:
    with console.status("the engine's clock, left alone"):
        engine = observe("engine", OBSERVE_S, vcpus)
    with console.status("the kernel's clock, left alone"):
        kernel = observe("kernel", OBSERVE_S, vcpus)
    return engine, kernel


class Row(NamedTuple):
    """A line of the table: what the engine and the kernel have, and do they agree?"""

    name: str
    engine: str
    kernel: str
    ok: bool


def _comparison(engine: Observation, kernel: Observation) -> list[Row]:
    bound_ppb = engine.rate_bound_ppb + kernel.rate_bound_ppb

    def row(name: str, show: Callable[[Observation], str], ok: bool | None = None) -> Row:
        ours, theirs = show(engine), show(kernel)
        return Row(name, ours, theirs, ours == theirs if ok is None else ok)

    def all_even(each: Observation) -> bool:
        return all(page.version % 2 == 0 for page in each.pages)

    def wrong(each: Observation) -> int:
        return sum(failures(each.records).values())

    return [
        row("tsc_to_system_mul", lambda each: f"{each.pages[0].tsc_to_system_mul:#x}"),
        row("tsc_shift", lambda each: f"{each.pages[0].tsc_shift}"),
        row("flags", lambda each: f"{[page.flags for page in each.pages]}"),
        row("features (CPUID)", lambda each: f"{each.records[0].features:#x}"),
        row(
            "versions, even",
            lambda each: f"{[page.version for page in each.pages]}",
            all_even(engine) and all_even(kernel),
        ),
        row(
            "wall clock against the host",
            lambda each: f"{each.wall_clock_error_ns / 1e3:+.1f} us",
            max(abs(engine.wall_clock_error_ns), abs(kernel.wall_clock_error_ns)) < WALL_CLOCK_LIMIT_NS,
        ),
        row(
            f"rate against the TSC, within {bound_ppb:.2f} ppb",
            lambda each: f"{each.rate_ppb:+.3f} ppb",
            abs(engine.rate_ppb - kernel.rate_ppb) <= bound_ppb,
        ),
        row("the guest's reads", lambda each: f"{sum(record.reads for record in each.records):,}", ok=True),
        row("backward, wild or torn", lambda each: f"{wrong(each)}", wrong(engine) + wrong(kernel) == 0),
    ]


def _show_storm(console: Console, result: Storm) -> None:
    churn = result.churn
    table = Table("Republished under the readers", "")
    table.add_row("publishes, rates from 1/10 to 10/1", f"{churn.publishes:,}")
    table.add_row("publishes a second", f"{result.publishes_per_second:,.0f}")
    table.add_row("reads by the guest", f"{result.reads:,}")
    for kind, count in result.failures.items():
        table.add_row(kind.replace("_", ", "), f"{count}")
    table.add_row("steps at a publish", f"{churn.least_step_ns} to {churn.most_step_ns} ns")
    table.add_row("page against the timeline", f"-{churn.most_behind_ns} to +{churn.most_ahead_ns} ns")
    console.print(table)


def _side_by_side(rows: list[Row]) -> Table:
    table = Table("Left alone", "engine", "kernel", "agree")
    for row in rows:
        table.add_row(row.name, row.engine, row.kernel, "[green]yes[/]" if row.ok else "[red]NO[/]")
    return table


def _as_json(ok: bool, why_no_kvm: str | None, result: Storm, comparison: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "ok": ok,
        "kvm": why_no_kvm or "used",
        "host": [finding._asdict() for finding in examine()],
        "storm": {
            "seconds": result.seconds,
            "publishes_per_second": result.publishes_per_second,
            **result.churn._asdict(),
            "reads": result.reads,
            **result.failures,
        },
        "comparison": comparison,
    }
