"""What a QEMU tells of its guest as it does it: stops, resets, migrations."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Final

from pvclock.meter.watch.vm import VmEvent, VmEventKind
from qemu_glue.errors import QemuError
from qemu_glue.watch.session import Session

__all__ = ["QemuEvents"]

EVENTS: Final = {kind.upper(): kind for kind in VmEventKind}
"""By QEMU's names."""

AGAIN_S: Final = 1.0
"""During a migration QEMU does not begin to tell of migrations; it is asked again so often."""


class QemuEvents:
    """The events of `session`; of MIGRATION QEMU tells only if asked to, which it is until close()."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._is_asked = False
        self._is_to_ask = {"capability": "events", "state": False} in session.execute("query-migrate-capabilities")
        self._next_s = time.monotonic()
        self._ask()

    def take(self) -> list[VmEvent]:
        """What QEMU told since the last call, oldest first; errors of the session once it tells no more."""
        self._ask()
        return [
            VmEvent(EVENTS[event.name], event.utc_ns) for event in self._session.take_events() if event.name in EVENTS
        ]

    def close(self) -> None:
        """Have QEMU tell of migrations no more, if it did not before; during one it refuses, and goes on."""
        if self._is_asked:
            self._set(False)

    def _ask(self) -> None:
        if self._is_to_ask and time.monotonic() >= self._next_s:
            self._is_asked = self._set(True)
            self._is_to_ask = not self._is_asked
            self._next_s = time.monotonic() + AGAIN_S

    def _set(self, state: bool) -> bool:
        """Was it granted?"""
        with suppress(QemuError):
            capability = {"capability": "events", "state": state}
            self._session.execute("migrate-set-capabilities", {"capabilities": [capability]})
            return True
        return False
