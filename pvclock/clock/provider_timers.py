"""Timers of the guest's clock interface: when the next one is due, who is told that this changed, and their expiry."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from pvclock.arguments import function
from pvclock.clock.timekeeper import Timekeeper, nothing
from pvclock.errors import RangeError
from pvclock.providers.interface import Hooks
from pvclock.quantities import NS_PER_S, GuestNs, signed64

__all__ = ["ProviderTimers"]


class ProviderTimers:
    """The timers that a provider has by its hooks next_due_ns and expire, in the time of `keeper`.

    Thread-safety: all methods may be called from any thread.
    """

    def __init__(self, keeper: Timekeeper, hooks: Hooks) -> None:
        self.exist = hooks.next_due_ns is not None and hooks.expire is not None
        """Can the provider have timers at all?"""
        self._keeper = keeper
        self._next_due_ns: Callable[[], int | None] = hooks.next_due_ns or nothing
        self._expire: Callable[[int], Callable[[], object] | None] = hooks.expire or nothing
        self._watchers: dict[Callable[[], object], None] = {}  # needs no lock: each use is one step of it

    def watch(self, told: Callable[[], object]) -> None:
        """Call `told` whenever the next timer, or the time until it is due, may have changed.

        On any thread, with the clock's lock held: it wakes what calls expire(), and neither waits nor raises.
        """
        self._watchers[function("told", told)] = None

    def unwatch(self, told: Callable[[], object]) -> None:
        """Call `told` no more; does nothing if it is not called."""
        self._watchers.pop(function("told", told), None)

    def changed(self) -> None:
        """Tell all watchers that the next due timer, or the time until then, may be another one."""
        for told in tuple(self._watchers):
            told()

    def expire(self) -> GuestNs | None:
        """See GuestClock.expire_timers()."""
        with self._keeper.changing:
            if self._keeper.is_paused:
                return None
            deliver = self._expire(self._keeper.now())
            due_ns = self._next_due_ns()
        if deliver is not None:
            deliver()
        return None if due_ns is None else GuestNs(due_ns)

    def next_due_ns(self) -> GuestNs | None:
        """Guest time in ns at which the next timer is due, possibly in the past; None if none is set."""
        with self._keeper.changing.lock:
            due_ns = self._next_due_ns()
        return None if due_ns is None else GuestNs(due_ns)

    def host_ns_left(self) -> int | None:
        """Host ns from now until the next timer is due at the present rate, 0 if one is.

        None as for expire(), and if the host's counter does not get there.
        """
        with self._keeper.changing.lock:
            due_ns = self._next_due_ns()
            return None if due_ns is None else self.host_ns_until(due_ns)

    def host_ns_until(self, guest_ns: int) -> int | None:
        """Host ns from now until guest time is `guest_ns` at the present rate, 0 if it was.

        None while paused, and if the host's counter does not get there.
        """
        with self._keeper.changing.lock:
            timeline, is_paused = self._keeper.timeline, self._keeper.is_paused
            if is_paused:
                return None
            try:
                due_tsc = timeline.tsc_at(Fraction(guest_ns))
            except RangeError:
                return None
            ticks = signed64(due_tsc - self._keeper.host_tsc())
        return max(-(-ticks * NS_PER_S // timeline.tsc_hz), 0)
