"""Write the probe, which measures a guest's clock wherever it boots or runs, or judge what it printed.

As an image any VMM boots it, without an operating system; with --linux it is one static executable, which needs no
Python and no rights.  Either prints one line of JSON, and --judge says what that comes to.  Exit status 1 if the clock is
wrong or a budget is broken, 2 if that is undecided.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Final, NamedTuple

from pvclock.commands.guest_verdict import add_budgets, budgets_of, judged, shown
from pvclock.commands.report import Report
from pvclock.commands.screen import Screen
from pvclock.errors import ConfigError
from pvclock.state import atomic_file

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES: Final = """\
  pvclock probe --output probe.elf       an image that any VMM boots
  pvclock probe --linux --output probe   an executable for any x86-64 Linux
  pvclock probe --judge console.log      what either printed, judged"""

STDIN: Final = "-"
CONSOLE_BYTES_MAX: Final = 16 << 20
"""A line has some 100 KB with 64 CPUs; the rest is what else a console says."""

IMAGE_MODE, EXECUTABLE_MODE = 0o644, 0o755


class Written(NamedTuple):
    """A file that was written: what it is, and what to type next."""

    file: str
    form: str
    size_bytes: int
    next: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--output", metavar="FILE", help="write the probe to this file: an image to boot")
    what.add_argument("--judge", metavar="FILE", help='judge what it printed, a console\'s other lines beside it; "-": stdin')
    parser.add_argument("--linux", action="store_true", help="with --output: a static Linux executable instead")
    add_budgets(parser)


def run(arguments: argparse.Namespace, screen: Screen) -> Report:
    """Write the file, or judge one."""
    if arguments.output is not None:
        if given := budgets_given(arguments):
            raise ConfigError(f"{given[0]} goes with --judge; the probe measures, and does not judge")
        return _written(arguments.output, arguments.linux, screen)
    if arguments.linux:
        raise ConfigError("--linux goes with --output; --judge reads what either form printed")
    record = parse_record(_console(arguments.judge))
    return report_of(record, budgets_of(arguments), screen)
