"""Show a guest's clock at work: read on real vCPUs while it changes, beside the kernel's own and QEMU's.

Takes about 25 s.  Without /dev/kvm the same is shown in this process: threads read the pages that a guest would.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from rich.text import Text

from pvclock.commands import find_command
from pvclock.commands.arguments import duration_s, whole_number
from pvclock.commands.doctor import Finding, examine
from pvclock.commands.report import Report, Shown
from pvclock.commands.screen import Screen
from pvclock.commands.tables import Table, verdict
from pvclock.errors import KvmError
from pvclock.kvm.capabilities import open_kvm
from pvclock.meter.inprocess import in_process_storm
from pvclock.meter.observe import Observation, Storm, failures, observe, storm
from pvclock.payloads import probe

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES: Final = """\
  pvclock demo                      half a minute
  pvclock demo --seconds 2          sooner"""

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
    seconds = f"how long the pages are republished (default {STORM_S:g})"
    parser.add_argument("--seconds", type=duration_s, default=STORM_S, help=seconds)
    parser.add_argument(
        "--vcpus", type=whole_number(1, probe.MAX_CPUS), default=2, help="how many vCPUs read (default 2)"
    )


def run(arguments: argparse.Namespace, screen: Screen) -> Report:
    """Run the demonstration; a finding if a guest saw its clock misbehave, or the clocks disagree."""
    why_no_kvm = _why_no_kvm()
    findings = list(examine())
    screen.show(_host(findings))
    if why_no_kvm:
        screen.show(why_no_kvm, LEFT_OUT)
    result = _storm(screen, in_process_storm if why_no_kvm else storm, arguments)
    screen.show(_storm_table(result))
    comparison = [] if why_no_kvm else _compare(screen, arguments.vcpus)
    ok = not any(result.failures.values()) and all(row["ok"] for row in comparison)
    style, verdict_text = (
        ("green", "Everything as it should be.") if ok else ("red", "Something is wrong; see the tables.")
    )
    screen.show(Text(verdict_text, style=style))
    found = {
        "kvm_guests": why_no_kvm is None,
        "why_no_kvm": why_no_kvm,
        "host": findings,
        "storm": _storm_values(result),
        "comparison": comparison,
    }
    return Report(ok, found)


def _why_no_kvm() -> str | None:
    try:
        open_kvm().close()
    except KvmError as error:
        return str(error.strerror)
    return None


def _host(findings: list[Finding]) -> Table:
    table = Table("This host", "")
    for finding in findings:
        if not finding.name.startswith("KVM_CAP_"):
            table.add_row(finding.name, Text(finding.found.text, style="" if finding.ok else "yellow"))
    lacking = [finding.name for finding in findings if finding.name.startswith("KVM_CAP_") and not finding.ok]
    table.add_row("lacking, see pvclock doctor", ", ".join(lacking) or "nothing")
    return table


def _storm(screen: Screen, run_storm: Callable[..., Storm], arguments: argparse.Namespace) -> Storm:
    with screen.progress(arguments.seconds, "republishing under the readers") as update:

        def show(so_far: Storm) -> None:
            bad = sum(so_far.failures.values())
            update(so_far.seconds, f"{so_far.churn.publishes:,} publishes, {so_far.reads:,} reads, {bad} wrong")

        return run_storm(arguments.seconds, arguments.vcpus, progress=show)


def _compare(screen: Screen, vcpus: int) -> list[dict[str, Any]]:
    """Lay the clocks side by side, each left alone: with QEMU's where there is one."""
    glue = find_command("crosscheck")
    lacking = "qemu_glue is not installed" if glue is None else glue.obstacle()
    if glue is None or lacking:
        screen.show(f"Engine and kernel only: {lacking}")
        rows = list(_comparison(*_observe(screen, vcpus)))
        screen.show(_side_by_side(rows))
        return [row._asdict() for row in rows]
    checks = glue.crosscheck(vcpus, OBSERVE_S, screen)
    screen.show(glue.table(checks))
    return [check._asdict() for check in checks]


def _observe(screen: Screen, vcpus: int) -> tuple[Observation, Observation]:
    with screen.waiting("the engine's clock, left alone"):
        engine = observe("engine", OBSERVE_S, vcpus)
    with screen.waiting("the kernel's clock, left alone"):
        kernel = observe("kernel", OBSERVE_S, vcpus)
    return engine, kernel


class Row(NamedTuple):
    """A line of the table: what the engine and the kernel have, and do they agree?"""

    name: str
    engine: Shown
    kernel: Shown
    ok: bool


def _comparison(engine: Observation, kernel: Observation) -> Iterator[Row]:
    bound_ppb = engine.rate_bound_ppb + kernel.rate_bound_ppb

    def row(name: str, key: str, value: Callable[[Observation], Any], show: str, ok: bool | None = None) -> Row:
        ours, theirs = value(engine), value(kernel)
        cells = [Shown(show.format(each), {key: each}) for each in (ours, theirs)]
        return Row(name, cells[0], cells[1], ours == theirs if ok is None else ok)

    def versions(each: Observation) -> list[int]:
        return [page.version for page in each.pages]

    def wrong(each: Observation) -> int:
        return sum(failures(each.records).values())

    yield row("tsc_to_system_mul", "tsc_to_system_mul", lambda each: each.pages[0].tsc_to_system_mul, "{:#x}")
    yield row("tsc_shift", "tsc_shift", lambda each: each.pages[0].tsc_shift, "{}")
    yield row("flags", "flags", lambda each: [page.flags for page in each.pages], "{}")
    yield row("features (CPUID)", "features", lambda each: each.records[0].features, "{:#x}")
    even = not any(version % 2 for version in (*versions(engine), *versions(kernel)))
    yield row("versions, even", "versions", versions, "{}", even)
    yield row(
        "wall clock against the host",
        "wall_clock_error_ns",
        lambda each: each.wall_clock_error_ns,
        "{:+,} ns",
        max(abs(engine.wall_clock_error_ns), abs(kernel.wall_clock_error_ns)) < WALL_CLOCK_LIMIT_NS,
    )
    yield row(
        f"rate against the TSC, within {bound_ppb:.2f} ppb",
        "rate_ppb",
        lambda each: each.rate_ppb,
        "{:+.3f} ppb",
        abs(engine.rate_ppb - kernel.rate_ppb) <= bound_ppb,
    )
    yield row("the guest's reads", "reads", lambda each: sum(it.reads for it in each.records), "{:,}", ok=True)
    yield row("backward, wild or torn", "wrong_reads", wrong, "{}", wrong(engine) + wrong(kernel) == 0)


def _storm_table(result: Storm) -> Table:
    churn = result.churn
    table = Table("Republished under the readers", "")
    table.add_row("publishes, rates from 1/10 to 10/1", f"{churn.publishes:,}")
    table.add_row("publishes a second", f"{result.publishes_per_second:,.0f}")
    table.add_row("reads by the guest", f"{result.reads:,}")
    for kind, count in result.failures.items():
        table.add_row(kind.replace("_", ", "), f"{count}")
    table.add_row("steps at a publish", f"{churn.least_step_ns} to {churn.most_step_ns} ns")
    table.add_row("page against the timeline", f"-{churn.most_behind_ns} to +{churn.most_ahead_ns} ns")
    return table


def _side_by_side(rows: list[Row]) -> Table:
    table = Table("Left alone", "engine", "kernel", "agree")
    for row in rows:
        table.add_row(row.name, row.engine.text, row.kernel.text, verdict(row.ok))
    return table


def _storm_values(result: Storm) -> Mapping[str, object]:
    return {
        "duration_s": result.seconds,
        "publishes_per_s": result.publishes_per_second,
        **result.churn._asdict(),
        "reads": result.reads,
        **result.failures,
    }
