"""The errors of a QEMU.

PvclockError
└── QemuError
    ├── QemuMissing     .program .package; says how to get it
    ├── QemuExited      .exit_code .command .output; it ended unexpectedly
    ├── NotKvm          a QEMU that runs its guest without KVM, so without kvmclock
    ├── QmpFailed       .operation .why .error_class; its monitor refused, did not answer or sent no QMP
    └── VirshFailed     .operation .why; virsh could not do it

QmpRefusal, a PvclockError, too, is none of QEMU's: .error_class .desc, as our own QMP server answers a client.
"""

from __future__ import annotations

import shlex
import signal

from pvclock import PvclockError

__all__ = ["NotKvm", "QemuError", "QemuExited", "QemuMissing", "QmpFailed", "QmpRefusal", "VirshFailed"]


class QemuError(PvclockError):
    """Base of all QEMU errors."""


class QemuMissing(QemuError):
    """`program` is not on the PATH; Debian's `package` has it."""

    def __init__(self, program: str, package: str) -> None:
        super().__init__(f"{program} is not on the PATH; to get it: apt-get install {package} (Debian, Ubuntu)")
        self.program = program
        self.package = package


class QemuExited(QemuError):
    """QEMU, or what stands in its place by name, ended by itself, or was killed.

    exit_code: as subprocess gives it: the negative signal number if a signal ended it.  command: its command line.
    output: the end of its stdout and stderr.
    """

    def __init__(self, exit_code: int, command: list[str], output: str, name: str = "QEMU") -> None:
        how = f"exit code {exit_code}" if exit_code >= 0 else signal.Signals(-exit_code).name
        super().__init__(f"{name} ended with {how}\noutput: {output.strip() or 'none'}\ncommand: {shlex.join(command)}")
        self.exit_code = exit_code
        self.command = command
        self.output = output


class NotKvm(QemuError):
    """A QEMU whose guest does not run on KVM."""

    def __init__(self) -> None:
        super().__init__("this QEMU runs without KVM: its guests have no kvmclock; start it with -accel kvm")


class QmpFailed(QemuError):
    """QMP `operation` (a command, or "connect") was refused, not answered in time, or not answered in QMP.

    error_class: QEMU's, such as "CommandNotFound", of what was refused; else None.
    """

    def __init__(self, operation: str, why: str, error_class: str | None = None) -> None:
        super().__init__(f"QMP {operation}: {why}")
        self.operation = operation
        self.why = why
        self.error_class = error_class


class VirshFailed(QemuError):
    """virsh could not do `operation`: there is no such domain, it does not run, no connection, or QEMU refused."""

    def __init__(self, operation: str, why: str) -> None:
        super().__init__(f"virsh {operation}: {why}")
        self.operation = operation
        self.why = why


class QmpRefusal(PvclockError):
    """What a QMP server answers to what it cannot do.  error_class: QEMU's, such as "CommandNotFound"."""

    def __init__(self, desc: str, error_class: str = "GenericError") -> None:
        super().__init__(desc)
        self.desc = desc
        self.error_class = error_class
