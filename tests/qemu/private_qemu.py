"""A QEMU/KVM with clockprobe whose RAM is private anonymous memory, QEMU's default, and which is asked by QMP."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from pvclock.payloads import clockprobe
from qemu_glue.peer.launch import CPU_MODEL, LAUNCHER, PROGRAM
from qemu_glue.peer.monitor import Monitor

__all__ = ["RAM_BYTES", "PrivateQemu", "private_qemu"]

RAM_BYTES: Final = 32 << 20


class PrivateQemu:
    """That QEMU, by its process and its monitor."""

    def __init__(self, process: subprocess.Popen[bytes], monitor: Monitor, dump: int) -> None:
        self.process = process
        self._monitor = monitor
        self._dump = dump

    @property
    def pid(self) -> int:
        """Its process's id."""
        return self.process.pid

    def execute(self, command: str, **arguments: object) -> object:
        """Return its answer to a QMP command."""
        return self._monitor.execute(command, arguments)

    def read(self, gpa: int, length: int) -> bytes:
        """Return guest memory as QEMU itself reads it."""
        self.execute("pmemsave", val=gpa, size=length, filename=f"/proc/self/fd/{self._dump}")
        return os.pread(self._dump, length, 0)


@contextmanager
def private_qemu(*more: str, accel: str = "kvm", smp: str = "2") -> Iterator[PrivateQemu]:
    """Have one, with `more` arguments; it is killed at the end."""
    with ExitStack() as resources:
        image, dump = (os.memfd_create(name) for name in ("image", "dump"))
        for fd in (image, dump):
            resources.callback(os.close, fd)
        os.write(image, clockprobe())
        ours, theirs = (resources.enter_context(end) for end in socket.socketpair())
        command = [
            *(LAUNCHER[0], "--pdeathsig", "KILL", "--", PROGRAM),
            *("-nodefaults", "-no-user-config", "-display", "none", "-machine", "microvm", "-accel", accel),
            *("-m", f"{RAM_BYTES >> 20}M", "-smp", smp, "-cpu", CPU_MODEL if accel == "kvm" else "max"),
            *("-kernel", f"/proc/self/fd/{image}", "-append", "cpus=2"),
            *("-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "chardev=qmp,mode=control"),
            *more,
        ]
        process = resources.enter_context(subprocess.Popen(command, pass_fds=[image, dump, theirs.fileno()]))
        resources.callback(process.kill)
        theirs.close()
        yield PrivateQemu(process, resources.enter_context(Monitor(ours)), dump)
