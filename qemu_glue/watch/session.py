"""A talk with the monitor of a running QEMU, however it is reached: its QMP socket, or libvirt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from qemu_glue.peer.monitor import QmpEvent

__all__ = ["Session", "by_hand"]


class Session(Protocol):
    """What qemu_glue.peer.monitor.Monitor and qemu_glue.watch.virsh.Virsh have in common."""

    @property
    def why_no_events(self) -> str | None:
        """Why take_events() has nothing; None if it has."""

    def execute(self, command: str, arguments: Mapping[str, object] | None = None, *, fd: int | None = None) -> Any:  # noqa: ANN401  # JSON
        """QEMU's answer to a QMP command; fd: a descriptor that goes with it.  QmpFailed or VirshFailed."""

    def take_events(self) -> list[QmpEvent]:
        """What QEMU told since the last call, oldest first."""

    def close(self) -> None:
        """End the talk; QEMU runs on."""


def by_hand(session: Session, line: str) -> str:
    """What QEMU answers to a line of its monitor for people (HMP)."""
    return str(session.execute("human-monitor-command", {"command-line": line}))
