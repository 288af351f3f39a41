"""Run a command in the lab: a full upstream Linux KVM, emulated, on any x86-64 Linux.

The command sees this root file system, working directory and virtual environment, and a /dev/kvm that honours TSC
offsets.  What it writes is gone afterwards, except in folders given by --writable.  With one CPU the lab's kernel
trusts its TSC; with two it does not, unless --tsc-reliable.  The first run downloads a Debian kernel.

All that follows COMMAND belongs to it, options too.  Its exit status becomes the lab's; 2 may also be the lab's own.
With --json, COMMAND's output goes to standard error, and standard output has the lab's JSON alone.
"""

from __future__ import annotations

import argparse
import sys
from typing import Final

from pvclock.commands.arguments import duration_s, folder, whole_number
from pvclock.commands.outcome import Outcome
from pvclock.commands.screen import Screen
from pvclock.commands.signals import ended_by_signals
from pvclock.errors import ConfigError
from pvclock.lab import LabConfig, run_in_lab
from pvclock.lab.machine import CPUS_MAX, memory_mib

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES: Final = """\
  pvclock lab -- pvclock doctor     what the lab's KVM can do
  pvclock lab -- pvclock demo       a guest's clock at work there; a minute"""

DEFAULT: Final = LabConfig()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.usage = "pvclock lab [options] -- COMMAND [ARGUMENT ...]"
    parser.add_argument(
        "--cpus", type=whole_number(1, CPUS_MAX), default=DEFAULT.cpus, help=f"the lab's CPUs (default {DEFAULT.cpus})"
    )
    parser.add_argument(
        "--memory", type=_memory, default=DEFAULT.memory, metavar="SIZE", help=f"its memory (default {DEFAULT.memory})"
    )
    parser.add_argument("--kernel", metavar="PATH|RELEASE", help="a kernel image, or a release such as 6.1.0-50-amd64")
    parser.add_argument("--tsc-reliable", action="store_true", help="its kernel is to trust its TSCs")
    parser.add_argument(
        "--writable", action="append", default=[], type=folder, metavar="FOLDER", help="keep its changes"
    )
    parser.add_argument(
        "--timeout",
        type=duration_s,
        default=DEFAULT.timeout_s,
        metavar="SECONDS",
        help=f"when to give up (default {DEFAULT.timeout_s:g})",
    )
    parser.add_argument("argv", nargs=argparse.REMAINDER, metavar="COMMAND", help="the command and its arguments")


def run(arguments: argparse.Namespace, screen: Screen) -> Outcome:
    """Run the command in the lab; its exit status is ours."""
    config = LabConfig(
        cpus=arguments.cpus,
        memory=arguments.memory,
        kernel=arguments.kernel,
        tsc_reliable=arguments.tsc_reliable,
        writable=tuple(arguments.writable),
        timeout_s=arguments.timeout,
    )
    command = _command(arguments.argv)
    stdout = sys.stderr.buffer if arguments.json else sys.stdout.buffer
    with ended_by_signals():
        outcome = run_in_lab(command, config, stdout=stdout, tell=lambda text: screen.tell(f"pvclock lab: {text}"))
    result = {"kernel": outcome.kernel, "status": outcome.status, "duration_s": outcome.seconds}
    return Outcome(outcome.status == 0, result, outcome.status)


def _memory(text: str) -> str:
    try:
        memory_mib(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _command(argv: list[str]) -> list[str]:
    command = argv[1:] if argv[:1] == ["--"] else argv
    if not command:
        raise ConfigError("no COMMAND to run; try pvclock lab -- pvclock doctor (see pvclock lab --help)")
    return command
