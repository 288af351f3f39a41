"""A reset that the guest asks for, done by another thread: the vCPU's own would wait for its own end."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread

from pvclock.threads import begin

__all__ = ["GuestReset"]


class GuestReset:
    """Calls `reset` on a thread of its own once the guest has asked for it, and again at go_on() while it is wanted.

    Thread-safety: all methods may be called from any thread.
    """

    def __init__(self, reset: Callable[[], object]) -> None:
        self._reset = reset
        self.is_wanted = False
        """Has the guest asked for a reset that has not come?  False again: the caller's to set."""

    def request(self) -> None:
        """See ResetServices.request_reset().  Asked twice it is one reset."""
        if not self.is_wanted:
            self.is_wanted = True
            self.go_on()

    def go_on(self) -> None:
        """Begin the reset that is wanted, if any; StateError if there is no thread for it."""
        if self.is_wanted:
            begin(Thread(target=self._reset, name="pvclock-reset", daemon=True), "reset")
