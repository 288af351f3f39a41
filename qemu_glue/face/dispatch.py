"""QMP commands as Python functions, and a request's way to one: with QEMU's checks, in its order, and its errors.

A function's signature says what a command takes: `def pmemsave(val: int, size: int, filename: str)`.  A parameter with
a default is optional, and its `_` is a `-` on the wire.  Source: qapi/qmp-dispatch.c, qobject-input-visitor.c.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import UnionType
from typing import Any, Final, NamedTuple, get_args, get_origin, get_type_hints

from pvclock import PvclockError
from qemu_glue.errors import QmpRefusal

__all__ = ["Argument", "Command", "Commands", "command_of", "dispatch", "refusal"]

NAMES: Final = {int: "integer", str: "string", bool: "boolean", float: "number", list: "array"}
"""QEMU's names in errors."""
INTEGERS: Final = range(-(2**63), 2**63)
"""QAPI's type int; a larger number is a float for QEMU."""
MEMBERS: Final = ("execute", "arguments", "id")


class Argument(NamedTuple):
    """What a command takes: int, str, bool, float, list or, for any value, object."""

    name: str
    kind: type
    is_required: bool


class Command(NamedTuple):
    """What is done for a command, with its checked arguments as keywords.  returns: of what type its answer is."""

    run: Callable[..., object]
    arguments: tuple[Argument, ...]
    returns: Any = object


Commands = Mapping[str, Command]


def command_of(run: Callable[..., object]) -> Command:
    """The command that a function is, by its signature."""
    hints = get_type_hints(run)
    parameters = inspect.signature(run).parameters.values()
    arguments = tuple(_argument(parameter, hints[parameter.name]) for parameter in parameters)
    return Command(run, arguments, hints.get("return", object))


def dispatch(commands: Commands, request: object) -> dict[str, object]:
    """The answer to a request.  request: what came, a QmpRefusal if that was no JSON."""
    answer: dict[str, object]
    try:
        answer = {"return": _run(commands, request)}
    except PvclockError as error:
        answer = refusal(error)
    except Exception as error:  # noqa: BLE001  # a fault of ours must not end the client's session
        answer = refusal(QmpRefusal(f"an internal error of pvclock, please report it: {error!r}"))
    return answer | ({"id": request["id"]} if isinstance(request, dict) and "id" in request else {})


def refusal(error: PvclockError) -> dict[str, object]:
    """An error as it is told to a client."""
    error_class = error.error_class if isinstance(error, QmpRefusal) else "GenericError"
    return {"error": {"class": error_class, "desc": str(error)}}


# Inside


def _argument(parameter: inspect.Parameter, hint: Any) -> Argument:  # noqa: ANN401  # a type, or a union with None
    kind = get_args(hint)[0] if isinstance(hint, UnionType) else hint
    return Argument(
        parameter.name.replace("_", "-"), get_origin(kind) or kind, parameter.default is inspect.Parameter.empty
    )


def _run(commands: Commands, request: object) -> object:
    name, given = _checked(request)
    if name not in commands:
        raise QmpRefusal(f"The command {name} has not been found", "CommandNotFound")
    command = commands[name]
    found = command.run(**_taken(command, given))
    return {} if found is None else found


def _checked(request: object) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of a request that is one."""
    if isinstance(request, QmpRefusal):
        raise request
    if not isinstance(request, dict):
        raise QmpRefusal("QMP input must be a JSON object")
    if unknown := [member for member in request if member not in MEMBERS]:
        raise QmpRefusal(f"QMP input member '{unknown[0]}' is unexpected")
    if "execute" not in request:
        raise QmpRefusal("QMP input lacks member 'execute'")
    if not isinstance(request["execute"], str):
        raise QmpRefusal("QMP input member 'execute' must be a string")
    given = request.get("arguments", {})
    if not isinstance(given, dict):
        raise QmpRefusal("QMP input member 'arguments' must be an object")
    return request["execute"], given


def _taken(command: Command, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments by the names of the function's parameters."""
    taken = {}
    for argument in command.arguments:
        if argument.name in given:
            taken[argument.name.replace("-", "_")] = _value(argument, given[argument.name])
        elif argument.is_required:
            raise QmpRefusal(f"Parameter '{argument.name}' is missing")
    known = {argument.name for argument in command.arguments}
    if unknown := [name for name in given if name not in known]:
        raise QmpRefusal(f"Parameter '{unknown[0]}' is unexpected")
    return taken


def _value(argument: Argument, given: object) -> object:
    if argument.kind is object:
        return given
    if argument.kind is float and type(given) is int:
        with suppress(OverflowError):
            return float(given)
    is_of_kind = isinstance(given, argument.kind) and (argument.kind is bool or not isinstance(given, bool))
    if not is_of_kind or (argument.kind is int and given not in INTEGERS):
        raise QmpRefusal(f"Invalid parameter type for '{argument.name}', expected: {NAMES[argument.kind]}")
    return given
