"""A property of an object: its type, who reads and who writes it, and what a value must be, by QEMU's rules and words.

Source: qom/object.c, qom/object_interfaces.c, hw/core/qdev-properties.c, qapi/qobject-input-visitor.c.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from qemu_glue.errors import QmpRefusal

__all__ = [
    "BOOL",
    "INT",
    "STRING",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "Property",
    "PropertyType",
    "checked",
    "enumeration",
    "structure",
]


class PropertyType(NamedTuple):
    """The type of a property's values.

    name: as qom-list has it.  kind: of values as JSON has them.  noun: in errors.  low, high: of whole numbers.
    values: those of an enumeration.
    """

    name: str
    kind: type
    noun: str
    low: int = 0
    high: int = 0
    values: tuple[str, ...] = ()


BOOL: Final = PropertyType("bool", bool, "boolean")
STRING: Final = PropertyType("string", str, "string")
INT: Final = PropertyType("int", int, "integer", -1 << 63, (1 << 63) - 1)
UINT8: Final = PropertyType("uint8", int, "uint8_t", 0, (1 << 8) - 1)
UINT16: Final = PropertyType("uint16", int, "uint16_t", 0, (1 << 16) - 1)
UINT32: Final = PropertyType("uint32", int, "uint32_t", 0, (1 << 32) - 1)
UINT64: Final = PropertyType("uint64", int, "uint64", 0, (1 << 64) - 1)


def enumeration(name: str, *values: str) -> PropertyType:
    """One of `values`."""
    return PropertyType(name, str, "string", values=values)


def structure(name: str) -> PropertyType:
    """An object of JSON's, for properties that are only read."""
    return PropertyType(name, dict, "object")


class Property(NamedTuple):
    """A property of objects of one type.

    get, set: called with what the object shows, and set with the checked value; None where it cannot be read or set.
    is_configuration: of a device: writable until that is realized, and told of by device-list-properties.
    default: what it is unless it is written; None where there is none to tell.
    """

    name: str
    type: PropertyType
    description: str
    get: Callable[[Any], object] | None
    set: Callable[[Any, Any], object] | None = None
    is_configuration: bool = False
    default: object = None


def checked(name: str, type_: PropertyType, value: object) -> object:
    """`value`, if property `name` can have it; a QmpRefusal in QEMU's words if not."""
    if type_.kind is int:
        return _checked_whole(name, type_, value)
    if not isinstance(value, type_.kind):
        raise QmpRefusal(f"Invalid parameter type for '{name}', expected: {type_.noun}")
    if type_.values and value not in type_.values:
        raise QmpRefusal(f"Parameter '{name}' does not accept value '{value}'")
    return value


def _checked_whole(name: str, type_: PropertyType, value: object) -> int:
    """Of an unsigned one QEMU's parser says first that it is no u64, and then that it is not of the type."""
    if type_ is INT:
        if isinstance(value, bool) or not isinstance(value, int) or not INT.low <= value <= INT.high:
            raise QmpRefusal(f"Invalid parameter type for '{name}', expected: {INT.noun}")
        return value
    if isinstance(value, bool) or not isinstance(value, int) or not -UINT64.high // 2 <= value <= UINT64.high:
        raise QmpRefusal(f"Parameter '{name}' expects {UINT64.noun}")
    if not type_.low <= value <= type_.high:
        raise QmpRefusal(f"Parameter '{name}' expects {type_.noun}")
    return value
