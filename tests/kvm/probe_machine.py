"""The probe's image on a machine of ours, run to its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from pvclock import Machine
from pvclock.boot import BootSource
from pvclock.boot.source import Protocol
from pvclock.probe import bootable_image
from tests.probe_line import Line, one_line

__all__ = ["DONE", "FAILED", "LIMIT_S", "SHORT", "run_on_machine"]

SHORT: Final = "seconds=0.1"
DONE: Final = 0
FAILED: Final = 1
LIMIT_S: Final = 120.0
"""On an emulated CPU."""


def run_on_machine(
    cmdline: str = SHORT,
    *,
    image: bytes = b"",
    protocol: Protocol | None = None,
    prepare: Callable[[Machine], object] = lambda _: None,
    status: int = DONE,
    **options: Any,  # noqa: ANN401  # Machine's
) -> Line:
    """What the image printed, as one line and no other, on a machine that `prepare` was called with."""
    source = BootSource(image or bootable_image(), cmdline, protocol=protocol)
    with Machine(source, **options) as machine:
        prepare(machine)
        machine.start()
        assert machine.wait(LIMIT_S) == status
        (text,) = machine.console.splitlines()
    found = one_line(text)
    assert found["form"] == "bare"
    return found
