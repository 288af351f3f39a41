"""QEMUs side by side whose QMP sockets lie in one folder, and the watch of them all in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from tests.qemu.running_qemu import RunningQemu, running_qemu

__all__ = ["FleetOfQemus"]

SOCKETS: Final = "sockets"


class FleetOfQemus:
    """Runs QEMUs in `place` by their names, until `resources` end."""

    def __init__(self, place: Path, resources: ExitStack) -> None:
        self._place, self._resources = place, resources
        (place / SOCKETS).mkdir()
        self.qemus: dict[str, RunningQemu] = {}

    @property
    def pattern(self) -> str:
        """What --qmp takes."""
        return f"{self._place / SOCKETS}/*.qmp"

    def add(self, name: str) -> Callable[[], None]:
        """Run one more, whose two vCPUs have their pages; what ends it."""
        own = self._place / name
        own.mkdir()
        socket = f"unix:{self._place / SOCKETS / name}.qmp,server=on,wait=off"
        running = self._resources.enter_context(running_qemu(own, arguments=("-qmp", socket)))
        self.qemus[name] = running
        return running.qemu.close
