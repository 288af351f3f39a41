"""Run a command in the lab: a full upstream Linux KVM, emulated, on any x86-64 Linux.

The command finds this root file system, working directory and virtual environment, and a /dev/kvm that honours TSC
offsets.  What it writes is gone afterwards, but in folders given by --writable.  With one CPU the lab's kernel trusts
its TSC; with two it does not, unless --tsc-reliable.  The first run downloads a Debian kernel.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from pvclock.lab import LabConfig, run_in_lab

__all__ = ["add_arguments", "run"]

DEFAULT = LabConfig()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--cpus", type=int, default=DEFAULT.cpus, help=f"the lab's CPUs (default {DEFAULT.cpus})")
    parser.add_argument("--memory", default=DEFAULT.memory, help=f"its memory (default {DEFAULT.memory})")
    parser.add_argument("--kernel", metavar="PATH|RELEASE", help="a kernel image, or a release such as 6.1.0-50-amd64")
    parser.add_argument("--tsc-reliable", action="store_true", help="its kernel is to trust its TSCs")
    parser.add_argument("--writable", action="append", default=[], type=Path, metavar="FOLDER", help="keep its changes")
    parser.add_argument(
        "--timeout",
        type=float,
        default=DEFAULT.timeout_s,
        metavar="SECONDS",
        help=f"when to give up (default {DEFAULT.timeout_s:g})",
    )
    parser.add_argument("argv", nargs="+", metavar="COMMAND", help="the command and its arguments, after --")


def run(arguments: argparse.Namespace) -> int:
    """Run the command in the lab; its exit status is ours."""
    config = LabConfig(
        cpus=arguments.cpus,
        memory=arguments.memory,
        kernel=arguments.kernel,
        tsc_reliable=arguments.tsc_reliable,
        writable=tuple(folder.resolve() for folder in arguments.writable),
        timeout_s=arguments.timeout,
    )
    with _ended_by_signals():
        outcome = run_in_lab(arguments.argv, config, tell=_tell)
    if arguments.json:
        print(json.dumps(outcome._asdict()), file=sys.stderr)
    return outcome.status


def _tell(text: str) -> None:
    print(f"pvclock lab: {text}", file=sys.stderr, flush=True)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the stack, so that the lab and its files go with us."""

    def leave(number: int, _frame: object) -> NoReturn:
        sys.exit(128 + number)

    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
