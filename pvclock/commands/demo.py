"""Show a guest's clock at work: read on real vCPUs while it changes, beside the kernel's own and QEMU's.

Takes about 25 s.  Without /dev/kvm, threads of this process read the pages that a guest would.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, Final

from rich.text import Text

from pvclock.commands import find_command
from pvclock.commands.arguments import duration_s, whole_number
from pvclock.commands.doctor import Finding, examine
from pvclock.commands.outcome import Outcome
from pvclock.commands.screen import Screen
from pvclock.commands.tables import Table, verdict
from pvclock.errors import KvmError
from pvclock.kvm.capabilities import open_kvm
from pvclock.meter.comparison import Check, compare_undisturbed
from pvclock.meter.in_process_guest import InProcessGuest
from pvclock.meter.machine_guest import MachineGuest
from pvclock.meter.observe import observe_undisturbed
from pvclock.meter.reference_time import compare_reference_time, observe_engine
from pvclock.meter.stress import THREAD_BURSTS, VCPU_BURSTS, PublishStress, stress_publishing
from pvclock.payloads import probe

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES: Final = """\
  pvclock demo                      half a minute
  pvclock demo --seconds 2          sooner"""

STRESS_S = 10.0
OBSERVE_S = 2.0
REFERENCE_TIME_S = 0.5

LEFT_OUT = (
    "Left out, without /dev/kvm: real vCPUs, the guest's own MSR accesses, and the kernel's kvmclock to compare "
    "with.  The pages, the publishing and the arithmetic are the same."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    seconds = f"how long the pages are republished (default {STRESS_S:g})"
    parser.add_argument("--seconds", type=duration_s, default=STRESS_S, help=seconds)
    parser.add_argument(
        "--vcpus", type=whole_number(1, probe.MAX_CPUS), default=2, help="how many vCPUs read (default 2)"
    )


def run(arguments: argparse.Namespace, screen: Screen) -> Outcome:
    """Run the demonstration; a finding if a guest saw its clock misbehave, or the clocks disagree."""
    why_no_kvm = _why_no_kvm()
    findings = list(examine())
    screen.show(_host(findings))
    if why_no_kvm:
        screen.show(why_no_kvm, LEFT_OUT)
    result = _stress(screen, arguments.seconds, arguments.vcpus, on_kvm=why_no_kvm is None)
    screen.show(_stress_table(result))
    comparison = [] if why_no_kvm else _compare(screen, arguments.vcpus)
    reference_time = [] if why_no_kvm else _reference_time(screen, arguments.vcpus)
    ok = not any(result.failures.values()) and all(row["ok"] for row in (*comparison, *reference_time))
    style, verdict_text = (
        ("green", "Everything as it should be.") if ok else ("red", "Something is wrong; see the tables.")
    )
    screen.show(Text(verdict_text, style=style))
    found = {
        "kvm_guests": why_no_kvm is None,
        "why_no_kvm": why_no_kvm,
        "host": findings,
        "stress": _stress_values(result),
        "comparison": comparison,
        "reference_time": reference_time,
    }
    return Outcome(ok, found)


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


def _stress(screen: Screen, seconds: float, vcpus: int, *, on_kvm: bool) -> PublishStress:
    with screen.progress(seconds, "republishing under the readers") as update:

        def show(so_far: PublishStress) -> None:
            bad = sum(so_far.failures.values())
            update(so_far.seconds, f"{so_far.publishing.publishes:,} publishes, {so_far.reads:,} reads, {bad} wrong")

        if on_kvm:
            with MachineGuest("engine", vcpus) as machine:
                return stress_publishing(machine, seconds, bursts=VCPU_BURSTS, progress=show)
        with InProcessGuest(vcpus) as threads:
            return stress_publishing(threads, seconds, bursts=THREAD_BURSTS, progress=show)


def _compare(screen: Screen, vcpus: int) -> list[dict[str, Any]]:
    """Show the clocks side by side, each left alone: with QEMU's where there is one."""
    glue = find_command("crosscheck")
    lacking = "qemu_glue is not installed" if glue is None else glue.obstacle()
    if glue is None or lacking:
        screen.show(f"Engine and kernel only: {lacking}")
        rows = _compare_two(screen, vcpus)
        screen.show(_side_by_side(rows))
        return [{"name": row.name, **row.figures, "ok": row.ok} for row in rows]
    checks = glue.crosscheck(vcpus, OBSERVE_S, screen)
    screen.show(glue.table(checks))
    return list(map(glue.as_json, checks))


def _compare_two(screen: Screen, vcpus: int) -> list[Check]:
    with screen.waiting("the engine's clock, left alone"), MachineGuest("engine", vcpus) as guest:
        engine = observe_undisturbed(guest, OBSERVE_S)
    with screen.waiting("the kernel's clock, left alone"), MachineGuest("kernel", vcpus) as guest:
        kernel = observe_undisturbed(guest, OBSERVE_S)
    return compare_undisturbed(engine, kernel)


def _reference_time(screen: Screen, vcpus: int) -> list[dict[str, Any]]:
    """Show Hyper-V's reference time of a guest that has KVM's clock, too."""
    with screen.waiting("Hyper-V's reference time"):
        rows = compare_reference_time([observe_engine(vcpus, REFERENCE_TIME_S)])
    table = Table("Hyper-V's reference time", "engine", "as it should be")
    for row in rows:
        table.add_row(row.name, row.figures["engine"].text, verdict(row.ok))
    screen.show(table)
    return [{"name": row.name, "engine": row.figures["engine"], "ok": row.ok} for row in rows]


def _stress_table(result: PublishStress) -> Table:
    publishing = result.publishing
    table = Table("Republished under the readers", "")
    table.add_row("publishes, rates from 1/10 to 10/1", f"{publishing.publishes:,}")
    table.add_row("publishes a second", f"{result.publishes_per_second:,.0f}")
    table.add_row("reads by the guest", f"{result.reads:,}")
    for kind, count in result.failures.items():
        table.add_row(kind.replace("_", ", "), f"{count}")
    table.add_row("steps at a publish", f"{publishing.least_step_ns} to {publishing.most_step_ns} ns")
    table.add_row("page against the timeline", f"-{publishing.most_behind_ns} to +{publishing.most_ahead_ns} ns")
    return table


def _side_by_side(rows: list[Check]) -> Table:
    table = Table("Left alone", "engine", "kernel", "agree")
    for row in rows:
        engine, kernel = (row.figures[name].text for name in ("engine", "kernel"))
        table.add_row(row.name, engine, kernel, verdict(row.ok))
    return table


def _stress_values(result: PublishStress) -> Mapping[str, object]:
    return {
        "duration_s": result.seconds,
        "publishes_per_s": result.publishes_per_second,
        **result.publishing._asdict(),
        "reads": result.reads,
        **result.failures,
    }
