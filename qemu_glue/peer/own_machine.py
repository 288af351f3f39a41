"""A machine of ours in a process of its own, `pvclock run --qmp`, asked by QMP and read in its RAM as a QEMU is."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import IO, Any, Final, Self

from pvclock import GuestMemory
from pvclock.host.process import Process
from qemu_glue.errors import QemuExited, QmpFailed
from qemu_glue.peer.launch import LAUNCHER, find_program
from qemu_glue.peer.qmp_socket import connect
from qemu_glue.peer.vmm import MonitoredProcess, end

__all__ = ["OwnMachine"]

START_LIMIT_S: Final = 90.0
"""As a QEMU has."""
RAM_NAME: Final = "memfd:pvclock-ram"


class OwnMachine:
    """A running `pvclock run --qmp` with the `image` in it, which ends with this process; a Vmm and a context manager.

    QemuMissing without setpriv; QemuExited or QmpFailed if it does not start; nothing is left behind then.
    """

    def __init__(self, image: bytes, *, vcpus: int = 1, memory_bytes: int = 16 << 20, cmdline: str = "") -> None:
        self.vcpus = vcpus
        with ExitStack() as resources:
            place = Path(resources.enter_context(TemporaryDirectory(prefix="pvclock-machine-")))
            self._socket, self._dump = place / "qmp", place / "dump"
            (place / "image").write_bytes(image)
            self.command = [
                *(find_program(*LAUNCHER), "--pdeathsig", "KILL", "--"),
                *(sys.executable, "-m", "pvclock", "run", "--json", str(place / "image"), "--append", cmdline),
                *("--cpus", str(vcpus), "--memory", f"{memory_bytes >> 20}M", "--qmp", str(self._socket)),
            ]
            self._output, self._log = (
                resources.enter_context((place / name).open("w+b")) for name in ("output", "log")
            )
            self._launch(resources)
            self.memory = resources.enter_context(GuestMemory(self._mapped_ram()))
            self._resources = resources.pop_all()

    # The guest

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    @property
    def console(self) -> str:
        """The end of the guest's output on the debug console, once it has ended."""
        return str(self._told("result").get("debug_console", ""))

    def pause(self) -> None:
        """QMP stop."""
        self.execute("stop")

    def resume(self) -> None:
        """QMP cont."""
        self.execute("cont")

    def reset(self) -> None:
        """QMP system_reset."""
        self.execute("system_reset")

    def wait(self, limit_s: float) -> int:
        """The guest's exit code, once it has written one; QemuExited if it ended otherwise, StateError if not yet."""
        status = self._process.wait(limit_s)
        code = self._told("result").get("exit_code")
        if code is None:
            raise self._exited(status)
        return int(code)

    def check_running(self) -> None:
        """QemuExited if it has ended."""
        self._process.check_running()

    # Its monitor

    def execute(self, command: str, **arguments: object) -> Any:  # noqa: ANN401  # JSON
        """Its answer to a QMP command; QmpFailed if there is none, QemuExited if it has ended."""
        return self._process.execute(self._monitor, command, arguments)

    def read_by_monitor(self, gpa: int, length: int) -> bytes:
        """Guest-physical memory as it reads it itself (QMP pmemsave); errors of execute()."""
        self.execute("pmemsave", val=gpa, size=length, filename=str(self._dump))
        return self._dump.read_bytes()

    def tsc_hz(self) -> int:
        """vCPU 0's TSC frequency by the machine's objects; errors of execute()."""
        return self._process.tsc_hz(self._monitor)

    def close(self) -> None:
        """End it and release everything.  May be called twice."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # Beginning and end

    def _launch(self, resources: ExitStack) -> None:
        process = subprocess.Popen(
            self.command, stdin=subprocess.DEVNULL, stdout=self._output, stderr=self._log, process_group=0
        )
        resources.callback(end, process)
        self._process = MonitoredProcess(process, self._exited)
        deadline_s = time.monotonic() + START_LIMIT_S
        while True:
            try:
                self._monitor, _ = connect(str(self._socket))
            except QmpFailed:
                self.check_running()
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.01)
            else:
                break
        resources.callback(self._monitor.close)
        resources.callback(self._process.ask_to_quit, self._monitor)

    def _mapped_ram(self) -> mmap.mmap:
        """The memfd of its RAM, for reading and writing."""
        with Process(self.pid) as process:
            fd = next(fd for fd, name in process.descriptors().items() if RAM_NAME in name)
            with open(f"/proc/{self.pid}/fd/{fd}", "r+b") as file:  # noqa: PTH123  # a Path would resolve the link
                return mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED)

    def _told(self, part: str) -> dict[str, Any]:
        """The result or the error that it has printed at its end; nothing before, or if it was killed."""
        with suppress(ValueError):
            return dict(json.loads(_contents(self._output)).get(part, {}))
        return {}

    def _exited(self, status: int) -> QemuExited:
        why = self._told("error").get("message", self._told("result").get("why", ""))
        return QemuExited(status, self.command, f"{_contents(self._log)}{why}", "pvclock run")


def _contents(file: IO[bytes]) -> str:
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")
