"""Lay the engine's clock beside the kernel's and QEMU's: the same guest in each, left alone, stopped and continued.

Takes about 15 s.  Exit status 1 if something disagrees, 2 if it could not be run.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

from rich.text import Text

from pvclock import ConfigError
from pvclock.commands.arguments import duration_s, whole_number
from pvclock.commands.report import Report
from pvclock.commands.screen import Screen
from pvclock.commands.tables import Table, verdict
from pvclock.meter.observe import observe, observe_steered
from pvclock.payloads import probe
from qemu_glue.errors import QemuMissing

if TYPE_CHECKING:
    from qemu_glue.comparison import Check

__all__ = ["EXAMPLES", "add_arguments", "crosscheck", "obstacle", "run", "table"]

EXAMPLES: Final = """\
  pvclock crosscheck                15 s, two vCPUs
  pvclock crosscheck --why          each row with its rule and bound"""

OBSERVE_S = 2.0
LEAST_S: Final = 0.1
"""In less the guests read too little for the bounds of the rows."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    vcpus = whole_number(1, probe.MAX_CPUS)
    seconds = f"how long each is left alone (default {OBSERVE_S:g}; {LEAST_S:g} or more)"
    parser.add_argument("--vcpus", type=vcpus, default=2, help="how many vCPUs each guest has (default 2)")
    parser.add_argument("--seconds", type=duration_s, default=OBSERVE_S, help=seconds)
    parser.add_argument("--why", action="store_true", help="print each row's rule and bound, too")


def run(arguments: argparse.Namespace, screen: Screen) -> Report:
    """Show the rows; a finding if one disagrees."""
    checks = crosscheck(arguments.vcpus, arguments.seconds, screen)
    wrong = [check for check in checks if not check.ok]
    screen.show(table(checks, explained=arguments.why))
    for check in wrong:
        screen.show(Text.assemble((check.name, "red"), f": {check.why}"))
    if wrong:
        screen.show(Text(f"{len(wrong)} of {len(checks)} disagree.", style="red"))
    else:
        screen.show(Text("All three agree.", style="green"))
    return Report(not wrong, {"vcpus": arguments.vcpus, "checks": [check._asdict() for check in checks]})


def crosscheck(vcpus: int, seconds: float, screen: Screen) -> list[Check]:
    """All rows, for guests with `vcpus` vCPUs that read for `seconds` (and 1 s more); progress goes to `screen`.

    seconds: LEAST_S or more.

    QemuMissing, ConfigError and whatever starting machines and QEMUs raises; nothing is left running then.
    """
    # Imported here, for every command is loaded with each: qemu.qmp and asyncio are half of this one's weight.
    from qemu_glue.comparison import compare
    from qemu_glue.observation import see_machine, see_qemu
    from qemu_glue.peer.launch import require_programs

    if not LEAST_S <= seconds < float("inf"):
        raise ConfigError(f"{seconds:g} s of observation; choose {LEAST_S:g} or more")
    if not 1 <= vcpus <= probe.MAX_CPUS:
        raise ConfigError(f"{vcpus} vCPUs; clockprobe runs on 1 to {probe.MAX_CPUS}")
    require_programs()
    with screen.waiting("the engine's clock"):
        nominal = see_machine("engine", observe("engine", seconds, vcpus), vcpus)
    with screen.waiting("the engine's clock, following the host's"):
        engine = nominal._replace(steered=observe_steered(seconds))
    with screen.waiting("the kernel's clock"):
        kernel = see_machine("kernel", observe("kernel", seconds, vcpus), vcpus)
    with screen.waiting("QEMU's clock"):
        qemu = see_qemu(engine.alone.records[0].features, seconds, vcpus)
    return compare(engine, kernel, qemu)


def obstacle() -> str | None:
    """Why there is no QEMU to check against, and what helps; None if there is one."""
    from qemu_glue.peer.launch import require_programs

    try:
        require_programs()
    except QemuMissing as why:
        return str(why)
    return None


def table(checks: list[Check], *, explained: bool = False) -> Table:
    """The rows, with their rules if `explained`."""
    rows = Table("", "engine", "kernel", "QEMU", "agree", *["why"] * explained)
    for check in checks:
        cells = (check.engine.text, check.kernel.text, check.qemu.text)
        rows.add_row(check.name, *cells, verdict(check.ok), *[check.why] * explained)
    return rows
