"""A measurement from inside a guest, judged and shown: what `doctor --guest` and `probe --judge` have in common."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from rich.text import Text

from pvclock.commands.arguments import rate_ppb, time_ns
from pvclock.commands.report import Report
from pvclock.commands.screen import Screen
from pvclock.commands.tables import Table

if TYPE_CHECKING:  # each command is loaded by every start of pvclock
    from pvclock.meter.inside import Budgets, Finding, ProbeRecord, Verdict

__all__ = ["NextCommand", "add_budgets", "budgets_given", "budgets_of", "report_of"]

BUDGETS: Final = (
    ("max_warp", time_ns, "TIME", "how far CPUs' clocks may be apart, such as 200ns"),
    ("max_step", time_ns, "TIME", "how far a clock may step, such as 1us"),
    ("max_drift", rate_ppb, "RATE", "how fast clocks may drift, such as 10ppb"),
)
COLOURS: Final = {"passed": "green", "broken": "red", "undecided": "yellow"}
LOOSE_BOUND: Final = "a longer run or a quieter machine lowers the floor"


class NextCommand(NamedTuple):
    """What to type next, and what for."""

    command: str
    why: str


def add_budgets(parser: argparse.ArgumentParser) -> None:
    """Declare the budgets."""
    for name, kind, metavar, help_text in BUDGETS:
        parser.add_argument(_option(name), type=kind, metavar=metavar, help=help_text)


def budgets_given(arguments: argparse.Namespace) -> list[str]:
    """The options of budgets on the command line."""
    return [_option(name) for name, *_ in BUDGETS if getattr(arguments, name) is not None]


def budgets_of(arguments: argparse.Namespace) -> Budgets:
    """The budgets on the command line."""
    from pvclock.meter.inside import Budgets

    return Budgets(arguments.max_warp, arguments.max_step, arguments.max_drift)


def report_of(
    measured: ProbeRecord,
    budgets: Budgets,
    screen: Screen,
    next_commands: Mapping[str, list[NextCommand]],
    **also: object,
) -> Report:
    """Judge what was measured; show what it comes to and, by the verdict's status, what to type next.

    also: more for JSON.
    """
    from pvclock.commands.guest_tables import clock_rows, clocks_table, promises_table
    from pvclock.meter.inside import judge, verdict_document

    verdict = judge(measured, budgets)
    following = next_commands[verdict.status]
    screen.show(Text(_in_one_line(verdict), f"bold {COLOURS[verdict.status]}"), *_reasons(verdict))
    if verdict.findings:
        screen.show(_findings_table(verdict.findings))
    screen.show(*verdict.story, clocks_table(measured), promises_table(measured, verdict))
    screen.show(*(f"Type next:  {each.command}  ({each.why})" for each in following))
    found = {**verdict_document(verdict), "clocks": clock_rows(measured), "next": following, **also}
    return Report(verdict.exit_status == 0, found, verdict.exit_status)


# Inside


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _in_one_line(verdict: Verdict) -> str:
    """The verdict for who reads no further."""
    reasons = (*verdict.broken, *verdict.open, *(finding.what for finding in _faults(verdict)))
    match str(verdict.status):
        case "broken":
            return f"This guest's clock is wrong: {reasons[0]}"
        case "undecided":
            return f"Undecided whether this guest's clock is right: {reasons[0]}"
    if _faults(verdict):
        return "This guest's clock is within the budgets given; its faults are below."
    return f"Nothing is wrong with this guest's clock, as far as can be told from inside{_floors(verdict)}."


def _faults(verdict: Verdict) -> list[Finding]:
    return [finding for finding in verdict.findings if finding.weight == "fault"]


def _floors(verdict: Verdict) -> str:
    """What was too small to be seen."""
    from pvclock.meter.watch.words import duration

    known = [floor for floor in verdict.floors if floor.ns is not None]
    if not known:
        return ""
    each = ", ".join(f"{duration(round(floor.ns or 0))} ({floor.clock})" for floor in known)
    return f"; CPUs that are apart by less than {each} would not be seen"


def _reasons(verdict: Verdict) -> Iterator[Text]:
    """What broke a budget, or leaves it open, beyond what the first line said."""
    for reason in (*verdict.broken, *verdict.open)[1:]:
        yield Text(f"  {reason}", COLOURS[verdict.status])
    if verdict.status == "undecided":
        yield Text(f"  {LOOSE_BOUND}", "yellow")


def _findings_table(findings: tuple[Finding, ...]) -> Table:
    """Each finding in three rows: what it is, what follows from it, and what to do."""
    table = Table("", "what was found")
    for finding in findings:
        is_fault = finding.weight == "fault"
        table.add_row(Text("what is wrong", "red") if is_fault else "worth knowing", finding.what)
        if finding.software_sees:
            table.add_row("software sees", finding.software_sees)
        if finding.change:
            table.add_row("what to change", "\n".join(finding.change))
        table.end_section()
    return table
