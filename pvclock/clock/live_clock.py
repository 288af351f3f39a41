"""Which clock a memory has, and who keeps the vCPUs out of the guest while that is paused, or restored over."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext

from pvclock._memory import GuestMemory
from pvclock.host.backend import Backend

__all__ = ["LiveClock", "Succession", "hold_of"]


def hold_of(backend: Backend) -> AbstractContextManager[object]:
    """A hold of the backend's vCPUs, to be entered; an empty one where the VMM answers for its vCPUs."""
    return nullcontext() if backend.vcpus_are_out() is None else backend.quiesce(None)


class LiveClock:
    """A memory's live clock, as far as the next one must know it.

    While it is paused, a hold keeps the backend's own vCPUs out of the guest, whatever resumes them before.
    """

    def __init__(self) -> None:
        self.is_paused = False
        self._hold = ExitStack()

    def pause(self, hold: ExitStack) -> None:
        """Time stands still; `hold` is closed when it goes on, or is another clock's."""
        self.is_paused, self._hold = True, hold

    def go_on(self) -> None:
        """Time goes on."""
        self.is_paused = False
        self._hold.close()

    def give_way(self) -> None:
        """Time is another clock's from now on; this one is paused if it was, should it be the live one again."""
        self._hold.close()


class Succession:
    """That of the clock which `memory` has by one that is restored: vCPUs are out of the guest until one of them runs.

    begin() comes before the new clock is made, accept() when it is, and undo() if it is not.
    """

    def __init__(self, memory: GuestMemory, backend: Backend) -> None:
        self._memory, self._backend = memory, backend
        self._before = memory.live_clock
        self._hold = ExitStack()

    def begin(self) -> None:
        """Keep the vCPUs out."""
        self._hold.enter_context(hold_of(self._backend))

    def accept(self, clock: LiveClock) -> None:
        """The new clock is paused, and has the hold."""
        clock.pause(self._hold)

    def undo(self) -> None:
        """The clock before is the live one again; it has the hold, if it was paused."""
        self._memory.live_clock = self._before
        if isinstance(self._before, LiveClock) and self._before.is_paused:
            self._before.pause(self._hold)
        else:
            self._hold.close()
