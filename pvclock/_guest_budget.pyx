"""How many events a guest may cause: compiled, so that a TSC write can count one that is too many and no more."""

cimport cython

from pvclock.quantities import NS_PER_S as _NS_PER_S

GUEST_BURST = 64
GUEST_EVENTS_PER_S = 8


@cython.final
cdef class GuestBudget:
    """A token bucket for guest-caused events: GUEST_BURST deep, refilled by GUEST_EVENTS_PER_S.

    Time is CLOCK_MONOTONIC_RAW of the events' stamps; if that goes back, the refill restarts there.

    Thread-safety: each call is one step to all threads and signals.
    """

    def __cinit__(self) -> None:
        self.left, self.suppressed = GUEST_BURST, 0

    cpdef fill(self, raw_ns: int | None):
        """Refill for the whole seconds up to raw_ns; None does nothing."""
        if raw_ns is None:
            return
        if self._filled_ns is None or raw_ns < self._filled_ns:
            self._filled_ns = raw_ns
        seconds = (raw_ns - self._filled_ns) // _NS_PER_S
        if seconds:
            self._filled_ns += seconds * _NS_PER_S
            self.left = min(self.left + seconds * GUEST_EVENTS_PER_S, GUEST_BURST)

    cpdef bint take(self):
        """Take one token; False, and counted as suppressed, if none is left."""
        if self.left:
            self.left -= 1
            return True
        self.suppressed += 1
        return False

    cpdef bint suppress(self, raw_ns: int):
        """Count an event at raw_ns that is beyond the budget, which need not be made; False if there is a token."""
        self.fill(raw_ns)
        return not self.left and not self.take()
