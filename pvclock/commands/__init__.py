"""The command line: `pvclock COMMAND`, one module a command, found by the entry-point group `pvclock.commands`.

A command is a module: its docstring is its help, EXAMPLES the lines that say what to type, `add_arguments(parser)`
declares its arguments, and `run(arguments, screen)` does its work, shows it on the `Screen` and returns a `Outcome`.
With `JSON_LINES = True` its --json is lines: those that it writes itself while it works, and the report on one line.
This module does what all commands share: --json, errors in one line, standard streams that are closed or full,
and the exit status: 0 done, 1 a finding, 2 failed, 130 interrupted, 141 standard output was closed by its reader.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Final

from pvclock import __version__
from pvclock.errors import ConfigError, PvclockError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["find_command", "main"]

GROUP: Final = "pvclock.commands"
CANNOT: Final = 2
INTERRUPTED: Final = 130
READER_GONE: Final = 141
"""A shell's status for a program that SIGPIPE ends; Python ignores that signal."""

DESCRIPTION: Final = """Time inside virtual machines: what a guest's clock shows, and who serves it.

Type first:
  pvclock doctor           what works on this host, and what to type next
  pvclock doctor --guest   inside a VM: what is wrong with its clock
  pvclock demo             a guest's clock at work, in half a minute"""


def find_command(name: str) -> ModuleType | None:
    """The module of command `name`, if it is installed."""
    return next((point.load() for point in _points() if point.name == name), None)


def main(argv: list[str] | None = None) -> int:
    """Run the command in `argv` (the process's arguments by default); returns the exit status."""
    _open_closed_streams()
    if sys.stdout is None:
        return _complain("pvclock", OSError("standard output is closed; give it a terminal, a file or /dev/null"))
    try:
        status = _main(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:
        status = READER_GONE
    except OSError as error:
        status = _complain("pvclock", error)
    _drop_unwritten()
    return status


def _main(argv: list[str]) -> int:
    from pvclock.commands.screen import write

    parser = _parser(argv[0] if argv else None)
    try:
        arguments, unknown = parser.parse_known_args(argv)
    except SystemExit as end:  # of --help
        return int(end.code or 0)
    except ConfigError as error:
        return _fail(argv[0], error, as_json="--json" in argv[1:] and argv[0] in _names())
    if unknown:
        return _fail(arguments.command, _unknown(arguments, unknown), as_json=getattr(arguments, "json", False))
    if arguments.command:
        return _run(arguments)
    write(f"pvclock {__version__}\n" if arguments.version else parser.format_help())
    return 0


def _unknown(arguments: argparse.Namespace, unknown: list[str]) -> ConfigError:
    program = f"pvclock {arguments.command}" if arguments.command else "pvclock"
    return ConfigError(f"unrecognized arguments: {' '.join(unknown)} (see {program} --help)")


def _parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands; of `command` alone if there is one of that name, for only its module is loaded then.

    The modules of all of them take ten times as long to load as one.
    """
    from pvclock.commands.arguments import Parser, filled

    parser = Parser(
        prog="pvclock",
        description=DESCRIPTION,
        epilog="pvclock COMMAND --help says more about each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    choices = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, module in _commands(command):
        help_text = (module.__doc__ or name).strip()
        choice = choices.add_parser(
            name,
            help=help_text.splitlines()[0],
            description=f"{filled(help_text)}\n\nType first:\n{module.EXAMPLES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        as_lines = _prints_lines(module)
        said = "print JSON lines, one object a line" if as_lines else "print one JSON object"
        choice.add_argument("--json", action="store_true", help=said)
        module.add_arguments(choice)
        choice.set_defaults(run=module.run, json_lines=as_lines)
    return parser


def _prints_lines(module: ModuleType | None) -> bool:
    return getattr(module, "JSON_LINES", False)


def _names() -> set[str]:
    return {point.name for point in _points()}


def _commands(wanted: str | None) -> Iterable[tuple[str, ModuleType]]:
    """The command of that name, if there is one, else all of them: name and module."""
    if wanted is not None and (own := _own_command(wanted)) is not None:
        return [(wanted, own)]
    points = _points()
    return [(point.name, point.load()) for point in [each for each in points if each.name == wanted] or points]


def _own_command(name: str) -> ModuleType | None:
    """A command of this package, found without a look at all that is installed: that takes a quarter of its start."""
    if not name.isidentifier() or find_spec(f"{__name__}.{name}") is None:
        return None
    module = import_module(f"{__name__}.{name}")
    return module if hasattr(module, "add_arguments") else None  # others of these modules are what commands share


def _points() -> list[EntryPoint]:
    """The commands that are installed, by name."""
    from importlib.metadata import entry_points

    return sorted(entry_points(group=GROUP), key=lambda point: point.name)


def _run(arguments: argparse.Namespace) -> int:
    from pvclock.commands.outcome import outcome_json
    from pvclock.commands.screen import Screen, write

    try:
        outcome = arguments.run(arguments, Screen(quiet=arguments.json))
    except BrokenPipeError:
        raise
    except (PvclockError, OSError) as error:
        return _fail(arguments.command, error, as_json=arguments.json)
    if arguments.json:
        write(outcome_json(arguments.command, outcome, on_one_line=arguments.json_lines) + "\n")
    return int(outcome.exit_status)


def _fail(command: str, error: Exception, *, as_json: bool) -> int:
    """Report the error that ended a command."""
    from pvclock.commands.outcome import error_json
    from pvclock.commands.screen import write

    if as_json:
        write(error_json(command, error, on_one_line=_prints_lines(find_command(command))) + "\n")
        return CANNOT
    return _complain(f"pvclock {command}" if command in _names() else "pvclock", error)


def _complain(program: str, error: Exception) -> int:
    """Print one line on standard error if it can be written; the exit status."""
    from pvclock.commands.outcome import message_of

    try:
        print(f"{program}: {message_of(error)}", file=sys.stderr, flush=True)
    except OSError:
        _redirect_to_null(sys.stderr.fileno())
    return CANNOT


def _open_closed_streams() -> None:
    """Open /dev/null where standard input or error is closed, so that no file opened later takes their number."""
    if sys.stdin is None:
        sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115  # as long as the process
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  # as stdin


def _drop_unwritten() -> None:
    """Drop output that could not be written; else Python tries again at exit and prints its own error."""
    try:
        sys.stdout.flush()
    except OSError:
        _redirect_to_null(sys.stdout.fileno())


def _redirect_to_null(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)
