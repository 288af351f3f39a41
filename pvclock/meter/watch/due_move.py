"""Whether a VM's pages are dead: KVM was to write the live ones by now, and has not written these.

KVM writes each vCPU's page anew when the VM goes on after a stop, as soon as that vCPU runs, and when the VMM writes
its TSC, as at a reset.  The pages of a kernel that has given way to another, by a reboot or by kexec, stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from pvclock.meter.watch.vm import VmEvent, VmEventKind
from pvclock.readings import TimeInfo

__all__ = ["DueMove"]

LIMIT_S: Final = 1.0
"""A vCPU that is idle runs now and then."""
LATE_S: Final = 0.5
"""A VMM's event may come later than what it tells of."""


class DueMove:
    """Fed with polls of a VM's pages: is one of them to move, and is it overdue?"""

    def __init__(self) -> None:
        self._due_s: float | None = None
        self._moved_s = 0.0
        self._pages: tuple[TimeInfo | None, ...] = ()
        self._offset: int | None = None

    @property
    def is_open(self) -> bool:
        """Is one to move that has not moved so far?"""
        return self._due_s is not None

    def take(
        self, pages: Sequence[TimeInfo | None], offset: int | None, events: Sequence[VmEvent], now_s: float
    ) -> bool:
        """Take a poll; has none of `pages` moved when one should have?  Told once.

        offset: vCPU 0's TSC offset.
        """
        if self._is_moved(pages):
            self._due_s, self._moved_s = None, now_s
        elif self._calls_for_a_move(offset, events) and self._due_s is None and self._moved_s < now_s - LATE_S:
            self._due_s = now_s + LIMIT_S
        elif any(event.kind is VmEventKind.STOP for event in events) and not _goes_on(events):
            self._due_s = None
        self._offset = self._offset if offset is None else offset
        self._pages = tuple(pages)
        if self._due_s is None or now_s < self._due_s:
            return False
        self._due_s = None
        return True

    # Inside

    def _is_moved(self, pages: Sequence[TimeInfo | None]) -> bool:
        """Has one moved since the last poll?  One that is being written is on its way."""
        return bool(self._pages) and any(new != old for new, old in zip(pages, self._pages, strict=True))

    def _calls_for_a_move(self, offset: int | None, events: Sequence[VmEvent]) -> bool:
        is_written = None not in {offset, self._offset} and offset != self._offset
        return is_written or _goes_on(events)


def _goes_on(events: Sequence[VmEvent]) -> bool:
    """Is the last thing told that the VM goes on?"""
    kinds = [event.kind for event in events if event.kind in {VmEventKind.STOP, VmEventKind.RESUME}]
    return kinds[-1:] == [VmEventKind.RESUME]
