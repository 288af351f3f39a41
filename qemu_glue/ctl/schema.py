"""The commands that a QMP server has, with their arguments where it tells them (query-qmp-schema)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from qemu_glue.errors import QmpFailed
from qemu_glue.peer.monitor import Monitor

__all__ = ["CommandArgument", "QmpCommand", "commands_of"]

Entity = Mapping[str, Any]
CHOICES_MAX: Final = 6
"""Values of an enumeration that are told one by one."""


class CommandArgument(NamedTuple):
    """type: as it is typed: int, string, a|b, {...}, [...]."""

    name: str
    type: str
    is_required: bool

    def __str__(self) -> str:
        """As a line of usage has it."""
        return f"{self.name}={self.type}" if self.is_required else f"[{self.name}={self.type}]"


class QmpCommand(NamedTuple):
    """arguments: None where the server does not tell."""

    name: str
    arguments: tuple[CommandArgument, ...] | None


def commands_of(monitor: Monitor) -> list[QmpCommand]:
    """All of them, by name.  QmpFailed."""
    names = sorted(command["name"] for command in monitor.execute("query-commands"))
    try:
        entities = {entity["name"]: entity for entity in monitor.execute("query-qmp-schema")}
    except QmpFailed:
        if not monitor.is_connected:
            raise
        entities = {}
    return [QmpCommand(name, _arguments(entities, name)) for name in names]


# Inside


def _arguments(entities: Mapping[str, Entity], command: str) -> tuple[CommandArgument, ...] | None:
    if command not in entities:
        return None
    members = entities.get(entities[command].get("arg-type", ""), {}).get("members", ())
    return tuple(
        CommandArgument(each["name"], _type(entities, each["type"]), "default" not in each) for each in members
    )


def _type(entities: Mapping[str, Entity], name: str) -> str:
    """What is typed for a value of that type."""
    entity = entities.get(name, {})
    match entity.get("meta-type"):
        case "builtin":
            return str(entity["json-type"])
        case "enum":
            values = [str(each) for each in entity.get("values", ())]
            return "|".join(values) if 0 < len(values) <= CHOICES_MAX else "string"
        case "array":
            return "[...]"
        case "object":
            return "{...}"
    return "value"
