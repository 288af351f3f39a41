"""Several calls made as one, none of them lost by another's error."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import ParamSpec

__all__ = ["each_of"]

P = ParamSpec("P")


def each_of(*calls: Callable[P, object] | None) -> Callable[P, object] | None:
    """What makes each of those calls, in that order, whatever another one raises; None if there is none to make.

    The last error is raised, after the others as its context.
    """
    there = [call for call in calls if call is not None]

    def make(*arguments: P.args, **named: P.kwargs) -> None:
        with ExitStack() as calling:
            for call in reversed(there):
                calling.callback(call, *arguments, **named)

    return make if len(there) > 1 else next(iter(there), None)
