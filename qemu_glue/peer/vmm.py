"""A VMM in a process of its own, whose RAM this process maps and which it asks by QMP: a QEMU, or `pvclock run`."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Protocol

from pvclock import GuestMemory, StateError
from qemu_glue.errors import QemuExited, QmpFailed
from qemu_glue.peer.monitor import Monitor

__all__ = ["MonitoredProcess", "Vmm", "end"]

STEP_LIMIT_S: Final = 2.0
"""How long quit and SIGTERM have each to end it."""
KILLED_LIMIT_S: Final = 60.0
"""How long a killed one has, on however busy a host."""
PF_EXITING: Final = 0x4
"""Of the flags in /proc/PID/stat (include/linux/sched.h)."""


class Vmm(Protocol):
    """What qemu_glue.peer.launch.Qemu and qemu_glue.peer.own_machine.OwnMachine have in common.

    All but close() raise why the VMM has ended, if it has.
    """

    vcpus: int
    memory: GuestMemory

    @property
    def pid(self) -> int:
        """Its process."""

    @property
    def console(self) -> str:
        """The guest's output on the debug console, as far as it is known."""

    def execute(self, command: str, **arguments: object) -> Any:  # noqa: ANN401  # JSON
        """Its answer to a QMP command; QmpFailed if there is none."""

    def pause(self) -> None:
        """QMP stop."""

    def resume(self) -> None:
        """QMP cont."""

    def reset(self) -> None:
        """QMP system_reset, of a guest that boots again then."""

    def wait(self, limit_s: float) -> int:
        """The guest's exit code, once it has written one; the VMM has ended then.  StateError after `limit_s`."""

    def check_running(self) -> None:
        """Raise why it has ended, if it has."""

    def read_by_monitor(self, gpa: int, length: int) -> bytes:
        """Guest-physical memory as the VMM itself reads it (QMP pmemsave)."""

    def tsc_hz(self) -> int:
        """vCPU 0's TSC frequency by the VMM."""

    def close(self) -> None:
        """End it and release everything.  May be called twice."""


class MonitoredProcess:
    """The process of a VMM, asked by a Monitor.

    exited: the error that says why it ended, of its exit status.
    """

    def __init__(self, process: subprocess.Popen[bytes], exited: Callable[[int], QemuExited]) -> None:
        self.pid = process.pid
        self._process, self._exited = process, exited

    @property
    def returncode(self) -> int | None:
        """Its exit status; None while it runs."""
        return self._process.poll()

    def wait(self, limit_s: float) -> int:
        """Its exit status, once its guest has ended it; StateError if it is still running after `limit_s`."""
        try:
            return self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise StateError("wait", f"the guest has not ended after {limit_s:g} s", "wait longer or close()") from None

    def check_running(self) -> None:
        """QemuExited if it has ended."""
        status = self.returncode
        if status is not None:
            raise self._exited(status)

    def raise_if_ending(self) -> None:
        """QemuExited if it ends: one that closes QMP is about to, and its own output explains more.

        The kernel closes its files before it gives back its RAM, which may take long.
        """
        with suppress(subprocess.TimeoutExpired):
            raise self._exited(self._process.wait(STEP_LIMIT_S)) from None
        with suppress(subprocess.TimeoutExpired):
            raise self._exited(self._process.wait(KILLED_LIMIT_S if _is_exiting(self.pid) else 0)) from None

    def execute(self, monitor: Monitor, command: str, arguments: Mapping[str, object]) -> Any:  # noqa: ANN401  # JSON
        """Its answer to a QMP command; QmpFailed if there is none, QemuExited if it has ended."""
        try:
            return monitor.execute(command, arguments)
        except QmpFailed:
            if not monitor.is_connected:
                self.raise_if_ending()
            raise

    def tsc_hz(self, monitor: Monitor) -> int:
        """vCPU 0's TSC frequency by its objects; errors of execute()."""
        cpu = self.execute(monitor, "query-cpus-fast", {})[0]["qom-path"]
        return int(self.execute(monitor, "qom-get", {"path": cpu, "property": "tsc-frequency"}))

    def ask_to_quit(self, monitor: Monitor) -> None:
        """QMP quit, and a moment for it, if it has not ended by itself."""
        if self.returncode is None:
            with suppress(QmpFailed, subprocess.TimeoutExpired):
                monitor.execute("quit", limit_s=STEP_LIMIT_S)
                self._process.wait(STEP_LIMIT_S)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that has not ended by itself."""
    for step, limit_s in ((process.terminate, STEP_LIMIT_S), (process.kill, KILLED_LIMIT_S)):
        if process.poll() is None:
            step()
            with suppress(subprocess.TimeoutExpired):
                process.wait(limit_s)


def _is_exiting(pid: int) -> bool:
    """Is the kernel taking this child apart, or has another thread waited for it by now?"""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    _, _, fields = stat.rpartition(")")  # its name may have any characters
    return bool(int(fields.split()[6]) & PF_EXITING)
