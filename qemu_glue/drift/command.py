"""Measure how guests' clocks drift from a clock of this host, and step: the engine's, the kernel's, a QEMU guest's.

For engine and kernel a guest is started that reads its clock all the time; at the end both clocks come to new anchors
in every way there is.  A QEMU guest runs already: nothing of it is stopped or written.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pvclock import Reference
from pvclock.commands.arguments import THE_ONLY_PID, duration_s, output_file, process_id
from pvclock.commands.outcome import Outcome, message_of
from pvclock.commands.screen import Screen
from pvclock.errors import PvclockError

if TYPE_CHECKING:  # each command is loaded by every start of pvclock
    from pvclock.meter.drift.clocks import DriftingClock
    from qemu_glue.drift.plan import DriftPlan
    from qemu_glue.drift.records import DriftRecords
    from qemu_glue.drift.views import DriftView
    from qemu_glue.watch.interrupts import Interrupts

__all__ = ["EXAMPLES", "JSON_LINES", "add_arguments", "run"]

JSON_LINES: Final = True

EXAMPLES: Final = """\
  pvclock drift                             the engine's and the kernel's
  pvclock drift qemu --pid                  that of the only QEMU here
  pvclock drift engine qemu --qmp SOCKET
  pvclock drift --seconds 600 --output drift.html"""

CLOCKS: Final = ("engine", "kernel", "qemu")
SECONDS: Final = 60.0
INTERVAL_S: Final = 1.0
CANNOT: Final = 2
"""The exit status after a file that could not be written."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    clocks = "engine, kernel, or qemu, a running QEMU guest: one to three of them (default: engine kernel)"
    parser.add_argument("clocks", metavar="CLOCK", nargs="*", type=_clock, help=clocks)
    vm = parser.add_mutually_exclusive_group()
    vm.add_argument("--qmp", metavar="SOCKET", help="qemu is the QEMU with this QMP socket")
    pid = "qemu is this process (default: the only one here)"
    vm.add_argument("--pid", type=process_id, nargs="?", const=THE_ONLY_PID, help=pid)
    vm.add_argument("--libvirt", metavar="DOMAIN", help="qemu is the QEMU of this domain of libvirt")
    parser.add_argument(
        "--reference",
        choices=[each.value for each in Reference],
        default=Reference.RAW.value,
        help="the clock of this host that the clocks are held against, and engine's follows (default raw)",
    )
    seconds = f"how long, once they have settled (default {SECONDS:g})"
    parser.add_argument("--seconds", type=duration_s, default=SECONDS, help=seconds)
    settle = "how long readings do not count at first (default 20 with engine, which learns its rate, else 0)"
    parser.add_argument("--settle", type=_settle_s, metavar="SECONDS", help=settle)
    interval = f"how often the clocks are read (default {INTERVAL_S:g})"
    parser.add_argument("--interval", type=duration_s, default=INTERVAL_S, metavar="SECONDS", help=interval)
    output = "write what was found: .html, .svg or .jsonl; more than once, if you like"
    parser.add_argument("--output", type=_output, action="append", default=[], metavar="FILE", help=output)


def run(arguments: argparse.Namespace, screen: Screen) -> Outcome:
    """Read the clocks, show them, and tell what they came to."""
    from qemu_glue.drift.plan import plan_of
    from qemu_glue.watch.interrupts import Interrupts

    plan = plan_of(arguments)
    with Interrupts() as interrupts, ExitStack() as resources:
        clocks = _started(plan, screen, interrupts, resources)
        return _measured(plan, screen, clocks, interrupts)


# Inside


def _started(plan: DriftPlan, screen: Screen, interrupts: Interrupts, resources: ExitStack) -> list[DriftingClock]:
    from pvclock.meter.drift.clocks import engine_clock, kernel_clock
    from pvclock.meter.drift.host_reference import HostReference
    from qemu_glue.drift.qemu_clock import qemu_clock

    host, settle_s = HostReference(plan.reference), plan.settle_s
    made: dict[str, Callable[[], DriftingClock]] = {
        "qemu": lambda: qemu_clock(plan.target, screen, host, settle_s, interrupts, resources),
        "engine": lambda: engine_clock(host, settle_s, resources),
        "kernel": lambda: kernel_clock(host, settle_s, resources),
    }
    # A search first: it takes some seconds.
    clocks = {word: make() for word, make in made.items() if word in plan.words}
    return [clocks[word] for word in plan.words]


def _measured(plan: DriftPlan, screen: Screen, clocks: Sequence[DriftingClock], interrupts: Interrupts) -> Outcome:
    """Take readings, re-anchor, and tell what came of it: after an error, what came before."""
    from pvclock.meter.drift.clocks import take_readings
    from qemu_glue.drift.records import DriftRecords

    records = DriftRecords(clocks, plan)
    passed_s = 0.0
    try:
        with ExitStack() as drawing:
            view = _view(screen, records, drawing)
            for passed_s in take_readings(
                clocks, seconds=plan.whole_s, interval_s=plan.interval_s, wait=interrupts.wait
            ):
                view.show(passed_s)
        if not interrupts.came:
            _reanchor(clocks)
    except (PvclockError, OSError) as error:  # OSError: standard output, as a pipe that nobody reads
        _tell(screen, records, records.with_error(error))
        raise
    outcome = Outcome(True, records.result(max(passed_s - plan.settle_s, 0.0)))
    is_told = _tell(screen, records, records.with_outcome(outcome))
    return outcome if is_told else outcome._replace(ok=False, status=CANNOT)


def _tell(screen: Screen, records: DriftRecords, lines: Sequence[str]) -> bool:
    """Show the summary, and write the files whatever becomes of that; could all be written?"""
    from qemu_glue.drift.output import write_outputs
    from qemu_glue.drift.tables import summary_table

    try:
        screen.show(summary_table(records.clocks, records.plan.reference))
    finally:
        errors = write_outputs(records.plan.outputs, lines)
        for error in errors:
            screen.tell(f"pvclock drift: {message_of(error)}")
    return not errors


def _view(screen: Screen, records: DriftRecords, drawing: ExitStack) -> DriftView:
    from qemu_glue.drift.views import JsonView, LiveView, QuietView

    if records.plan.as_json:
        return JsonView(records)
    return LiveView(records, drawing.enter_context(screen.redrawing())) if screen.can_redraw else QuietView(records)


def _reanchor(clocks: Sequence[DriftingClock]) -> None:
    for clock in clocks:
        for way in clock.ways:
            clock.readings.reanchor(way)


def _clock(text: str) -> str:
    if text not in CLOCKS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(CLOCKS)}")
    return text


def _settle_s(text: str) -> float:
    return 0.0 if text == "0" else duration_s(text)


def _output(text: str) -> Path:
    from qemu_glue.drift.output import FORMATS

    if Path(text).suffix not in FORMATS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(f'FILE{each}' for each in FORMATS)}")
    return output_file(text)
