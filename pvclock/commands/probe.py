"""Write the probe, which measures a guest's clock wherever it boots or runs, or judge what it printed.

As an image a VMM boots it, without an operating system; with --linux it is one static executable, which needs no
Python and no rights.  Either prints one line of JSON, and --judge says what that comes to.  Exit status 1 if the clock
is wrong or a budget is broken, 2 if that is undecided.
"""

from __future__ import annotations

import argparse
import shlex
from functools import partial
from typing import TYPE_CHECKING, Final

from pvclock.commands import probe_files, whole_file
from pvclock.commands.guest_next import SECONDS_MAX, SECONDS_MIN, NextCommand, Options, Rerun, budget_words
from pvclock.commands.guest_verdict import add_budgets, budgets_given, budgets_of, outcome_of
from pvclock.commands.outcome import Outcome
from pvclock.commands.probe_files import STDIN
from pvclock.commands.screen import Screen
from pvclock.errors import ConfigError

if TYPE_CHECKING:  # each command is loaded by every start of pvclock
    from pvclock.meter.inside import Budgets, ProbeRecord

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES: Final = """\
  pvclock probe --output probe.img       an image for QEMU and other VMMs
  pvclock probe --linux --output probe   an executable for any x86-64 Linux
  pvclock probe --judge console.log      what either printed, judged"""

OTHER_VMMS: Final = "https://github.com/pvclock/pvclock/blob/main/docs/probe-vmms.md"
CPUS_COMPARED_MIN: Final = 2
IMAGE_MODE, EXECUTABLE_MODE = 0o644, 0o755

QEMU: Final = (
    "qemu-system-x86_64 -accel kvm -cpu host -smp {cpus} -m 64 -nodefaults -display none -no-reboot -serial stdio "
    "-device isa-debug-exit,iobase=0xf4,iosize=1 -kernel {file} -append seconds={seconds}"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--output", metavar="FILE", help="write the probe to FILE, as an image to boot")
    judge = 'judge what it printed, other lines of a console beside it or not ("-": standard input)'
    what.add_argument("--judge", metavar="FILE", help=judge)
    parser.add_argument("--linux", action="store_true", help="with --output: as a static Linux executable")
    add_budgets(parser)


def run(arguments: argparse.Namespace, screen: Screen) -> Outcome:
    """Write the file, or judge one."""
    if arguments.judge is not None:
        return _judged(arguments, screen)
    if given := budgets_given(arguments):
        raise ConfigError(f"{given[0]} goes with --judge: the probe measures, and does not judge")
    return _written(arguments.output, screen, is_linux=arguments.linux)


# Inside


def _written(name: str, screen: Screen, *, is_linux: bool) -> Outcome:
    """Write the probe, and say how to run it."""
    from pvclock.probe import bootable_image, linux_executable

    if name in {"", STDIN}:
        raise ConfigError("--output takes the name of a file")
    program = linux_executable() if is_linux else bootable_image()
    whole_file.write(name, program, EXECUTABLE_MODE if is_linux else IMAGE_MODE)
    what, following = _linux_next(name) if is_linux else _image_next(name)
    screen.show(f"{name}: {what}, {len(program):,} bytes", f"Type next:  {following.command}  ({following.why})")
    form = "linux" if is_linux else "bare"
    return Outcome(True, {"file": name, "form": form, "size_bytes": len(program), "next": [following]})


def _linux_next(name: str) -> tuple[str, NextCommand]:
    path = name if "/" in name else f"./{name}"
    command = f"{shlex.quote(path)} | pvclock probe --judge -"
    return "the probe for Linux", NextCommand(command, "in the guest; or judge the line that it prints elsewhere")


def _image_next(name: str) -> tuple[str, NextCommand]:
    command = f"{QEMU.format(file=shlex.quote(name), cpus=CPUS_COMPARED_MIN, seconds=10)} | pvclock probe --judge -"
    return "the probe as an image", NextCommand(command, f"other VMMs: {OTHER_VMMS}")


def _judged(arguments: argparse.Namespace, screen: Screen) -> Outcome:
    """Judge what a file, or standard input, has of a probe."""
    if arguments.linux:
        raise ConfigError("--linux goes with --output: --judge reads what either form printed")
    file = arguments.judge
    record = probe_files.record_in(file)
    budgets = budgets_of(arguments)
    return outcome_of(record, budgets, screen, _rerun(file, record, budgets), file=file)


def _rerun(file: str, record: ProbeRecord, budgets: Budgets) -> Rerun:
    """Another run of the same form, and all numbers of this one."""
    seconds = min(max(record.milliseconds / 1000, SECONDS_MIN), SECONDS_MAX)  # as a probe may be asked for
    options = Options(seconds, budgets=tuple(budgets))
    on_image = partial(_image_again, max(len(record.cpus), CPUS_COMPARED_MIN))
    command = _linux_again if record.form == "linux" else on_image
    words = ["pvclock", "probe", "--judge", file, *budget_words(options.budgets), "--json"]
    numbers = NextCommand(shlex.join(words), "all numbers, for who runs the host")
    of_a_fault = None if file == STDIN else numbers
    return Rerun(options, command, command(options), of_a_fault, can_wait_for_it=False)


def _linux_again(options: Options) -> str:
    """In a guest that has this package; else the file goes there and its line comes back."""
    return f"pvclock probe --linux --output probe && ./probe --seconds {options.seconds:.15g} | {_judge(options)}"


def _image_again(cpus: int, options: Options) -> str:
    """In QEMU; other VMMs have the image and its command line in ways of their own."""
    boot = QEMU.format(file="probe.img", cpus=cpus, seconds=f"{options.seconds:.15g}")
    return f"pvclock probe --output probe.img && {boot} | {_judge(options)}"


def _judge(options: Options) -> str:
    return shlex.join(["pvclock", "probe", "--judge", STDIN, *budget_words(options.budgets)])
