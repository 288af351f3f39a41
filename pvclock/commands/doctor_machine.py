"""`pvclock doctor --machine`: what a guest would see of time in the machine that `pvclock run` would boot it on.

It makes that machine with the same options, does not start it, and shows the pre-flight's findings.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from pvclock.commands import machine_options
from pvclock.commands.outcome import Outcome
from pvclock.commands.screen import Screen
from pvclock.errors import ConfigError
from pvclock.machine import Machine
from pvclock.machine.preflight import Finding, Severity, preflight

if TYPE_CHECKING:  # what tables are drawn by is slow to load, and `pvclock run` has its part of this module, too
    from pvclock.commands.tables import Table

__all__ = ["add_arguments", "options_given", "run", "tell_what_is_wrong"]

HALT: Final = b"\xf4"
"""An image that would do nothing."""
STYLES: Final = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.NOTE: "green"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what goes with --machine, beside --cpus."""
    machine_options.add_arguments(parser)


options_given = machine_options.options_given


def run(arguments: argparse.Namespace, screen: Screen) -> Outcome:
    """Make the machine, look at it, and show what is found."""
    options = machine_options.clock_options(arguments)
    with Machine(HALT, vcpus=_vcpus(arguments), platform="pc", **options) as machine:
        machine_options.set_rate(machine, arguments)
        findings = preflight(machine)
    counts = {severity: sum(each.severity is severity for each in findings) for severity in Severity}
    told = f"{_counted(counts[Severity.ERROR], 'error')}, {_counted(counts[Severity.WARNING], 'warning')}"
    screen.show(f"Before this machine runs: {told}.", _table(findings))
    is_sound = not counts[Severity.ERROR]
    return Outcome(
        is_sound, {"errors": counts[Severity.ERROR], "warnings": counts[Severity.WARNING], "findings": findings}
    )


def tell_what_is_wrong(machine: Machine, screen: Screen) -> None:
    """Print the errors and warnings of a machine that is about to start, one a line, on standard error."""
    for finding in preflight(machine):
        if finding.severity is not Severity.NOTE:
            screen.tell(f"pvclock run: {finding.severity}: {finding.what}; the guest sees {finding.guest_sees}")


def _vcpus(arguments: argparse.Namespace) -> int:
    """--cpus, which for a guest is a list of CPUs, and here the number of them."""
    if arguments.cpus is None:
        return 1
    if len(arguments.cpus) != 1 or not 1 <= arguments.cpus[0] <= machine_options.CPUS_MAX:
        raise ConfigError(f"--cpus with --machine is how many vCPUs it has, 1 to {machine_options.CPUS_MAX}")
    vcpus: int = arguments.cpus[0]
    return vcpus


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _table(findings: Sequence[Finding]) -> Table:
    from rich.text import Text

    from pvclock.commands.tables import Table

    table = Table("", "finding", "what it is, what the guest sees, and what to do")
    for finding in findings:
        told = Text(f"{finding.what}\nthe guest: {finding.guest_sees}")
        if finding.advice:
            told.append(f"\n{finding.advice}", "yellow")
        table.add_row(Text(finding.severity, STYLES[finding.severity]), finding.code, told)
    return table
