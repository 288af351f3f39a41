"""Where a VM's guest has its pvclock pages: each placed and published as one step, the first ones told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from pvclock.clock.timekeeper import Timekeeper, nothing
from pvclock.events import Event, EventCause, EventKind
from pvclock.quantities import Gpa
from pvclock.readings import HostStamps

__all__ = ["Placement"]

PAGES_TOLD: Final = 20
"""A guest may place its pages for ever; it is not to fill the log with that."""


class Placement:
    """Places one VM's pages; within `with changing`."""

    def __init__(self, keeper: Timekeeper) -> None:
        self._keeper = keeper
        self._left_to_tell = PAGES_TOLD

    def place(
        self,
        vcpu: int,
        gpa: Gpa | None,
        begin: Callable[[], object] = nothing,
        undo: Callable[[], object] = nothing,
    ) -> None:
        """See GuestClock.place_time_page()."""
        keeper, pages = self._keeper, self._keeper.pages
        stamps = keeper.backend.stamps() if gpa is not None and self._left_to_tell > 0 else None
        before, left = pages.registered(vcpu), self._left_to_tell - 1

        def move() -> None:
            begin()
            pages.register(vcpu, gpa)

        def move_back() -> None:
            undo()
            pages.register(vcpu, before)

        def told() -> tuple[Event, ...]:
            if gpa is None or stamps is None:
                return ()
            self._left_to_tell = left
            return self._told(vcpu, gpa, stamps)

        keeper.adopt(move, move_back, told, vcpu)

    def _told(self, vcpu: int, gpa: Gpa, stamps: HostStamps) -> tuple[Event, ...]:
        """What is recorded of a page that was placed; nothing while paused, for it is published at resume()."""
        page = self._keeper.page(vcpu)
        kind, why = EventKind.REFUSED, f"there is no memory for its clock's page at {gpa:#x}"
        if page is not None:
            if not page.tsc_to_system_mul:
                return ()
            kind, why = EventKind.PAGE, f"page at {gpa:#x}, {page.described()}"
        return (self._keeper.event(kind, f"vCPU {vcpu}: {why}", stamps, cause=EventCause.GUEST),)
