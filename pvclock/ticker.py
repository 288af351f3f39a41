"""A thread that ticks clocks on a schedule, and looks at the host for them."""

from __future__ import annotations

import threading
import time
from collections import deque
from types import TracebackType
from typing import Final, NamedTuple, Self

from pvclock.errors import RangeError, StateError
from pvclock.guestclock import MAX_AGE_S, GuestClock
from pvclock.hostwatch import HostWatch, Trouble
from pvclock.quantities import NS_PER_S

__all__ = ["TickFailure", "Ticker"]

FAILURES_KEPT: Final = 16


class TickFailure(NamedTuple):
    """An error that a clock's tick raised; the clock is ticked again all the same."""

    clock: GuestClock
    error: Exception


class Ticker:
    """Calls tick() of each clock every `interval_s` from a thread of its own; a context manager.

    interval_s: above 0, up to MAX_AGE_S.  watch_host: look at the host once a round, too, and tell the clocks of its
    trouble (see GuestClock.heed).  A round that comes late is not made up for: the next ones keep the schedule.

    Thread-safety: all methods may be called from any thread.
    """

    def __init__(self, *clocks: GuestClock, interval_s: float = 1.0, watch_host: bool = True) -> None:
        if not 0 < interval_s <= MAX_AGE_S:
            raise RangeError(f"interval_s is {interval_s}; above 0 and up to {MAX_AGE_S:g}, lest pages become too old")
        self.interval_s = interval_s
        self.rounds = 0
        """How often all clocks were ticked."""
        self._clocks = list(clocks)
        self._watch_host = watch_host
        self._watch: HostWatch | None = None
        self._failures: deque[TickFailure] = deque(maxlen=FAILURES_KEPT)
        self._ending = threading.Event()
        self._lock = threading.Lock()  # of _clocks; never held while a clock ticks
        self._thread: threading.Thread | None = None

    def add(self, clock: GuestClock) -> None:
        """Tick `clock`, too, from the next round on."""
        with self._lock:
            self._clocks.append(clock)

    def remove(self, clock: GuestClock) -> None:
        """Tick `clock` no more; a round that is under way may still do so.  StateError if it is not ticked here."""
        with self._lock:
            if not any(each is clock for each in self._clocks):
                raise StateError("remove", "this clock is not ticked here", "add() it first")
            self._clocks = [each for each in self._clocks if each is not clock]

    @property
    def failures(self) -> tuple[TickFailure, ...]:
        """The last 16 errors of ticks, oldest first."""
        return tuple(self._failures)

    def start(self) -> None:
        """Begin, with a round at once.  StateError if it runs."""
        if self._thread is not None:
            raise StateError("start", "the ticker is running", "stop() it first")
        self._ending.clear()
        self._thread = threading.Thread(target=self._run, name="pvclock-ticker", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Return once no clock is ticked any more.  May be called twice, but not by a subscriber of events."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._ending.set()
            thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    # Inside, on the thread

    def _run(self) -> None:
        self._watch = None  # it belongs to one thread
        due = time.monotonic()
        while True:
            self._round()
            due += self.interval_s
            if (late := time.monotonic() - due) > 0:
                due += late // self.interval_s * self.interval_s
            if self._ending.wait(max(due - time.monotonic(), 0)):
                return

    def _round(self) -> None:
        with self._lock:
            clocks = tuple(self._clocks)
        troubles = self._look(clocks)
        for clock in clocks:
            try:
                clock.tick()
                if self._watch is not None:
                    clock.note(troubles, host_trusted=self._watch.tsc_stable)
            except Exception as error:  # noqa: BLE001  # one VM's trouble is not another's
                self._failures.append(TickFailure(clock, error))
        self.rounds += 1

    def _look(self, clocks: tuple[GuestClock, ...]) -> list[Trouble]:
        """What went wrong with the host since the last round; the first look finds nothing."""
        if not self._watch_host or not clocks:
            return []
        if self._watch is None:
            self._watch = HostWatch(clocks[0].backend.tsc_hz, interval_ns=round(self.interval_s * NS_PER_S))
            return []
        return self._watch.look()
