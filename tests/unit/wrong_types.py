"""Call a public callable with a value of a wrong type, or of the right one, for each of its parameters in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import pytest

from pvclock import PvclockError, WrongType
from tests.unit.public_callables import Parameter, PublicCallable, fits

__all__ = ["assert_right_types_are_taken", "assert_wrong_types_are_refused"]

VALUES: Final = (1.5, "x", None, b"x", object())
NONE_KNOWN: Final = object()

Makers = Mapping[str, Callable[[], object]]
"""An object of each class, or what a method of it needs."""

Valid = Mapping[str, Callable[[], Any]]
"""What is right for a parameter: by its callable's name and its own, or by that alone."""


def assert_wrong_types_are_refused(callee: PublicCallable, makers: Makers, valid: Valid) -> None:
    """WrongType for each parameter: it names that, what was given, and what it can be."""
    for parameter in callee.parameters:
        for value in VALUES:
            if fits(parameter.hint, value):
                continue
            with pytest.raises(WrongType) as caught:
                _call(callee, parameter, value, makers, valid)
            error = caught.value
            assert parameter.name.endswith(error.parameter.partition("[")[0]), error
            assert error.given in str(error)
            assert error.wanted in str(error)


def assert_right_types_are_taken(callee: PublicCallable, makers: Makers, valid: Valid) -> None:
    """Whatever comes of right values, no type was wrong."""
    for parameter in callee.parameters:
        value = _right_value(callee.name, parameter.name, valid)
        if value is NONE_KNOWN:
            continue
        try:
            _call(callee, parameter, value, makers, valid)
        except WrongType:
            raise
        except PvclockError:  # there is no such file, the clock runs, ...
            continue


def _right_value(name: str, parameter: str, valid: Valid) -> object:
    """A value of the parameter's type that the callable can be called with."""
    make = valid.get(f"{name}.{parameter}") or valid.get(parameter)
    return NONE_KNOWN if make is None else make()


def _arguments_for(
    callee: PublicCallable, parameter: Parameter, value: object, valid: Valid
) -> tuple[list[object], dict[str, object]]:
    """What the callable is called with: right values, but for one parameter."""
    given = {each.name: _right_value(callee.name, each.name, valid) for each in callee.parameters if each.required}
    unknown = [each for each in given if given[each] is NONE_KNOWN and each != parameter.name]
    assert not unknown, f"{callee.name}: what is right for {unknown}?  Put it into VALID"
    if parameter.is_variadic or callee.is_setter:
        return [value], {}
    return [], {**given, parameter.name: value}


def _call(callee: PublicCallable, parameter: Parameter, value: object, makers: Makers, valid: Valid) -> None:
    """Call it with that value for the parameter, and all others right."""
    instance = None
    if callee.owner is not None and callee.member != "__init__":
        maker = makers.get(callee.name) or makers.get(callee.owner.__name__)
        assert maker, f"{callee.name}: how is a {callee.owner.__name__} made?  Put it into MAKERS"
        instance = maker()
    positional, by_name = _arguments_for(callee, parameter, value, valid)
    callee.bound(instance)(*positional, **by_name)
