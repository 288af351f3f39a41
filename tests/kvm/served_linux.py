"""`pvclock run --qmp` with a stock Linux, in a process of its own: typed into by its standard input, asked by QMP."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from pvclock.lab.kernel import Kernel
from pvclock.timekeeping.events import Event
from tests.command_line import ROOT, command
from tests.kvm.guest_shell import BOOT_LIMIT_S, GuestShell
from tests.kvm.stock_linux import CMDLINE, root_file_system

__all__ = ["QmpTalk", "Refused", "ServedLinux", "served_linux"]

READ_BYTES: Final = 1 << 16
CHANGE: Final = "X_PVCLOCK_CHANGE"


class Refused(AssertionError):
    """A command was answered by an error, with its description."""


class QmpTalk:
    """A client's session with the server at `path`.

    changes: what X_PVCLOCK_CHANGE told, as the clock's events.  events: the names of all other events.
    """

    def __init__(self, path: Path) -> None:
        self.changes: list[Event] = []
        self.events: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(BOOT_LIMIT_S)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("rb")
        assert "QMP" in json.loads(self._lines.readline())
        self.ask("qmp_capabilities")

    def ask(self, name: str, **arguments: object) -> Any:  # noqa: ANN401  # JSON
        """The answer to a command; what is told before it is kept.  Refused with an error's description."""
        self._socket.sendall(
            json.dumps(
                {
                    "execute": name,
                    "arguments": {each.replace("_", "-"): value for each, value in arguments.items()},
                }
            ).encode()
        )
        while True:
            message = self._read()
            if "error" in message:
                raise Refused(message["error"]["desc"])
            if "return" in message:
                return message["return"]

    def close(self) -> None:
        """Leave."""
        self._lines.close()
        self._socket.close()

    def _read(self) -> dict[str, Any]:
        """The next message."""
        message: dict[str, Any] = json.loads(self._lines.readline())
        if message.get("event") == CHANGE:
            data = {name.replace("-", "_"): value for name, value in message["data"].items()}
            self.changes.append(Event.from_json(json.dumps(data)))
        elif "event" in message:
            self.events.append(message["event"])
        return message


class ServedLinux(NamedTuple):
    """The running command: its guest's shell, and a client of its server.  log: where --events writes at the end."""

    process: subprocess.Popen[bytes]
    shell: GuestShell
    qmp: QmpTalk
    log: Path


@contextmanager
def served_linux(kernel: Kernel, folder: Path) -> Iterator[ServedLinux]:
    """Boot it, its files in `folder`, and have its shell and a client."""
    initrd, path, log = folder / "initrd", folder / "qmp.sock", folder / "events"
    initrd.write_bytes(root_file_system())
    boot = ("--kernel", str(kernel.image), "--initrd", str(initrd), "--append", " ".join(CMDLINE))
    run = command("run", *boot, "--qmp", str(path), "--events", str(log))
    with subprocess.Popen(run, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        keys = process.stdin.fileno()
        shell = GuestShell(lambda data: os.write(keys, data))
        reader = threading.Thread(target=_read_all, args=(process.stdout.fileno(), shell))
        reader.start()
        try:
            shell.wait_for_prompt()
            qmp = QmpTalk(path)
            try:
                yield ServedLinux(process, shell, qmp, log)
            finally:
                qmp.close()
        finally:
            process.kill()
            reader.join()


def _read_all(output: int, shell: GuestShell) -> None:
    while data := os.read(output, READ_BYTES):
        shell.take(data)
    shell.end()
