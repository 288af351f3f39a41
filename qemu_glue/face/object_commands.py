"""QMP's commands for a tree of objects: which there are, of which types, and their properties."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from qemu_glue.errors import QmpRefusal
from qemu_glue.face.answers import PropertyInfo, TypeInfo
from qemu_glue.face.devices import DEVICE
from qemu_glue.face.dispatch import Command, command_of
from qemu_glue.face.objects import Object, ObjectType, ancestry, properties_of
from qemu_glue.face.properties import Property

__all__ = ["ObjectCommands"]

NOT_FOUND = "DeviceNotFound"


class ObjectCommands:
    """The commands for the objects below what `root` returns, of `types`."""

    def __init__(self, root: Callable[[], Object], types: Iterable[ObjectType]) -> None:
        self._root = root
        self._types = {each.name: each for type_ in types for each in ancestry(type_)}

    def table(self) -> dict[str, Command]:
        """Each command by its name."""
        functions: dict[str, Callable[..., object]] = {
            "qom-list": self._list,
            "qom-get": self._get,
            "qom-set": self._set,
            "qom-list-types": self._list_types,
            "qom-list-properties": self._list_properties,
            "device-list-properties": self._list_device_properties,
        }
        return {name: command_of(function) for name, function in functions.items()}

    # Objects

    def _list(self, path: str) -> list[PropertyInfo]:
        listed = self._root().find(path).list_properties()
        return [{"name": name, "type": kind, "description": text} for name, kind, text in listed]

    def _get(self, path: str, property: str) -> object:  # noqa: A002  # QEMU's word
        return self._found(path).get(property)

    def _set(self, path: str, property: str, value: object) -> None:  # noqa: A002  # QEMU's word
        self._found(path).set(property, value)

    def _found(self, path: str) -> Object:
        """As QEMU has it: by qom-get and qom-set a path that is ambiguous is not found."""
        try:
            return self._root().find(path)
        except QmpRefusal:
            raise QmpRefusal(f"Device '{path}' not found", NOT_FOUND) from None

    # Types

    def _list_types(self, implements: str | None = None, abstract: bool = False) -> list[TypeInfo]:
        return [_shown_type(each) for each in self._types.values() if _is_listed(each, implements, abstract)]

    def _list_properties(self, typename: str) -> list[PropertyInfo]:
        if typename not in self._types:
            raise QmpRefusal(f"Class '{typename}' not found", NOT_FOUND)
        return [_shown(each) for each in properties_of(self._types[typename])]

    def _list_device_properties(self, typename: str) -> list[PropertyInfo]:
        if typename not in self._types:
            raise QmpRefusal(f"Device '{typename}' not found", NOT_FOUND)
        type_ = self._types[typename]
        if type_.is_abstract or DEVICE not in ancestry(type_):
            raise QmpRefusal("Parameter 'typename' expects a non-abstract device type")
        return [_shown(each) for each in _own(type_)]


def _is_listed(type_: ObjectType, implements: str | None, abstract: bool) -> bool:
    """Is it of the type `implements`, and not abstract unless those are wanted, too?"""
    is_one = implements is None or any(each.name == implements for each in ancestry(type_))
    return is_one and (abstract or not type_.is_abstract)


def _shown_type(type_: ObjectType) -> TypeInfo:
    shown: TypeInfo = {"name": type_.name}
    if type_.is_abstract:
        shown["abstract"] = True
    if type_.parent is not None:
        shown["parent"] = type_.parent.name
    return shown


def _own(type_: ObjectType) -> Iterator[Property]:
    """The properties that a device has beside those of every device."""
    common = {each.name for each in properties_of(DEVICE)}
    return (each for each in properties_of(type_) if each.name not in common)


def _shown(each: Property) -> PropertyInfo:
    shown: PropertyInfo = {"name": each.name, "type": each.type.name, "description": each.description}
    if each.default is not None:
        shown["default-value"] = each.default
    return shown
