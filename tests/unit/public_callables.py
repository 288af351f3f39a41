"""Every public callable of the library, found by itself, with what its parameters may be by their annotations."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Any, Literal, NamedTuple, NewType, Union, get_args, get_origin, get_type_hints

__all__ = ["MODULES", "Parameter", "PublicCallable", "fits", "public_callables"]

MODULES = (
    "pvclock",
    "pvclock.timekeeping.catchup",
    "pvclock.timekeeping.events",
    "pvclock.timekeeping.event_timeline",
    "pvclock.timekeeping.timers",
    "pvclock.tsc.vcpu_tsc",
    "pvclock.tsc.emulation",
    "pvclock.tsc.agreement",
    "pvclock.tsc.kvm_sync_model",
    "pvclock.host.execution_time",
    "pvclock.host.watch",
    "pvclock.providers.guest_interface",
    "pvclock.providers.virtualbox.debug_channel",
    "pvclock.state.clock_state",
    "pvclock.clock.event_log",
    "pvclock.clock.ticker",
    "pvclock.compat.palacios",
    "pvclock.meter.stress",
)
"""What a VMM imports: the names in the __all__ of each."""


class Parameter(NamedTuple):
    """One parameter, its annotation, and whether it must be given."""

    name: str
    hint: Any
    required: bool
    is_variadic: bool


class PublicCallable(NamedTuple):
    """A function, or a method, a constructor ("__init__") or a property's setter of class `owner`."""

    name: str
    parameters: tuple[Parameter, ...]
    owner: type | None = None
    member: str = ""
    is_setter: bool = False

    def bound(self, instance: object) -> Callable[..., object]:
        """What is to be called; `instance`: of the owner, for a method or a setter."""
        if self.owner is None:
            module, _, name = self.name.rpartition(".")
            found: Callable[..., object] = getattr(import_module(module), name)
            return found
        if self.member == "__init__":
            return self.owner
        if self.is_setter:
            return lambda value: setattr(instance, self.member, value)
        method: Callable[..., object] = getattr(instance, self.member)
        return method


def public_callables(modules: Iterable[str] = MODULES) -> Iterator[PublicCallable]:
    """Give them all, each once."""
    seen = set()
    for module in map(import_module, modules):
        for name in module.__all__:
            value = getattr(module, name)
            if id(value) in seen:
                continue
            seen.add(id(value))
            if inspect.isclass(value):
                yield from _of_class(value)
            elif callable(value) and not isinstance(value, NewType) and get_origin(value) is None:
                yield PublicCallable(f"{module.__name__}.{name}", _parameters(_declared(value)))


def _of_class(owner: type) -> Iterator[PublicCallable]:
    declared = _declared(owner)
    if getattr(owner, "_is_protocol", False) or issubclass(owner, BaseException | enum.Enum):
        return  # what others write, what is raised, and words
    if not issubclass(owner, tuple):  # a NamedTuple is checked where it is given
        maker = vars(declared).get("__init__") or vars(declared).get("__new__")
        if maker is not None:
            maker = getattr(maker, "__func__", maker)  # __new__ is a static method
            yield PublicCallable(owner.__name__, _parameters(maker)[1:], owner, "__init__")
    for name, member in _members(declared):
        function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if isinstance(member, property):
            function = member.fset
        if inspect.isfunction(function):
            parameters = _parameters(function)[not isinstance(member, staticmethod) :]
            is_setter = isinstance(member, property)
            if is_setter:  # its parameter goes by the property's name
                parameters = tuple(each._replace(name=name) for each in parameters)
            if parameters:
                yield PublicCallable(f"{owner.__name__}.{name}", parameters, owner, name, is_setter)


def _members(declared: type) -> Iterator[tuple[str, Any]]:
    """Its own public members, and those of its module's classes that it is made of."""
    seen = set()
    for kind in declared.__mro__:
        if kind.__module__ != declared.__module__:
            continue
        for name, member in vars(kind).items():
            if not name.startswith("_") and name not in seen:
                seen.add(name)
                yield name, member


def _parameters(function: Callable[..., object]) -> tuple[Parameter, ...]:
    hints = get_type_hints(function, _namespace(inspect.getmodule(function)))
    return tuple(
        Parameter(
            each.name,
            hints.get(each.name, object),
            each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD),
            each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD),
        )
        for each in inspect.signature(function).parameters.values()
    )


def _namespace(module: ModuleType | None) -> dict[str, Any]:
    """A module's names, and what its annotations alone name."""
    return {**vars(import_module("collections.abc")), **(vars(module) if module else {})}


# Stubs, which say what compiled callables take


def _declared(value: Any) -> Any:  # noqa: ANN401  # a class or a function
    """The class or function as Python code has it: that of the stub where it is compiled."""
    stub = Path(str(import_module(value.__module__).__file__).partition(".")[0] + ".pyi")
    return _stub(stub)[value.__name__] if stub.exists() else value


@cache
def _stub(file: Path) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": f"stub of {file.name}"}
    source = "from __future__ import annotations\n" + file.read_text(encoding="utf-8")
    exec(compile(source, file, "exec"), names)  # noqa: S102  # our own stub
    for value in [each for each in names.values() if inspect.isclass(each) and each.__module__ == names["__name__"]]:
        for member in vars(value).values():
            _give_names(member, names)
    for value in list(names.values()):
        _give_names(value, names)
    return names


def _give_names(member: object, names: dict[str, Any]) -> None:
    function = member.fset if isinstance(member, property) else getattr(member, "__func__", member)
    if inspect.isfunction(function) and function.__globals__ is names:
        hints = get_type_hints(function, names)
        function.__annotations__ = hints


# Which values an annotation allows


def fits(hint: Any, value: object) -> bool:  # noqa: ANN401, PLR0911  # an annotation; one answer for each kind
    """Does a type checker take the value for a parameter with that annotation?"""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in (Any, object):
        return True
    if origin in (Union, UnionType):
        return any(fits(each, value) for each in arguments)
    if origin is Literal:
        return isinstance(value, str) and all(isinstance(each, str) for each in arguments)  # a word, if a wrong one
    if isinstance(hint, NewType):
        return fits(hint.__supertype__, value)
    if origin in (Callable, type(Callable)):
        return callable(value)
    if hint is None:
        return value is None
    if hint is float:
        return isinstance(value, int | float)
    kind = origin or hint
    if getattr(kind, "_is_protocol", False) or not isinstance(kind, type):
        return False
    if kind in (NoneType, str, bytes, int, bool) or not issubclass(kind, Iterable) or issubclass(kind, Mapping):
        return isinstance(value, kind)
    return False  # a sequence: none of the values that are tried is one, text and bytes not either
