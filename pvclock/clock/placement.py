"""Registers the pages of a guest's clock: each placement publishes in one step, and the first ones are events."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from pvclock.clock.reference_time import ReferenceTime
from pvclock.clock.timekeeper import Timekeeper
from pvclock.providers.interface import OwnPage
from pvclock.quantities import Gpa
from pvclock.readings import HostStamps
from pvclock.timekeeping.events import Event, EventCause, EventKind

__all__ = ["Placement"]

PAGES_TOLD: Final = 20
"""Placements recorded as events.  A guest may move its pages without end; this keeps it from filling the log."""


class Placement:
    """Places one VM's pages; call inside `with changing`.

    own_page: the provider's.
    """

    def __init__(
        self, keeper: Timekeeper, own_page: Callable[[int], OwnPage | None], reference_time: ReferenceTime
    ) -> None:
        self._keeper, self._own_page, self._reference_time = keeper, own_page, reference_time
        self._events_left = PAGES_TOLD

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
        stamps = keeper.backend.stamps() if placed and self._events_left > 0 else None
        before, left = {vcpu: pages.registered(vcpu) for vcpu in places}, self._events_left

        def move() -> None:
            begin()
            self._register(places)

        def move_back() -> None:
            undo()
            self._register(before)

        def record() -> tuple[Event, ...]:
            if stamps is None:
                return ()
            self._events_left = left - len(placed)
            events = [self._event(vcpu, gpa, stamps) for vcpu, gpa in list(placed.items())[:left]]
            return tuple(event for event in events if event is not None)

        keeper.publish_with(move, move_back, record, out_of_guest)

    def place_reference_page(
        self, gpa: Gpa | None, begin: Callable[[], object], undo: Callable[[], object], out_of_guest: int | None
    ) -> None:
        """See GuestSide.place_reference_page()."""
        keeper, reference = self._keeper, self._keeper.pages.reference
        stamps = keeper.backend.stamps() if gpa is not None and self._events_left > 0 else None
        before, left = reference.gpa, self._events_left

        def move() -> None:
            begin()
            reference.place(gpa)

        def move_back() -> None:
            undo()
            reference.place(before)

        def record() -> tuple[Event, ...]:
            if stamps is None or keeper.is_paused:  # resume() writes the page
                return ()
            self._events_left = left - 1
            kind, why = EventKind.REFUSED, f"there is no memory for the reference TSC page at {gpa:#x}"
            if (page := self._reference_time.page()) is not None:
                kind, why = EventKind.PAGE, f"reference TSC page at {gpa:#x}, {page.described()}"
            return (keeper.event(kind, why, stamps, cause=EventCause.GUEST),)

        keeper.publish_with(move, move_back, record, out_of_guest)

    def _register(self, places: Mapping[int, int | None]) -> None:
        for vcpu, gpa in places.items():
            self._keeper.pages.register(vcpu, gpa, self._own_page(vcpu))

    def _event(self, vcpu: int, gpa: Gpa, stamps: HostStamps) -> Event | None:
        """The event for one placed page; None while paused, since resume() publishes it."""
        page = self._keeper.page(vcpu)
        kind, why = EventKind.REFUSED, f"there is no memory for its clock's page at {gpa:#x}"
        if page is not None:
            if not page.tsc_to_system_mul:
                return None
            kind, why = EventKind.PAGE, f"page at {gpa:#x}, {page.described()}"
        return self._keeper.event(kind, f"vCPU {vcpu}: {why}", stamps, cause=EventCause.GUEST)
