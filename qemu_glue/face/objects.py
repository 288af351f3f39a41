"""Objects with typed properties in a composition tree, as QEMU's object model (QOM) has them: types, paths, access.

An object has the properties of its type and of that one's parents, and as further properties its children, by which
paths go: /machine/unattached/device[0].  Errors are QmpRefusals in QEMU's words.  Source: qom/object.c, qom-qmp-cmds.c.

Thread-safety: a tree is changed and read on one thread at a time; a QMP server runs all its commands on one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Final, NamedTuple, Self

from qemu_glue.errors import QmpRefusal
from qemu_glue.face.properties import STRING, Property, checked

__all__ = ["CONTAINER", "OBJECT", "Object", "ObjectType", "ancestry", "properties_of"]

ANY_INDEX: Final = "[*]"
"""At the end of a child's name: the first index that is free."""


TYPE: Final = Property("type", STRING, "The name of its type.", None)
"""What every object has, and answers itself."""


class ObjectType(NamedTuple):
    """A type of objects.  parent: None for "object" alone.  properties: those that its parents do not have."""

    name: str
    parent: ObjectType | None
    description: str
    properties: tuple[Property, ...] = ()
    is_abstract: bool = False


def ancestry(type_: ObjectType) -> Iterator[ObjectType]:
    """The type, its parent, and so on."""
    current: ObjectType | None = type_
    while current is not None:
        yield current
        current = current.parent


def properties_of(type_: ObjectType) -> list[Property]:
    """All properties that objects of the type have, its parents' first; the nearest of one name."""
    found: dict[str, Property] = {}
    for each in reversed(list(ancestry(type_))):
        found |= {own.name: own for own in each.properties}
    return list(found.values())


class Object:
    """An object of `type`, which shows `subject`: what the properties' functions look at and change.

    may_set: called with a property that is to be changed, before its value is looked at; it raises if that may not be.
    """

    def __init__(
        self,
        type: ObjectType,  # noqa: A002  # QEMU's word
        subject: object = None,
        may_set: Callable[[Property], object] | None = None,
    ) -> None:
        self.type, self.subject = type, subject
        self._may_set = may_set
        self.parent: Object | None = None
        self.name = ""
        self._children: dict[str, Object] = {}
        self._properties = {each.name: each for each in properties_of(type)}

    # The tree

    @property
    def children(self) -> dict[str, Object]:
        """By their names, in the order in which they came."""
        return dict(self._children)

    @property
    def path(self) -> str:
        """From the root on."""
        if self.parent is None:
            return "/"
        return f"{self.parent.path.rstrip('/')}/{self.name}"

    def add(self, name: str, child: Object) -> Object:
        """Let `child` be one of this object's, and return it.  name: with "[*]" at its end it gets an index."""
        if child.parent is not None:
            raise QmpRefusal(f"child object is already parented at {child.path}")
        if name.endswith(ANY_INDEX):
            stem = name.removesuffix(ANY_INDEX)
            name = next(each for index in count() if (each := f"{stem}[{index}]") not in self._children)
        if name in self._children or name in self._properties:
            raise QmpRefusal(f"attempt to add duplicate property '{name}' to object (type '{self.type.name}')")
        self._children[name] = child
        child.parent, child.name = self, name
        return child

    def remove(self) -> None:
        """Take this object, and with it what is below, out of its tree."""
        if self.parent is not None:
            del self.parent._children[self.name]  # noqa: SLF001  # of its own class
            self.parent, self.name = None, ""

    def walk(self) -> Iterator[Self | Object]:
        """This object and all below it."""
        yield self
        for child in self._children.values():
            yield from child.walk()

    def find(self, path: str) -> Object:
        """What `path` leads to: from here if it begins with "/", else from any object in the tree, if from one only.

        QmpRefusal, of class DeviceNotFound if there is none.
        """
        names = [name for name in path.split("/") if name]
        starts = [self] if path.startswith("/") else self.walk()
        found = [each for start in starts if (each := start._below(names)) is not None]  # noqa: SLF001  # its class's
        if not found:
            raise QmpRefusal(f"Device '{path}' not found", "DeviceNotFound")
        if len(found) > 1:
            raise QmpRefusal(f"Path '{path}' is ambiguous")
        return found[0]

    def _below(self, names: list[str]) -> Object | None:
        found: Object | None = self
        for name in names:
            found = None if found is None else found._children.get(name)  # noqa: SLF001  # of its own class
        return found

    # Properties

    def list_properties(self) -> list[tuple[str, str, str]]:
        """Name, type and description of each property; a child is one of type "child<type>"."""
        own = [(each.name, each.type.name, each.description) for each in self._properties.values()]
        return own + [(name, f"child<{it.type.name}>", it.type.description) for name, it in self._children.items()]

    def get(self, name: str) -> object:
        """A property's value; a child's is its path."""
        if name in self._children:
            return self._children[name].path
        if name == TYPE.name:
            return self.type.name
        found = self._property(name)
        if found.get is None:
            raise QmpRefusal(f"Property '{self.type.name}.{name}' is not readable")
        return found.get(self.subject)

    def set(self, name: str, value: object) -> None:
        """Change a property."""
        found = None if name in self._children else self._property(name)
        if found is None or found.set is None:
            raise QmpRefusal(f"Property '{self.type.name}.{name}' is not writable")
        if self._may_set is not None:
            self._may_set(found)
        found.set(self.subject, checked(name, found.type, value))

    def _property(self, name: str) -> Property:
        if name not in self._properties:
            raise QmpRefusal(f"Property '{self.type.name}.{name}' not found")
        return self._properties[name]


OBJECT: Final = ObjectType("object", None, "What every object is.", (TYPE,), is_abstract=True)
CONTAINER: Final = ObjectType("container", OBJECT, "Holds objects.")
