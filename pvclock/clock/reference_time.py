"""One VM's reference time, in units of 100 ns: the counter and the page that guests of Hyper-V's kind read."""

from __future__ import annotations

from typing import Final

from pvclock._core import read_reference_page
from pvclock.clock.timekeeper import Timekeeper
from pvclock.errors import GuestAddressError
from pvclock.quantities import Gpa
from pvclock.readings import ReferenceTscPage

__all__ = ["UNIT_NS", "ReferenceTime"]

UNIT_NS: Final = 100
"""A unit of reference time, in ns."""


class ReferenceTime:
    """Reads one VM's reference time: guest time, as its page and the counter beside it show it.

    Thread-safety: units() may be called from any thread, and takes no lock once it was asked.
    """

    def __init__(self, keeper: Timekeeper) -> None:
        self._keeper, self._clock = keeper, keeper.pages.reference

    def units(self, vcpu: int | None = None) -> int:
        """The counter now, in units of 100 ns since guest time 0; never less than any reading before.

        Sleeps while a publish changes the page.  vcpu: the caller's own.
        """
        self._count_executed()
        while (units := self._clock.units()) is None:
            with self._keeper.changing:
                self._clock.serve()
                self._keeper.republish(vcpu)
        return units

    def page(self) -> ReferenceTscPage | None:
        """The page as read from guest memory; None if there is none."""
        gpa = self._clock.gpa
        try:
            return None if gpa is None else read_reference_page(self._keeper.memory, gpa)
        except GuestAddressError:
            return None

    @property
    def shown(self) -> tuple[int, int]:
        """No less than what any guest has read, in units, and the page's last sequence; for a save."""
        self._count_executed()
        units = self._clock.units()
        return self._keeper.now() // UNIT_NS if units is None else units, self._clock.sequence

    def _count_executed(self) -> None:
        """Have a counter of execution time, which C code reads as it is, count what the guest has executed by now."""
        if not self._keeper.backend.counter_follows_host:
            self._keeper.host_tsc()

    def adopt(self, units: int, sequence: int, gpa: Gpa | None) -> None:
        """Go on from what was saved, with the page at `gpa`; for a clock that is restored next."""
        self._clock.adopt(units, sequence)
        self._clock.place(gpa)
