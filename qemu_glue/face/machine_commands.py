"""QMP's commands for a machine of ours, under QEMU's names, and the events of its run state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import pvclock
from pvclock.machine import Ending, Machine, RunState
from pvclock.machine.devices.power_button import PowerButton
from qemu_glue.errors import QmpRefusal
from qemu_glue.face.answers import CpuInfo, KvmInfo, MigrationCapability, StatusInfo, VersionInfo
from qemu_glue.face.dispatch import Command, command_of
from qemu_glue.face.machine_tree import MachineTree

__all__ = ["VERSION", "Emit", "MachineCommands", "event_of"]

Emit = Callable[[str, Mapping[str, object] | None], object]
"""Tells the client of an event: its name, and its data."""

_MAJOR, _MINOR, _MICRO = (int(part) for part in pvclock.__version__.split("."))
VERSION: Final[VersionInfo] = {
    "qemu": {"major": _MAJOR, "minor": _MINOR, "micro": _MICRO},
    "package": f"pvclock {pvclock.__version__}",
}
"""As query-version has it; under "qemu" stands pvclock's own, for clients that want numbers there."""

RESUMABLE: Final = (RunState.PRELAUNCH, RunState.PAUSED)
RESET_REQUIRED: Final = "Resetting the Virtual Machine is required"
STARTED: Final = (RunState.RUNNING, RunState.PAUSED, RunState.PRELAUNCH)
ENDINGS: Final = {Ending.EXIT_CODE: "guest-shutdown"} | {each: str(each) for each in Ending if each != Ending.EXIT_CODE}
"""The reasons of a SHUTDOWN, as QEMU has them; isa-debug-exit ends a QEMU without one."""


class MachineCommands:
    """The commands of `machine`, whose objects are in `tree`.

    emit: tells of events.  on_quit: ends its VMM, once the answer has been sent.
    """

    def __init__(self, machine: Machine, tree: MachineTree, emit: Emit, on_quit: Callable[[], object]) -> None:
        self._machine, self._tree, self._emit, self._on_quit = machine, tree, emit, on_quit

    def table(self) -> dict[str, Command]:
        """Each command by its name."""
        functions: dict[str, Callable[..., object]] = {
            "query-version": self._query_version,
            "query-status": self._query_status,
            "query-kvm": self._query_kvm,
            "query-cpus-fast": self._query_cpus_fast,
            "query-migrate-capabilities": self._query_migrate_capabilities,
            "stop": self._stop,
            "cont": self._cont,
            "system_reset": self._system_reset,
            "quit": self._quit,
            "system_powerdown": self._system_powerdown,
        }
        return {name: command_of(function) for name, function in functions.items()}

    # What it is, and how it is

    def _query_version(self) -> VersionInfo:
        return VERSION

    def _query_status(self) -> StatusInfo:
        state = self._machine.run_state.current
        return {"status": state, "singlestep": False, "running": state is RunState.RUNNING}

    def _query_kvm(self) -> KvmInfo:
        return {"enabled": True, "present": True}

    def _query_cpus_fast(self) -> list[CpuInfo]:
        threads = self._machine.runner.threads
        return [
            {
                "cpu-index": vcpu.vcpu_id,
                "qom-path": self._tree.cpu_path(place),
                "thread-id": (threads[place].native_id or 0) if place < len(threads) else 0,
                "target": "x86_64",
            }
            for place, vcpu in enumerate(self._machine.vcpus)
        ]

    def _query_migrate_capabilities(self) -> list[MigrationCapability]:
        """A machine of ours does not migrate, so it has none; `pvclock watch` asks."""
        return []

    # What is done to it

    def _stop(self) -> None:
        if self._machine.run_state.current is RunState.RUNNING:
            self._machine.pause()

    def _cont(self) -> None:
        match self._machine.run_state.current:
            case RunState.PRELAUNCH:
                self._machine.start()
            case RunState.PAUSED:
                self._machine.resume()
            case RunState.RUNNING:
                pass
            case _:
                raise QmpRefusal(RESET_REQUIRED)

    def _system_reset(self) -> None:
        self._machine.reset()
        self._emit("RESET", {"guest": False, "reason": "host-qmp-system-reset"})

    def _quit(self) -> None:
        self._emit("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
        self._on_quit()

    def _system_powerdown(self) -> None:
        """Press a PC's power button.  QEMU says yes to guests, too, that have none."""
        claims = self._machine.bus.port_claims
        buttons = [claim.device for claim in claims if isinstance(claim.device, PowerButton)]
        if not buttons:
            raise QmpRefusal("the guest cannot be asked: this machine has no power button; quit ends it")
        if self._machine.run_state.current not in STARTED:
            raise QmpRefusal(RESET_REQUIRED)
        self._emit("POWERDOWN", None)
        buttons[0].press()


def event_of(machine: Machine, before: RunState, now: RunState) -> tuple[str, Mapping[str, object] | None] | None:
    """QEMU's event for a change of the run state; None where it has none."""
    if now is RunState.RUNNING:
        return "RESUME", None
    if now is RunState.PAUSED and before is RunState.RUNNING:
        return "STOP", None
    if now is RunState.GUEST_PANICKED:
        return "GUEST_PANICKED", {"action": "pause"}
    if now is RunState.INTERNAL_ERROR:
        return "STOP", None
    if now is RunState.SHUTDOWN and machine.ending is not None:
        return "SHUTDOWN", {"guest": True, "reason": ENDINGS[machine.ending]}
    return None
