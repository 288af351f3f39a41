"""`pvclock doctor --guest`: measures the clock of the Linux guest that it runs in, and says what is wrong with it."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
from collections.abc import Iterable
from typing import Final

from pvclock.commands import probe_files, whole_file
from pvclock.commands.arguments import duration_s
from pvclock.commands.guest_next import SECONDS_MIN, NextCommand, Options, Rerun, budget_words
from pvclock.commands.guest_verdict import add_budgets, budgets_given, budgets_of, outcome_of
from pvclock.commands.outcome import Outcome
from pvclock.commands.screen import Screen
from pvclock.errors import ConfigError
from pvclock.quantities import quoted

__all__ = ["add_arguments", "doctor_rerun", "options_given", "run"]

SECONDS: Final = 10.0
"""By default: steps and rates show, and nobody has given up waiting."""

CPUS_MAX: Final = 64
"""As many as the probe takes."""
MEASURING: Final = "measuring this guest's clocks"
ADDED_NS_MAX: Final = 10**12
CPU_RANGE: Final = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?")
SAVED: Final = "guest-clock.json"
"""Where the next measurement of a fault is kept, unless --save says another place."""
ADDED: Final = re.compile(r"(\d{1,5}):([+-]?\d{1,13})")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what goes with --guest."""
    parser.add_argument("--seconds", type=_seconds, help=f"how long to measure (default {SECONDS:g})")
    parser.add_argument(
        "--cpus", type=_cpus, metavar="LIST", help="on which CPUs, such as 0,2-3 (default: all, up to 64)"
    )
    added = "put a fault in, to see it found: what CPU reads is so many ns ahead"
    parser.add_argument("--add", type=_added, action="append", default=[], metavar="CPU:NS", help=added)
    save = "keep the measurement in FILE, as one line: pvclock probe --judge FILE shows the same again"
    parser.add_argument("--save", metavar="FILE", type=_file, help=save)
    add_budgets(parser)


def options_given(arguments: argparse.Namespace) -> list[str]:
    """Those of these options that are on the command line."""
    own = {
        "--seconds": arguments.seconds,
        "--cpus": arguments.cpus,
        "--add": arguments.add or None,
        "--save": arguments.save,
    }
    return [option for option, value in own.items() if value is not None] + budgets_given(arguments)


def run(arguments: argparse.Namespace, screen: Screen) -> Outcome:
    """Measure, keep the measurement if that is asked for, judge, and show."""
    from pvclock.commands.probe_process import run_probe
    from pvclock.meter.inside import parse_record
    from pvclock.probe import linux_executable

    options = Options(
        arguments.seconds or SECONDS,
        arguments.cpus and tuple(arguments.cpus),
        tuple(arguments.add),
        tuple(budgets_of(arguments)),
    )
    told = _probe_options(options.seconds, _measurable(arguments.cpus), arguments.add)
    with screen.progress(100, MEASURING) as update:
        line = run_probe(linux_executable(), told, options.seconds, lambda percent: update(percent, MEASURING))
    if arguments.save is not None:
        whole_file.write(arguments.save, line)
    rerun = doctor_rerun(options, arguments.save)
    return outcome_of(parse_record(line), budgets_of(arguments), screen, rerun, record=json.loads(line))


def doctor_rerun(options: Options, saved: str | None) -> Rerun:
    """The same command again, and how those who run the host get the measurement."""
    return Rerun(options, _command, _on_all_cpus(options), _of_a_fault(options, saved), can_wait_for_it=True)


# Inside


def _command(options: Options, *more: str) -> str:
    words = ["pvclock", "doctor", "--guest"]
    if options.seconds != SECONDS:
        words += ["--seconds", f"{options.seconds:.15g}"]
    if options.cpus:
        words += ["--cpus", _listed(options.cpus)]
    for cpu, ns in options.added:
        words += ["--add", f"{cpu}:{ns}"]
    return shlex.join([*words, *budget_words(options.budgets), *more])


def _on_all_cpus(options: Options) -> str:
    """The command on all CPUs, whatever this process was left; "" in a guest with one."""
    there = os.cpu_count() or 1
    if there == 1:
        return ""
    command = _command(options._replace(cpus=None))
    return command if len(os.sched_getaffinity(0)) > 1 else f"taskset -c 0-{there - 1} {command}"


def _of_a_fault(options: Options, saved: str | None) -> NextCommand:
    if saved is None:
        command = _command(options, "--save", SAVED)
        return NextCommand(command, f"keeps it in {SAVED} for the host's people, whose pvclock probe --judge reads it")
    judge = shlex.join(["pvclock", "probe", "--judge", saved, *budget_words(options.budgets)])
    return NextCommand(judge, f"shows the same to the host's people: give them {saved}")


def _measurable(cpus: list[int] | None) -> list[int]:
    """The CPUs to measure on; ConfigError for one that is not there, or that this process may not use."""
    usable = os.sched_getaffinity(0)
    if lacking := sorted(set(cpus or ()) - usable):
        raise ConfigError(f"CPU {lacking[0]} is not there, or not for this process; it can use {_listed(usable)}")
    return sorted(cpus or usable)[:CPUS_MAX]


def _probe_options(seconds: float, cpus: list[int], added: list[tuple[int, int]]) -> list[str]:
    """The executable's command line."""
    for cpu, _ns in added:
        if cpu not in cpus:
            raise ConfigError(f"--add {cpu}:...: CPU {cpu} is not measured; {_listed(cpus)} are")
    told = ["--progress", "--parent", str(os.getpid())]
    options = [*told, "--seconds", f"{seconds:g}", "--cpus", ",".join(map(str, cpus))]
    return options + [text for cpu, ns in added for text in ("--add", f"{cpu}:{ns}")]


def _listed(cpus: Iterable[int]) -> str:
    return ",".join(map(str, sorted(cpus)))


def _seconds(text: str) -> float:
    seconds = duration_s(text)
    if seconds < SECONDS_MIN:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is too short a time; {SECONDS_MIN:g} s is the least")
    return seconds


def _cpus(text: str) -> list[int]:
    cpus: set[int] = set()
    for part in text.split(","):
        match = CPU_RANGE.fullmatch(part.strip())
        first, last = map(int, (match[1], match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise argparse.ArgumentTypeError(f"{quoted(text)} is no list of CPUs, such as 0,2-3")
        cpus.update(range(first, last + 1))
    if len(cpus) > CPUS_MAX:
        raise argparse.ArgumentTypeError(f"{quoted(text)} names {len(cpus)} CPUs; {CPUS_MAX} can be measured at once")
    return sorted(cpus)


def _file(text: str) -> str:
    if text in {"", probe_files.STDIN}:
        raise argparse.ArgumentTypeError("--save takes the name of a file")
    return text


def _added(text: str) -> tuple[int, int]:
    match = ADDED.fullmatch(text)
    if match is None or abs(int(match[2])) > ADDED_NS_MAX:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not CPU:NS, such as 1:500, of up to 1000 s")
    return int(match[1]), int(match[2])
