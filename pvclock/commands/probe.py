"""Write the probe, which measures a guest's clock wherever it boots or runs, or judge what it printed.

As an image it boots in any VMM, without an operating system; with --linux it is one static executable, which needs no
Python and no rights.  Either prints one line of JSON, and --judge says what that comes to.  Exit status 1 if the clock
is wrong or a budget is broken, 2 if that is undecided.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Final

from pvclock.commands.guest_verdict import NextCommand, add_budgets, budgets_given, budgets_of, report_of
from pvclock.commands.report import Report
from pvclock.commands.screen import Screen
from pvclock.errors import ConfigError

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES: Final = """\
  pvclock probe --output probe.img       an image that any VMM boots
  pvclock probe --linux --output probe   an executable for any x86-64 Linux
  pvclock probe --judge console.log      what either printed, judged"""

STDIN: Final = "-"
CONSOLE_BYTES_MAX: Final = 16 << 20
"""The line of 64 CPUs has some 100 KB; the rest is for what else a console says."""

IMAGE_MODE, EXECUTABLE_MODE = 0o644, 0o755

QEMU: Final = (
    "qemu-system-x86_64 -accel kvm -cpu host -smp 2 -m 64 -nodefaults -display none -no-reboot -serial stdio "
    "-device isa-debug-exit,iobase=0xf4,iosize=1 -kernel {file} -append seconds=10 | pvclock probe --judge -"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--output", metavar="FILE", help="write the probe to FILE, as an image to boot")
    judge = 'judge what it printed, other lines of a console beside it or not ("-": standard input)'
    what.add_argument("--judge", metavar="FILE", help=judge)
    parser.add_argument("--linux", action="store_true", help="with --output: as a static Linux executable")
    add_budgets(parser)


def run(arguments: argparse.Namespace, screen: Screen) -> Report:
    """Write the file, or judge one."""
    if arguments.judge is not None:
        return _judged(arguments, screen)
    if given := budgets_given(arguments):
        raise ConfigError(f"{given[0]} goes with --judge: the probe measures, and does not judge")
    return _written(arguments.output, screen, is_linux=arguments.linux)


# Inside


def _written(name: str, screen: Screen, *, is_linux: bool) -> Report:
    """Write the probe, and say how to run it."""
    from pvclock.probe import bootable_image, linux_executable
    from pvclock.state import atomic_file

    if name in {"", STDIN}:
        raise ConfigError("--output takes the name of a file")
    program = linux_executable() if is_linux else bootable_image()
    try:
        atomic_file.replace(name, [program], EXECUTABLE_MODE if is_linux else IMAGE_MODE)
    except OSError as error:
        raise _about(name, error) from None
    what, following = _linux_next(name) if is_linux else _image_next(name)
    screen.show(f"{name}: {what}, {len(program):,} bytes", f"Type next:  {following.command}  ({following.why})")
    form = "linux" if is_linux else "bare"
    return Report(True, {"file": name, "form": form, "size_bytes": len(program), "next": [following]})


def _linux_next(name: str) -> tuple[str, NextCommand]:
    path = name if "/" in name else f"./{name}"
    command = f"{shlex.quote(path)} | pvclock probe --judge -"
    return "the probe for Linux", NextCommand(command, "in the guest; or judge the line that it prints elsewhere")


def _image_next(name: str) -> tuple[str, NextCommand]:
    command = QEMU.format(file=shlex.quote(name))
    return "the probe as an image", NextCommand(command, "other VMMs: docs/probe-vmms.md")


def _judged(arguments: argparse.Namespace, screen: Screen) -> Report:
    """Judge what a file, or standard input, has of a probe."""
    from pvclock.meter.inside import parse_record

    if arguments.linux:
        raise ConfigError("--linux goes with --output: --judge reads what either form printed")
    file = arguments.judge
    record = parse_record(_console(file))
    return report_of(record, budgets_of(arguments), screen, _judged_next(file, record.form), file=file)


def _judged_next(file: str, form: str) -> dict[str, list[NextCommand]]:
    """What to type next, by the verdict's status."""
    again = NextCommand(f"pvclock probe --judge {shlex.quote(file)} --json", "all numbers, for who runs the host")
    options = "--seconds 60" if form == "linux" else "seconds=60 on its command line"
    longer = NextCommand(f"the probe again, with {options}", "a longer run knows steps and rates better")
    return {"passed": [], "broken": [again] if file != STDIN else [], "undecided": [longer]}


def _console(name: str) -> bytes:
    """What a file or standard input holds; ConfigError if that is more than a console says."""
    from pvclock.state import atomic_file

    try:
        content = _stdin() if name == STDIN else atomic_file.read(name, CONSOLE_BYTES_MAX + 1)
    except OSError as error:
        raise _about(name, error) from None
    if len(content) > CONSOLE_BYTES_MAX:
        raise ConfigError(f"{name} has more than {CONSOLE_BYTES_MAX >> 20} MiB; give the part with the probe's line")
    return content


def _stdin() -> bytes:
    return sys.stdin.buffer.read(CONSOLE_BYTES_MAX + 1)


def _about(name: str, error: OSError) -> Exception:
    """The error with the file's name, which atomic_file's refusals lack, and else is that of a file beside it."""
    return OSError(error.errno, error.strerror, name) if error.errno else ConfigError(f"{name}: {error}")
