"""Where a VM's guest has its pvclock pages: each placed and published as one step, the first ones told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from pvclock.clock.timekeeper import Timekeeper
from pvclock.providers.interface import OwnPage
from pvclock.quantities import Gpa
from pvclock.readings import HostStamps
from pvclock.timekeeping.events import Event, EventCause, EventKind

__all__ = ["Placement"]

PAGES_TOLD: Final = 20
"""A guest may place its pages for ever; it is not to fill the log with that."""


class Placement:
    """Places one VM's pages; within `with changing`.

    own_page: Provider's.
    """

    def __init__(self, keeper: Timekeeper, own_page: Callable[[int], OwnPage | None]) -> None:
        self._keeper, self._own_page = keeper, own_page
        self._left_to_tell = PAGES_TOLD

    def place(
        self,
        places: Mapping[int, Gpa | None],
        begin: Callable[[], object],
        undo: Callable[[], object],
        out_of_guest: int | None,
    ) -> None:
        """See GuestSide.place_time_pages()."""
        keeper, pages = self._keeper, self._keeper.pages
        placed = {vcpu: gpa for vcpu, gpa in places.items() if gpa is not None}
        stamps = keeper.backend.stamps() if placed and self._left_to_tell > 0 else None
        before, left = {vcpu: pages.registered(vcpu) for vcpu in places}, self._left_to_tell

        def move() -> None:
            begin()
            self._register(places)

        def move_back() -> None:
            undo()
            self._register(before)

        def told() -> tuple[Event, ...]:
            if stamps is None:
                return ()
            self._left_to_tell = left - len(placed)
            events = [self._told(vcpu, gpa, stamps) for vcpu, gpa in list(placed.items())[:left]]
            return tuple(event for event in events if event is not None)

        keeper.adopt(move, move_back, told, out_of_guest)

    def _register(self, places: Mapping[int, int | None]) -> None:
        for vcpu, gpa in places.items():
            self._keeper.pages.register(vcpu, gpa, self._own_page(vcpu))

    def _told(self, vcpu: int, gpa: Gpa, stamps: HostStamps) -> Event | None:
        """What is recorded of a page that was placed; nothing while paused, for it is published at resume()."""
        page = self._keeper.page(vcpu)
        kind, why = EventKind.REFUSED, f"there is no memory for its clock's page at {gpa:#x}"
        if page is not None:
            if not page.tsc_to_system_mul:
                return None
            kind, why = EventKind.PAGE, f"page at {gpa:#x}, {page.described()}"
        return self._keeper.event(kind, f"vCPU {vcpu}: {why}", stamps, cause=EventCause.GUEST)
