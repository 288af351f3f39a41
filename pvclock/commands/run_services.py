"""What `pvclock run` serves its machine by, beside the console: found by the entry-point group `pvclock.run_services`.

A service is a module of the shape of `RunService`; the name of its entry point is its option, such as --qmp PATH.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.metadata import EntryPoint, entry_points
from typing import Final, Protocol

from pvclock.machine import Machine

__all__ = ["GROUP", "RunService", "add_arguments", "is_any_asked_for", "served"]

GROUP: Final = "pvclock.run_services"


class RunService(Protocol):
    """A module that serves machines."""

    def serve(self, machine: Machine, path: str, on_quit: Callable[[], object], /) -> AbstractContextManager[object]:
        """Serve `machine` at the socket `path` while it is entered.  on_quit: called when a client ends the run.

        ConfigError if there can be no socket.
        """


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the services' options."""
    for name in map(_name, _services()):
        parser.add_argument(f"--{name}", metavar="PATH", help=f"serve the machine by {name.upper()} at that socket")


def is_any_asked_for(arguments: argparse.Namespace) -> bool:
    """May there be clients?"""
    return any(getattr(arguments, name) is not None for name in map(_name, _services()))


@contextmanager
def served(machine: Machine, arguments: argparse.Namespace, on_quit: Callable[[], object]) -> Iterator[None]:
    """Serve `machine` by each service that is asked for; errors of serve()."""
    with ExitStack() as services:
        for point in _services():
            if (path := getattr(arguments, _name(point))) is not None:
                service: RunService = point.load()
                services.enter_context(service.serve(machine, path, on_quit))
        yield


def _services() -> list[EntryPoint]:
    return sorted(entry_points(group=GROUP), key=_name)


def _name(point: EntryPoint) -> str:
    return point.name
