"""A measurement from inside a guest, judged and shown: what `doctor --guest` and `probe --judge` have in common."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from rich.text import Text

from pvclock.commands.arguments import rate_ppb, time_ns
from pvclock.commands.guest_next import Rerun, next_commands
from pvclock.commands.outcome import Outcome
from pvclock.commands.screen import Screen
from pvclock.commands.tables import Table

if TYPE_CHECKING:  # each command is loaded by every start of pvclock
    from pvclock.meter.inside import Budgets, Finding, ProbeRecord, Verdict

__all__ = ["add_budgets", "budgets_given", "budgets_of", "outcome_of"]

BUDGETS: Final = (
    ("max_warp", time_ns, "TIME", "how far CPUs' clocks may be apart, such as 200ns"),
    ("max_step", time_ns, "TIME", "how far a clock may step, such as 1us"),
    ("max_drift", rate_ppb, "RATE", "how fast clocks may drift, such as 10ppb"),
)
COLOURS: Final = {"passed": "green", "broken": "red", "undecided": "yellow"}


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


def outcome_of(measured: ProbeRecord, budgets: Budgets, screen: Screen, rerun: Rerun, **also: object) -> Outcome:
    """Judge what was measured; show what it comes to and what to type next.  also: more for JSON."""
    from pvclock.commands.guest_tables import clock_rows, clocks_table, promises_table
    from pvclock.meter.inside import judge, verdict_document

    verdict = judge(measured, budgets)
    following = next_commands(verdict, rerun)
    screen.show(Text(_first_line(verdict, budgets), f"bold {COLOURS[verdict.status]}"), *_reasons(verdict))
    if verdict.findings:
        screen.show(_findings_table(verdict))
    screen.show(*verdict.story, clocks_table(measured), promises_table(measured, verdict))
    screen.show(*(f"Type next:  {each.command}  ({each.why})" for each in following))
    found = {**verdict_document(verdict), "clocks": clock_rows(measured), "next": following, **also}
    return Outcome(verdict.exit_status == 0, found, verdict.exit_status)


# Inside


def _first_line(verdict: Verdict, budgets: Budgets) -> str:
    """The verdict for who reads no further."""
    said = f"{_sentence(verdict, _decided_by(budgets))}{_not_all(verdict)}."
    return f"With the fault that --add put in, {said}" if verdict.is_added else said[0].upper() + said[1:]


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _decided_by(budgets: Budgets) -> set[str]:
    """The budgets that were given, as findings name those that decide them."""
    return {name for (name, *_), limit in zip(BUDGETS, budgets, strict=True) if limit is not None}


def _sentence(verdict: Verdict, decided_by: set[str]) -> str:
    """The verdict as a sentence, without its full stop."""
    clock = "this machine's clock" if verdict.promises.hypervisor == "none" else "this guest's clock"
    all_faults = sorted((finding for finding in verdict.findings if _is_fault(finding)), key=_place)
    if verdict.broken:
        return f"{clock} breaks a budget: {verdict.broken[0]}"
    if verdict.status == "broken":
        faults = [finding for finding in all_faults if finding.budget not in decided_by]
        return f"{clock} is wrong: {faults[0].headline}{_more(faults)}"
    if verdict.open:
        return f"undecided whether {clock} is right: {verdict.open[0].what}"
    if all_faults:
        return f"{clock} keeps the budgets given; what is wrong within them is below"
    return f"nothing is wrong with {clock}, as far as can be told from inside; {_floors(verdict)}"


def _not_all(verdict: Verdict) -> str:
    """That it is a verdict on some CPUs alone, whatever it is."""
    measured, present = len(verdict.cpus), verdict.cpus_present
    if present is not None and measured < present:
        return f"; {measured} of {present} CPUs {'was' if measured == 1 else 'were'} measured"
    is_told = any(question.reason == "one-cpu" for question in verdict.open) and not verdict.broken
    return f"; only CPU {verdict.cpus[0]} was measured" if measured == 1 and present is None and not is_told else ""


def _more(faults: list[Finding]) -> str:
    return f"; {len(faults) - 1} more below" if len(faults) > 1 else ""


def _is_fault(finding: Finding) -> bool:
    return finding.weight == "fault"


def _place(finding: Finding) -> tuple[bool, bool]:
    """Faults first, and a promise that is broken by another fault after that."""
    return not _is_fault(finding), finding.code == "broken-promise"


def _floors(verdict: Verdict) -> str:
    """What was too small to be seen: by each clock between CPUs, and by the one that tells most against the TSC."""
    from pvclock.meter.inside.words import floor_in_words

    apart = [f"{floor_in_words(floor.ns)} ({floor.clock})" for floor in verdict.floors if floor.ns is not None]
    steps = min(((floor.ns, floor.clock) for floor in verdict.step_floors if floor.ns is not None), default=None)
    hidden = [f"CPUs that are apart by less than {', '.join(apart)}"] if apart else []
    hidden += [f"steps below {floor_in_words(steps[0])} ({steps[1]})"] if steps else []
    said = [f"{' and '.join(hidden)} may not be seen"] if hidden else []
    said += [] if apart else ["no CPUs were compared"]
    said += [] if steps else ["no steps were searched for"]
    return "; ".join(said)


def _reasons(verdict: Verdict) -> Iterator[Text]:
    """What else broke a budget, or leaves one open."""
    for reason in (*verdict.broken, *(question.what for question in verdict.open))[1:]:
        yield Text(f"  {reason}", COLOURS[verdict.status])


def _findings_table(verdict: Verdict) -> Table:
    """What was found, and what software sees of it; then each thing to change, once."""
    table = Table("", "what was found")
    told = {""}
    for finding in sorted(verdict.findings, key=_place):
        table.add_row(Text("what is wrong", "red") if _is_fault(finding) else "worth knowing", finding.what)
        if finding.software_sees not in told:
            told.add(finding.software_sees)
            table.add_row("software sees", finding.software_sees)
        table.end_section()
    for remedy in dict.fromkeys(remedy for finding in verdict.findings for remedy in finding.change):
        table.add_row("what to change", remedy)
    return table
