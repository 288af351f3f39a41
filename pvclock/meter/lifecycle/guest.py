"""A guest whose VMM does to it all that a VMM does in a guest's life."""

from __future__ import annotations

from typing import Protocol

from pvclock._memory import GuestMemory
from pvclock.meter.guest import Guest

__all__ = ["LifecycleGuest"]


class LifecycleGuest(Guest, Protocol):
    """A `Guest` that can be reset, saved and loaded."""

    @property
    def memory(self) -> GuestMemory:
        """Its RAM; another one after save_and_load()."""

    def tsc_offsets(self) -> tuple[int | None, ...]:
        """Each vCPU's TSC offset: guest TSC less host TSC, signed, in ticks; None where it cannot be read."""

    def reset(self) -> None:
        """Reset the running VM; return when every vCPU reads again."""

    def save_and_load(self) -> None:
        """Save the paused guest, end it, and load it, still paused, in a new VM.  StateError if it cannot be saved."""
