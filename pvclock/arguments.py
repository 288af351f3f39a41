"""Checks of callers' arguments.

Each function returns the argument as a plain type, or raises WrongType, which names the parameter, the value and what
it can be.  A number out of range is a RangeError.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from operator import index
from typing import Any, TypeVar, cast

from pvclock.errors import RangeError, WrongType
from pvclock.quantities import U64_MASK, shown

__all__ = [
    "whole",
    "vcpu_number",
    "number",
    "fraction",
    "text",
    "flag",
    "data",
    "path",
    "function",
    "instance",
    "serving",
    "sequence",
    "instances",
]

T = TypeVar("T")


def whole(parameter: str, value: object, least: int | None = None, most: int | None = None) -> int:
    """A whole number of any type with __index__(), but not a bool; RangeError unless it is `least` to `most`."""
    if type(value) is not int:
        value = _index(parameter, value, least, most)
    if (least is not None and value < least) or (most is not None and value > most):
        raise RangeError(f"{parameter} is {shown(value)}; it can be {_span(least, most)}")
    return value


def vcpu_number(vcpu: object, count: int) -> int:
    """A vCPU's number, 0 to count - 1; RangeError otherwise."""
    found = vcpu if type(vcpu) is int else whole("vcpu", vcpu)
    if not 0 <= found < count:
        raise RangeError(f"vCPU {shown(found)}; this VM has {f'vCPUs 0 to {count - 1}' if count else 'none'}")
    return found


def number(parameter: str, value: object) -> float | Fraction:
    """An int, a float or a Fraction."""
    if isinstance(value, bool) or not isinstance(value, int | float | Fraction):
        raise WrongType(parameter, value, "a number")
    return value


def fraction(parameter: str, value: object) -> Fraction:
    """An int or a Fraction, for exact quantities; a float is a WrongType."""
    if isinstance(value, bool) or not isinstance(value, int | Fraction):
        raise WrongType(parameter, value, "a whole number or a Fraction")
    return Fraction(value)


def text(parameter: str, value: object, wanted: str = "text") -> str:
    """A str."""
    if not isinstance(value, str):
        raise WrongType(parameter, value, wanted)
    return value


def flag(parameter: str, value: object) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise WrongType(parameter, value, "True or False")
    return value


def data(parameter: str, value: object) -> bytes:
    """Bytes, from a bytes, bytearray or memoryview."""
    if not isinstance(value, bytes | bytearray | memoryview):
        raise WrongType(parameter, value, "bytes")
    return bytes(value)


def path(parameter: str, value: object) -> str:
    """A file's path, from a str or an os.PathLike of one."""
    found = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(found, str):
        raise WrongType(parameter, value, "a path")
    return found


def function(parameter: str, value: Callable[..., T]) -> Callable[..., T]:
    """A callable."""
    if not callable(value):
        raise WrongType(parameter, value, "a function")
    return value


def instance(parameter: str, value: object, kind: type[T], wanted: str = "") -> T:
    """An instance of `kind`; `wanted` describes it for the message, by default the class's name."""
    if not isinstance(value, kind):
        raise WrongType(parameter, value, wanted or f"a {kind.__name__}")
    return value


def sequence(parameter: str, values: object, wanted: str) -> Sequence[Any]:
    """A sequence of anything, but not text or bytes; `wanted` describes it for the message."""
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise WrongType(parameter, values, wanted)
    return values


def instances(parameter: str, values: object, kind: type[T]) -> Sequence[T]:
    """A sequence of instances of `kind`."""
    found = sequence(parameter, values, f"a sequence of {kind.__name__}")
    return [instance(f"{parameter}[{place}]", each, kind) for place, each in enumerate(found)]


def serving(parameter: str, value: T, *names: str, wanted: str) -> T:
    """An object with the methods `names`, but not a class; `wanted` describes it for the message."""
    if isinstance(value, type) or not all(callable(getattr(value, name, None)) for name in names):
        raise WrongType(parameter, value, wanted)
    return value


def _index(parameter: str, value: object, least: int | None, most: int | None) -> int:
    try:
        if not isinstance(value, bool):
            return index(cast("int", value))
    except TypeError:
        pass
    bounds = "" if least is None and most is None else f", {_span(least, most)}"
    raise WrongType(parameter, value, f"a whole number{bounds}") from None


def _span(least: int | None, most: int | None) -> str:
    if most is None:
        return f"{least} or more"
    highest = "2^64 - 1" if most == U64_MASK else most
    return f"up to {highest}" if least is None else f"{least} to {highest}"
