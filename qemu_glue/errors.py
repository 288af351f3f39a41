"""What goes wrong with a QEMU.

PvclockError
└── QemuError
    ├── QemuMissing     .program .package; says how to get it
    ├── QemuExited      .exit_code .command .output; it ended when it should not have
    └── QmpFailed       .operation; its monitor refused, kept silent or talked nonsense
"""

from __future__ import annotations

import shlex
import signal

from pvclock import PvclockError

__all__ = ["QemuError", "QemuExited", "QemuMissing", "QmpFailed"]


class QemuError(PvclockError):
    """Base of all errors of a QEMU."""


class QemuMissing(QemuError):
    """`program` is not on the PATH; Debian's `package` has it."""

    def __init__(self, program: str, package: str) -> None:
        super().__init__(f"{program} is not on the PATH; to get it: apt-get install {package} (Debian, Ubuntu)")
        self.program = program
        self.package = package


class QemuExited(QemuError):
    """QEMU ended by itself, or was killed.

    exit_code: as subprocess has it, minus the signal's number if one ended it.  command: what was run.  output: what
    it wrote to stdout and stderr, its end.
    """

    def __init__(self, exit_code: int, command: list[str], output: str) -> None:
        how = f"exit code {exit_code}" if exit_code >= 0 else signal.Signals(-exit_code).name
        super().__init__(f"QEMU ended with {how}\noutput: {output.strip() or 'none'}\ncommand: {shlex.join(command)}")
        self.exit_code = exit_code
        self.command = command
        self.output = output


class QmpFailed(QemuError):
    """QMP `operation` (a command, or "connect") was refused, not answered in time, or answered with nonsense."""

    def __init__(self, operation: str, why: str) -> None:
        super().__init__(f"QMP {operation}: {why}")
        self.operation = operation
