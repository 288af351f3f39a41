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

from pvclock import ConfigError, Reference
from pvclock.commands.arguments import duration_s
from pvclock.commands.outcome import Outcome
from pvclock.commands.screen import Screen
from pvclock.errors import PvclockError

if TYPE_CHECKING:  # each command is loaded by every start of pvclock
    from pvclock.meter.drift import DriftingClock
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
SETTLE_S: Final = 20.0
"""The engine's clock has found its reference's rate by then; that time is shown, and not counted."""
INTERVAL_S: Final = 1.0
INTERVAL_LEAST_S: Final = 0.05
"""Readings of three clocks take some ms."""
READINGS_MAX: Final = 100_000
"""All are kept; a day has 86400 s."""
THE_ONLY_PID: Final = 0
"""Stands for the pid of the only VM here."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    clocks = "engine, kernel, or qemu, a running QEMU guest: one to three of them (default: engine kernel)"
    parser.add_argument("clocks", metavar="CLOCK", nargs="*", type=_clock, help=clocks)
    vm = parser.add_mutually_exclusive_group()
    vm.add_argument("--qmp", metavar="SOCKET", help="qemu is the QEMU with this QMP socket")
    pid = "qemu is this process (default: the only one here)"
    vm.add_argument("--pid", type=_pid, nargs="?", const=THE_ONLY_PID, help=pid)
    vm.add_argument("--libvirt", metavar="DOMAIN", help="qemu is the QEMU of this domain of libvirt")
    parser.add_argument(
        "--reference",
        choices=[each.value for each in Reference],
        default=Reference.RAW.value,
        help="the clock of this host that the clocks are held against, and engine's follows (default raw)",
    )
    seconds = f"how long, once they have settled (default {SECONDS:g})"
    parser.add_argument("--seconds", type=duration_s, default=SECONDS, help=seconds)
    settle = (
        f"how long readings do not count at first (default {SETTLE_S:g} with engine, which learns its rate, else 0)"
    )
    parser.add_argument("--settle", type=_settle_s, metavar="SECONDS", help=settle)
    interval = f"how often the clocks are read (default {INTERVAL_S:g})"
    parser.add_argument("--interval", type=duration_s, default=INTERVAL_S, metavar="SECONDS", help=interval)
    output = "write what was found: .html, .svg or .jsonl; more than once, if you like"
    parser.add_argument("--output", type=_output, action="append", default=[], metavar="FILE", help=output)


def run(arguments: argparse.Namespace, screen: Screen) -> Outcome:
    """Read the clocks, show them, and tell what they came to."""
    from qemu_glue.watch.interrupts import Interrupts

    words = arguments.clocks or ["engine", "kernel"]
    settle_s = _checked_settle_s(arguments, words)
    with Interrupts() as interrupts, ExitStack() as resources:
        clocks = _started(arguments, screen, words, settle_s, interrupts, resources)
        return _measured(arguments, screen, clocks, settle_s, interrupts)


# Inside


def _checked_settle_s(arguments: argparse.Namespace, words: Sequence[str]) -> float:
    """How long to settle; ConfigError for arguments that do not go together."""
    from pvclock.meter.series import ENDS

    if len(set(words)) != len(words):
        raise ConfigError(f"each clock once, not {' '.join(words)} (see pvclock drift --help)")
    names_vm = [arguments.qmp, arguments.pid, arguments.libvirt].count(None) < 3
    if ("qemu" in words) != names_vm:
        why = (
            "--qmp, --pid and --libvirt say which guest qemu is, which is none of the clocks"
            if names_vm
            else "which guest is qemu? Give --qmp, --pid or --libvirt"
        )
        raise ConfigError(f"{why} (see pvclock drift --help)")
    if arguments.interval < INTERVAL_LEAST_S:
        raise ConfigError(f"--interval {arguments.interval:g} is too short: at least {INTERVAL_LEAST_S:g} s")
    least_s = 2 * ENDS * arguments.interval
    if arguments.seconds < least_s:
        why = f"{arguments.seconds:g} s are too short for {ENDS} readings at either end"
        raise ConfigError(f"{why}: at least {least_s:g} s")
    settle_s = arguments.settle
    if settle_s is None:
        settle_s = SETTLE_S if "engine" in words else 0.0
    if (settle_s + arguments.seconds) / arguments.interval > READINGS_MAX:
        raise ConfigError(f"more than {READINGS_MAX:,} readings; take a longer --interval")
    return float(settle_s)


def _started(
    arguments: argparse.Namespace,
    screen: Screen,
    words: Sequence[str],
    settle_s: float,
    interrupts: Interrupts,
    resources: ExitStack,
) -> list[DriftingClock]:
    from pvclock.meter.drift import HostReference, engine_clock, kernel_clock
    from qemu_glue.drift.qemu_clock import qemu_clock

    host = HostReference(Reference(arguments.reference))
    made: dict[str, Callable[[], DriftingClock]] = {
        "qemu": lambda: qemu_clock(arguments, screen, host, settle_s, interrupts, resources),
        "engine": lambda: engine_clock(host, settle_s, resources),
        "kernel": lambda: kernel_clock(host, settle_s, resources),
    }
    clocks = {word: make() for word, make in made.items() if word in words}  # a search first: it takes some seconds
    return [clocks[word] for word in words]


def _measured(
    arguments: argparse.Namespace,
    screen: Screen,
    clocks: Sequence[DriftingClock],
    settle_s: float,
    interrupts: Interrupts,
) -> Outcome:
    """Take readings, re-anchor, and show what came of it."""
    from pvclock.meter.drift import take_readings
    from qemu_glue.drift.output import write_outputs
    from qemu_glue.drift.records import DriftRecords
    from qemu_glue.drift.tables import summary_table

    records = DriftRecords(clocks, arguments.reference, arguments.interval, settle_s)
    passed_s = 0.0
    try:
        with ExitStack() as drawing:
            view = _view(arguments, screen, clocks, records, drawing)
            whole_s = settle_s + arguments.seconds
            for passed_s in take_readings(clocks, seconds=whole_s, interval_s=arguments.interval, wait=interrupts.wait):
                view.show(passed_s)
        if not interrupts.came:
            _reanchor(clocks)
    except PvclockError:
        screen.show(summary_table(clocks, arguments.reference))
        raise
    outcome = Outcome(True, records.result(max(passed_s - settle_s, 0.0)))
    screen.show(summary_table(clocks, arguments.reference))
    write_outputs(arguments.output, records.with_outcome(outcome))
    return outcome


def _view(
    arguments: argparse.Namespace,
    screen: Screen,
    clocks: Sequence[DriftingClock],
    records: DriftRecords,
    drawing: ExitStack,
) -> DriftView:
    from qemu_glue.drift.views import JsonView, LiveView, QuietView

    if arguments.json:
        return JsonView(records)
    if screen.can_redraw:
        return LiveView(clocks, records, arguments.reference, drawing.enter_context(screen.redrawing()))
    return QuietView(records)


def _reanchor(clocks: Sequence[DriftingClock]) -> None:
    for clock in clocks:
        for way in clock.ways:
            clock.series.reanchor(way)


def _clock(text: str) -> str:
    if text not in CLOCKS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(CLOCKS)}")
    return text


def _pid(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text[:12]) < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a process ID")
    return int(text)


def _settle_s(text: str) -> float:
    return 0.0 if text == "0" else duration_s(text)


def _output(text: str) -> Path:
    from qemu_glue.drift.output import FORMATS

    path = Path(text)
    if path.suffix not in FORMATS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(f'FILE{each}' for each in FORMATS)}")
    try:
        is_there = path.parent.is_dir() and not path.is_dir()
    except OSError:  # a name that is too long
        is_there = False
    if not is_there:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: its folder is not there, or it is a folder")
    return path
