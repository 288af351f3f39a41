"""The live clock of a memory, how a restored clock takes it over, and the hold that keeps vCPUs out while paused."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext

from pvclock._memory import GuestMemory
from pvclock.host.backend import Backend

__all__ = ["LiveClock", "Takeover", "vcpu_hold"]


def vcpu_hold(backend: Backend) -> AbstractContextManager[object]:
    """A context that keeps the backend's vCPUs out of the guest; empty if the VMM runs its own vCPUs."""
    return nullcontext() if backend.vcpus_are_out() is None else backend.quiesce(None)


class LiveClock:
    """The part of a memory's live clock that its successor needs: whether it is paused, and its vCPU hold.

    While the clock is paused the hold keeps the backend's vCPUs out of the guest, even if the VMM resumes them.
    """

    def __init__(self) -> None:
        self.is_paused = False
        self._hold = ExitStack()

    def pause(self, hold: ExitStack) -> None:
        """Note that time stopped; `hold` is closed on resume() or hand_over()."""
        self.is_paused, self._hold = True, hold

    def resume(self) -> None:
        """Note that time runs, and let vCPUs in."""
        self.is_paused = False
        self._hold.close()

    def hand_over(self) -> None:
        """Another clock is live now: close the hold, but keep is_paused in case the takeover is undone."""
        self._hold.close()


class Takeover:
    """Replaces the live clock of `memory` by a restored one; vCPUs stay out of the guest until either clock runs.

    Call begin() before the new clock is made, then accept(), or undo() if making it failed.
    """

    def __init__(self, memory: GuestMemory, backend: Backend) -> None:
        self._memory, self._backend = memory, backend
        self._previous = memory.live_clock
        self._hold = ExitStack()

    def begin(self) -> None:
        """Keep the vCPUs out of the guest."""
        self._hold.enter_context(vcpu_hold(self._backend))

    def accept(self, clock: LiveClock) -> None:
        """Give the hold to the new clock, which is paused."""
        clock.pause(self._hold)

    def undo(self) -> None:
        """Make the previous clock live again; it gets the hold if it was paused."""
        self._memory.live_clock = self._previous
        if isinstance(self._previous, LiveClock) and self._previous.is_paused:
            self._previous.pause(self._hold)
        else:
            self._hold.close()
