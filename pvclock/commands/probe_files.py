"""What a probe printed, read from a file or standard input up to a bound; errors have their names."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

from pvclock.commands.whole_file import named_error
from pvclock.errors import ConfigError, ProbeNotRun, ProbeRecordError

if TYPE_CHECKING:  # each command is loaded by every start of pvclock
    from pvclock.meter.inside import ProbeRecord

__all__ = ["CONSOLE_BYTES_MAX", "STDIN", "record_in"]

STDIN: Final = "-"
CONSOLE_BYTES_MAX: Final = 16 << 20
"""The line of 64 CPUs has some 100 KB; the rest is for what else a console says."""


def record_in(name: str) -> ProbeRecord:
    """The record in a file or on standard input ("-"); errors tell whose file it is."""
    from pvclock.meter.inside import parse_record
    from pvclock.meter.inside.reading import begins_a_record

    content = _console(name)
    whose = "standard input" if name == STDIN else name
    try:
        return parse_record(content)
    except ProbeRecordError as error:
        if not begins_a_record(content):
            raise ProbeNotRun(_no_record(whose, content)) from None
        field = whose if error.field == "file" else f"{whose}: {error.field}"
        raise ProbeRecordError(field, error.found, error.supported) from None


# Inside


def _no_record(whose: str, content: bytes) -> str:
    lines = len(content.split(b"\n")) - content.endswith(b"\n")
    if not content.strip(b" \t\r\n\0"):
        return f"{whose}: nothing was printed: see what the VMM said"
    if lines == 1:
        return f"{whose}: its one line is not a probe's; did the run end?"
    return f"{whose}: none of its {lines:,} lines is a probe's; did the run end?"


def _console(name: str) -> bytes:
    """What a file or standard input holds; ConfigError if that is more than a console says."""
    from pvclock.state import atomic_file

    try:
        content = _stdin() if name == STDIN else atomic_file.read(name, CONSOLE_BYTES_MAX + 1)
    except OSError as error:
        raise named_error(name, error) from None
    if len(content) > CONSOLE_BYTES_MAX:
        raise ConfigError(f"{name} has more than {CONSOLE_BYTES_MAX >> 20} MiB; give the part with the probe's line")
    return content


def _stdin() -> bytes:
    return sys.stdin.buffer.read(CONSOLE_BYTES_MAX + 1)
