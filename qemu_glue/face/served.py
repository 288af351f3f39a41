"""A machine with a QMP server: its commands, and what happens to it and to its clock as events."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pvclock.machine import Machine, RunState
from pvclock.timekeeping.events import Event
from qemu_glue.face.answers import EVENTS, CommandInfo
from qemu_glue.face.clock_commands import CHANGE, ClockCommands
from qemu_glue.face.dispatch import Command, command_of
from qemu_glue.face.human_monitor import HumanMonitor
from qemu_glue.face.machine_commands import VERSION, MachineCommands, event_of
from qemu_glue.face.machine_tree import MACHINE_TYPES, MachineTree
from qemu_glue.face.memory_commands import MemoryCommands
from qemu_glue.face.object_commands import ObjectCommands
from qemu_glue.face.schema import schema
from qemu_glue.face.server import NEGOTIATION, QmpServer

__all__ = ["serve"]


@contextmanager
def serve(machine: Machine, path: str | Path, on_quit: Callable[[], object]) -> Iterator[QmpServer]:
    """Serve QMP for `machine` at the socket `path`.  on_quit: called for the command `quit`, on the server's thread.

    ConfigError if there can be no socket.
    """
    commands: dict[str, Command] = {}
    with QmpServer(path, commands, VERSION) as server:
        tree = MachineTree(machine)
        commands |= MachineCommands(machine, tree, server.emit, on_quit).table() | ClockCommands(machine).table()
        commands |= ObjectCommands(tree.root, MACHINE_TYPES).table() | HumanMonitor(machine).table()
        commands |= MemoryCommands(machine).table()
        commands |= _introspection(commands)

        def tell_state(before: RunState, now: RunState) -> None:
            if (event := event_of(machine, before, now)) is not None:
                server.emit(*event)

        def tell_change(event: Event) -> None:
            server.emit(CHANGE, _json(event))

        with ExitStack() as told:
            machine.run_state.add_handler(tell_state)
            told.callback(machine.run_state.remove_handler, tell_state)
            if machine.clock is not None:
                told.callback(machine.clock.events.subscribe(tell_change))
            yield server


def _introspection(commands: dict[str, Command]) -> dict[str, Command]:
    """The commands that tell of all commands, themselves among them."""

    def query_commands() -> list[CommandInfo]:
        return [{"name": name} for name in (*commands, NEGOTIATION)]

    def query_qmp_schema() -> list[object]:
        return [*schema({**commands, NEGOTIATION: command_of(negotiation)}, EVENTS)]

    def negotiation(enable: list[object] | None = None) -> None:
        """What the server takes for itself."""

    return {"query-commands": command_of(query_commands), "query-qmp-schema": command_of(query_qmp_schema)}


def _json(event: Event) -> Mapping[str, object]:
    """A clock's event, under QMP's names."""
    return {name.replace("_", "-"): value for name, value in json.loads(event.to_json()).items()}
