"""The command line: `pvclock COMMAND`, one module a command, found by the entry-point group `pvclock.commands`.

A command is a module with `add_arguments(parser)` and `run(arguments) -> exit status`; its docstring is its help.
Exit status: 0 done, 1 a finding, 2 it could not be done.
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import entry_points, version
from types import ModuleType

from pvclock.errors import PvclockError

__all__ = ["find_command", "main"]

GROUP = "pvclock.commands"


def find_command(name: str) -> ModuleType | None:
    """The module of command `name`, if it is installed."""
    return next((point.load() for point in entry_points(group=GROUP, name=name)), None)


def main(argv: list[str] | None = None) -> int:
    """Run the command in `argv` (the process's arguments by default); returns the exit status."""
    commands = {point.name: point for point in sorted(entry_points(group=GROUP), key=lambda point: point.name)}
    parser = argparse.ArgumentParser(prog="pvclock", description="Time inside virtual machines.")
    parser.add_argument("--version", action="version", version=f"pvclock {version('pvclock')}")
    choices = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, point in commands.items():
        module: ModuleType = point.load()
        help_text = (module.__doc__ or name).strip()
        choice = choices.add_parser(name, help=help_text.splitlines()[0], description=help_text)
        choice.add_argument("--json", action="store_true", help="print JSON")
        module.add_arguments(choice)
        choice.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except PvclockError as error:
        print(f"pvclock {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
