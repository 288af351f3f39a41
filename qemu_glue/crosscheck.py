"""Compare the engine's clock with the kernel's and QEMU's: the same guest on each, left alone, stopped and continued.

Takes about 15 s; the life cycle instead, with resets, save and load, about a minute.  Exit status 1 if something
disagrees, 2 if it cannot run.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Final

from rich.text import Text

from pvclock import ConfigError
from pvclock.commands.arguments import duration_s, whole_number
from pvclock.commands.outcome import Outcome
from pvclock.commands.screen import Screen
from pvclock.commands.tables import Table, verdict
from pvclock.meter.comparison import Check, compare
from pvclock.meter.figure import Figure
from pvclock.meter.machine_guest import MachineGuest
from pvclock.meter.observe import ClockObservation, Pause, observe_clock, observe_following
from pvclock.meter.watch.words import duration
from pvclock.payloads import probe
from qemu_glue.errors import QemuMissing

__all__ = ["EXAMPLES", "add_arguments", "as_json", "compare_three", "crosscheck", "obstacle", "run", "table"]

EXAMPLES: Final = """\
  pvclock crosscheck                15 s, two vCPUs
  pvclock crosscheck --why          each row with its rule and bound
  pvclock crosscheck --by-qmp       our machine asked by QMP, as QEMU is
  pvclock crosscheck --lifecycle    a minute: stops, a reset, save and load"""

OBSERVE_S = 2.0
LEAST_S: Final = 0.1
"""In less time the guests read too little for the bounds of the rows."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    vcpus = whole_number(1, probe.MAX_CPUS)
    seconds = f"how long each is left alone (default {OBSERVE_S:g}; {LEAST_S:g} or more)"
    parser.add_argument("--vcpus", type=vcpus, default=2, help="how many vCPUs each guest has (default 2)")
    parser.add_argument("--seconds", type=duration_s, default=OBSERVE_S, help=seconds)
    lifecycle = "instead, what becomes of each as it is stopped, reset, saved and loaded; about a minute"
    parser.add_argument("--lifecycle", action="store_true", help=lifecycle)
    by_qmp = "the engine's guest in a process of its own (pvclock run --qmp), asked in the same way as QEMU's"
    parser.add_argument("--by-qmp", action="store_true", help=by_qmp)
    parser.add_argument("--why", action="store_true", help="print each row's rule and bound, too")


def run(arguments: argparse.Namespace, screen: Screen) -> Outcome:
    """Show the rows; a finding if one disagrees."""
    if arguments.lifecycle and arguments.by_qmp:
        raise ConfigError("--lifecycle, --by-qmp: give one of them; a machine of ours is not saved by QMP")
    if arguments.lifecycle:
        return _lifecycle(arguments, screen)
    checks = crosscheck(arguments.vcpus, arguments.seconds, screen, by_qmp=arguments.by_qmp)
    screen.show(table(checks, explained=arguments.why))
    reference_checks, why_no_hyperv = _reference_time(arguments, screen)
    found = {
        "vcpus": arguments.vcpus,
        "checks": list(map(as_json, checks)),
        "reference_time": list(map(as_json, reference_checks)),
        "why_no_hyperv": why_no_hyperv,
        "lifecycle": [],
    }
    return Outcome(_show_wrong([(check.name, check) for check in (*checks, *reference_checks)], screen), found)


def _lifecycle(arguments: argparse.Namespace, screen: Screen) -> Outcome:
    """Show each operation's rows as they come."""
    from qemu_glue.lifecycle import cross_check_lifecycle  # here, as in crosscheck()
    from qemu_glue.peer.launch import require_programs

    require_programs()
    rows: list[tuple[str, Check]] = []
    for operation, checks in cross_check_lifecycle(arguments.vcpus, screen):
        screen.show(table(checks, operation, "as it should be", explained=arguments.why))
        rows += ((operation, check) for check in checks)
    found = {
        "vcpus": arguments.vcpus,
        "checks": [],
        "reference_time": [],
        "why_no_hyperv": None,
        "lifecycle": [{"operation": operation, **as_json(check)} for operation, check in rows],
    }
    named = [(f"{operation}: {check.name}", check) for operation, check in rows]
    return Outcome(_show_wrong(named, screen, _all_right(rows)), found)


def _all_right(rows: list[tuple[str, Check]]) -> str:
    """What is to be said of rows that are as they should be: of QEMU that is not always what a guest wants."""
    values = (check.figures["qemu"].values for _, check in rows)
    back_ns = max(worst_ns for each in values if isinstance(worst_ns := each.get("worst_ns", 0), int))
    seen = f"; QEMU's guest saw its clock go back by up to {duration(back_ns)}" if back_ns else ""
    return f"All is as it should be{seen}."


def _show_wrong(checks: list[tuple[str, Check]], screen: Screen, all_right: str = "All three agree.") -> bool:
    """Show by name which of them disagree, and why they should not; do none?"""
    wrong = [(name, check) for name, check in checks if not check.ok]
    for name, check in wrong:
        screen.show(Text.assemble((name, "red"), f": {check.why}"))
    if wrong:
        screen.show(Text(f"{len(wrong)} of {len(checks)} disagree.", style="red"))
    else:
        screen.show(Text(all_right, style="green"))
    return not wrong


def _reference_time(arguments: argparse.Namespace, screen: Screen) -> tuple[list[Check], str | None]:
    """Show Hyper-V's reference time of the engine, and of QEMU where the host's KVM has one; why not, else None."""
    from qemu_glue.reference_time import cross_check_reference_time  # here, as in crosscheck()

    checks, why_no_hyperv = cross_check_reference_time(arguments.vcpus, arguments.seconds, screen)
    rows = Table("Hyper-V's reference time", "engine", "QEMU", "as it should be", *["why"] * arguments.why)
    for check in checks:
        texts = (check.figures[name].text for name in ("engine", "qemu"))
        rows.add_row(check.name, *texts, verdict(check.ok), *[check.why] * arguments.why)
    screen.show(rows, *[why_no_hyperv] if why_no_hyperv else [])
    return checks, why_no_hyperv


def crosscheck(vcpus: int, seconds: float, screen: Screen, *, by_qmp: bool = False) -> list[Check]:
    """All rows, for guests with `vcpus` vCPUs that read for `seconds` (and 1 s more); progress goes to `screen`.

    seconds: LEAST_S or more.  by_qmp: the engine's guest is in another process, and asked by QMP.

    QemuMissing, ConfigError and all errors of starting machines and QEMUs; nothing is left running then.
    """
    # Imported here: every command loads all command modules, and qemu.qmp and asyncio are half of this one's cost.
    from qemu_glue.guest import own_guest, qemu_guest
    from qemu_glue.peer.launch import require_programs

    if not LEAST_S <= seconds < float("inf"):
        raise ConfigError(f"{seconds:g} s of observation; choose {LEAST_S:g} or more")
    if not 1 <= vcpus <= probe.MAX_CPUS:
        raise ConfigError(f"{vcpus} vCPUs; clockprobe runs on 1 to {probe.MAX_CPUS}")
    require_programs()
    with screen.waiting("the engine's clock"):
        make_guest = partial(own_guest, vcpus) if by_qmp else partial(MachineGuest, "engine", vcpus)
        nominal = observe_clock(make_guest, seconds)
    with screen.waiting("the engine's clock, following the host's"), MachineGuest("engine", 1) as guest:
        engine = nominal._replace(following=observe_following(guest, seconds))
    with screen.waiting("the kernel's clock"):
        kernel = observe_clock(lambda: MachineGuest("kernel", vcpus), seconds)
    features = engine.undisturbed.records[0].features
    with screen.waiting("QEMU's clock"):
        qemu = observe_clock(partial(qemu_guest, features, vcpus), seconds)
    return compare_three(engine, kernel, qemu)


def compare_three(engine: ClockObservation, kernel: ClockObservation, qemu: ClockObservation) -> list[Check]:
    """All rows: those of any clocks, and whether QEMU reads the same pages as we do."""
    clocks = [engine, kernel, qemu]
    pauses = {each.server.name: each.across_pause.pause for each in clocks}
    pages_by_qmp = Check(
        "pages by QMP",
        {name: _pages_by_qmp(pause) for name, pause in pauses.items()},
        all(pause.pages_by_server == pause.pages for pause in pauses.values() if pause.pages_by_server)
        and bool(pauses[qemu.server.name].pages_by_server),
        "a VMM reads the same pages as we do in the RAM that it shares; no vCPU runs meanwhile",
    )
    return compare(clocks, [pages_by_qmp])


def _pages_by_qmp(pause: Pause) -> Figure:
    """What the server itself reads, beside what lies in memory; nothing of a machine in this process."""
    if not pause.pages_by_server:
        return Figure("-")
    agree = pause.pages_by_server == pause.pages
    shown = "the same" if agree else f"{pause.pages_by_server}, not {pause.pages}"
    return Figure(shown, {"pages_by_qmp": pause.pages_by_server, "pages": pause.pages})


def as_json(check: Check) -> dict[str, object]:
    """A row as JSON has it."""
    return {"name": check.name, **check.figures, "ok": check.ok, "why": check.why}


def obstacle() -> str | None:
    """Why the cross-check cannot run here, and what helps; None if it can."""
    from qemu_glue.peer.launch import require_programs

    try:
        require_programs()
    except QemuMissing as why:
        return str(why)
    return None


def table(checks: list[Check], title: str = "", judged: str = "agree", *, explained: bool = False) -> Table:
    """The rows, with their rules if `explained`.  judged: heads the column that says whether they are right."""
    rows = Table(title, "engine", "kernel", "QEMU", judged, *["why"] * explained)
    for check in checks:
        rows.add_row(check.name, *_texts(check), verdict(check.ok), *[check.why] * explained)
    return rows


def _texts(check: Check) -> Iterator[str]:
    return (check.figures[name].text for name in ("engine", "kernel", "qemu"))
