"""Command-line parsing: argparse with one-line errors, and the types of values that commands take."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from pvclock.commands.screen import write
from pvclock.commands.whole_file import why_not_writable
from pvclock.errors import ConfigError, RangeError

if TYPE_CHECKING:  # each command is loaded by every start of pvclock
    from pvclock.timekeeping.catchup import Policy

__all__ = [
    "THE_ONLY_PID",
    "Parser",
    "catch_up_policy",
    "duration_s",
    "factor",
    "filled",
    "folder",
    "guest_time_ns",
    "memory_bytes",
    "output_file",
    "process_id",
    "rate_ppb",
    "time_ns",
    "whole_number",
]

DURATION_MAX_S: Final = 86_400
"""A day: a longer duration is a mistake."""

THE_ONLY_PID: Final = 0
"""Stands for the pid of the only VM here, where --pid has no value."""

FACTOR: Final = re.compile(r"[0-9]{1,15}(?:/[0-9]{1,15}|\.[0-9]{1,15})?", re.ASCII)
SIZE: Final = re.compile(r"([0-9]{1,9})([KMG]?)B?", re.ASCII | re.IGNORECASE)
SIZE_SHIFTS: Final = {"K": 10, "": 20, "M": 20, "G": 30}

HELP_COLUMNS: Final = 78
"""argparse's own width in a terminal of 80 columns."""


class Parser(argparse.ArgumentParser):
    """argparse's parser, but a wrong command line is a ConfigError, and help that cannot be printed an OSError."""

    is_intermixed = False
    """May options stand between positional arguments of which some may be left out?  argparse's may not."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # noqa: ANN401  # argparse's signature
        """As argparse has it; of a subcommand, this is what argparse calls."""
        if not self.is_intermixed:
            return super().parse_known_args(args, namespace)
        self.is_intermixed = False  # it calls this function twice
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self.is_intermixed = True

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError(f"{message} (see {self.prog} --help)")

    def print_help(self, file: object = None) -> None:  # argparse's signature
        """Print the help on standard output; argparse would hide a failed write."""
        write(self.format_help())


def filled(text: str) -> str:
    """A docstring as help: each paragraph refilled for a terminal of 80 columns."""
    return "\n\n".join(textwrap.fill(paragraph, HELP_COLUMNS) for paragraph in text.strip().split("\n\n"))


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """An argument that is a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
        return number

    return parse


def duration_s(text: str) -> float:
    """An argument that is a time in seconds: more than 0, and a day at most."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds <= DURATION_MAX_S:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a duration; give seconds, more than 0 and up to {DURATION_MAX_S} (a day)"
        )
    return seconds


def factor(text: str) -> Fraction:
    """An argument that is a positive factor such as 1/10, 0.1 or 2."""
    if not FACTOR.fullmatch(text) or text.endswith("/0") or not (value := Fraction(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a factor; give one above 0 such as 1/10, 0.1 or 2")
    return value


def memory_bytes(text: str) -> int:
    """An argument that is a size of memory such as 512M, in bytes; MiB if there is no unit."""
    found = SIZE.fullmatch(text)
    size = int(found[1]) << SIZE_SHIFTS[found[2].upper()] if found else 0
    if not size:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size of memory; give it in K, M or G, such as 512M")
    return size


def catch_up_policy(text: str) -> Policy:
    """An argument that is a catch-up policy such as freeze, advance or slew:max_ppm=500."""
    from pvclock.timekeeping import catchup

    try:
        return catchup.parse(text)
    except (ConfigError, RangeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def folder(text: str) -> Path:
    """An argument that is a folder; its absolute path."""
    path = Path(text).resolve()
    try:
        is_folder = path.is_dir()
    except OSError:  # a name that is too long
        is_folder = False
    if not is_folder:
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder")
    return path


def time_ns(text: str) -> Fraction:
    """An argument that is a length of time such as 200ns or 1us, in ns."""
    from pvclock.meter.quantity_text import parse_step_ns

    try:
        return parse_step_ns(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def guest_time_ns(text: str) -> int:
    """An argument that is a guest time such as 90s, 1.5h or 30d, in ns since the guest's clock began."""
    from pvclock.meter.quantity_text import parse_guest_time_ns

    try:
        return parse_guest_time_ns(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def rate_ppb(text: str) -> Fraction:
    """An argument that is a relative rate such as 10ppb or 1ppm, in ppb."""
    from pvclock.meter.quantity_text import parse_drift_ppb

    try:
        return parse_drift_ppb(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def process_id(text: str) -> int:
    """An argument that is the number of a process."""
    if not (text.isascii() and text.isdigit()) or not 0 < int(text[:12]) < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a process ID")
    return int(text)


def output_file(text: str) -> Path:
    """An argument that is a file to write later: one that cannot be is refused now."""
    path = Path(text)
    if (why := why_not_writable(path)) is not None:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: {why}")
    return path
