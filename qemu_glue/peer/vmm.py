"""A VMM in a process of its own, whose RAM this process maps and which it asks by QMP: a QEMU, or `pvclock run`."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from typing import Any, Final, Protocol

from pvclock import GuestMemory

__all__ = ["STEP_LIMIT_S", "Vmm", "end"]

STEP_LIMIT_S: Final = 2.0
"""How long quit and SIGTERM have each to end it."""
KILLED_LIMIT_S: Final = 60.0
"""How long a killed one has, on however busy a host."""


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


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that has not ended by itself."""
    for step, limit_s in ((process.terminate, STEP_LIMIT_S), (process.kill, KILLED_LIMIT_S)):
        if process.poll() is None:
            step()
            with suppress(subprocess.TimeoutExpired):
                process.wait(limit_s)
