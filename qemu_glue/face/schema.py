"""query-qmp-schema: commands and events with their types, from the table that commands are dispatched by.

Types get numbers for names, as QEMU's do, so that nobody relies on a name.  Source: QEMU's qapi/introspect.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import EnumType
from types import NoneType, UnionType
from typing import Any, Final, NotRequired, get_args, get_origin, get_type_hints, is_typeddict

from qemu_glue.face.dispatch import Argument, Command

__all__ = ["schema"]

BUILTIN: Final[dict[Any, tuple[str, str]]] = {
    str: ("str", "string"),
    int: ("int", "int"),
    float: ("number", "number"),
    bool: ("bool", "boolean"),
    NoneType: ("null", "null"),
    object: ("any", "value"),
}
"""Of Python's types: QEMU's name, and JSON's."""
NOTHING: Final = "0"
"""The object without members: of commands that take, or return, nothing."""

Entry = dict[str, object]


def schema(commands: Mapping[str, Command], events: Mapping[str, type | None]) -> list[Entry]:
    """What the commands take and return, what the events carry, and all types that these are of."""
    types = _Types()
    told: list[Entry] = [
        {
            "name": name,
            "meta-type": "command",
            "arg-type": types.of_arguments(command.arguments),
            "ret-type": types.of_answer(command.returns),
        }
        for name, command in commands.items()
    ]
    told += [
        {"name": name, "meta-type": "event", "arg-type": NOTHING if data is None else types.of(data)}
        for name, data in events.items()
    ]
    return told + types.entries


class _Types:
    """The types that have been asked for, each as an entry of the schema."""

    def __init__(self) -> None:
        self.entries: list[Entry] = [{"name": NOTHING, "meta-type": "object", "members": []}]
        self._names: dict[Any, str] = {}

    def of_arguments(self, arguments: tuple[Argument, ...]) -> str:
        """The type of the object that they are the members of."""
        if not arguments:
            return NOTHING
        members = [_member(each.name, self.of(_listed(each.kind)), each.is_required) for each in arguments]
        return self._add({"meta-type": "object", "members": members})

    def of_answer(self, returns: Any) -> str:  # noqa: ANN401  # a type
        """The type of what a command returns; nothing is an object without members."""
        return NOTHING if returns is NoneType or returns is None else self.of(returns)

    def of(self, kind: Any) -> str:  # noqa: ANN401  # a type
        """Its name."""
        if kind not in self._names:
            self._names[kind] = self._made(kind)
        return self._names[kind]

    def _made(self, kind: Any) -> str:  # noqa: ANN401
        if kind in BUILTIN:
            name, json_type = BUILTIN[kind]
            self.entries.append({"name": name, "meta-type": "builtin", "json-type": json_type})
            return name
        if get_origin(kind) is list:
            element = self.of(get_args(kind)[0])
            self.entries.append({"name": f"[{element}]", "meta-type": "array", "element-type": element})
            return f"[{element}]"
        if isinstance(kind, UnionType):
            return self._add(
                {"meta-type": "alternate", "members": [{"type": self.of(each)} for each in get_args(kind)]}
            )
        if isinstance(kind, EnumType):
            values = [str(each.value) for each in kind]  # type: ignore[var-annotated]  # of an enumeration of texts
            return self._add({"meta-type": "enum", "members": [{"name": each} for each in values], "values": values})
        assert is_typeddict(kind), kind  # noqa: S101  # what else a command returns has no type on the wire
        return self._add({"meta-type": "object", "members": self._members(kind)})

    def _members(self, kind: Any) -> list[Entry]:  # noqa: ANN401
        hints = get_type_hints(kind, include_extras=True)
        return [
            _member(
                name,
                self.of(get_args(each)[0] if get_origin(each) is NotRequired else each),
                get_origin(each) is not NotRequired,
            )
            for name, each in hints.items()
        ]

    def _add(self, entry: Entry) -> str:
        name = str(len(self.entries))
        self.entries.append({"name": name, **entry})
        return name


def _member(name: str, type_name: str, is_required: bool) -> Entry:
    member: Entry = {"name": name, "type": type_name}
    return member if is_required else member | {"default": None}


def _listed(kind: Any) -> Any:  # noqa: ANN401
    """A plain list takes any values."""
    return list[object] if kind is list else kind
