"""A thread that ticks clocks on a schedule, and looks at the host for them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Final, NamedTuple, Self

from pvclock._counter import SimulatedCounter
from pvclock.errors import RangeError, StateError
from pvclock.guestclock import MAX_AGE_S, GuestClock
from pvclock.hostwatch import HostWatch, Trouble
from pvclock.quantities import NS_PER_S

__all__ = ["TickFailure", "Ticker"]

FAILURES_KEPT: Final = 16
SHORTEST_S: Final = 0.001


class TickFailure(NamedTuple):
    """An error of a clock's tick, or (None) of a look at the host; both are tried again in the next round."""

    clock: GuestClock | None
    error: BaseException


class Ticker:
    """Calls tick() of each clock every `interval_s` from a thread of its own; a context manager.

    interval_s: from 1 ms to MAX_AGE_S, and shortened as far as the fastest clock needs it (see MAX_AGE_S).  watch_host:
    look at the host once a round, too, and tell the clocks that run on its TSC of its trouble (see GuestClock.heed).  A
    round that comes late is not made up for: the next ones keep the schedule.

    Thread-safety: all methods may be called from any thread; stop() not by a source or a subscriber of events, which it
    would wait for.
    """

    def __init__(self, *clocks: GuestClock, interval_s: float = 1.0, watch_host: bool = True) -> None:
        if not SHORTEST_S <= interval_s <= MAX_AGE_S:
            raise RangeError(
                f"interval_s is {interval_s}; from {SHORTEST_S:g} to {MAX_AGE_S:g}, lest pages get too old"
            )
        self.interval_s = interval_s
        self.rounds = 0
        """How often all clocks were ticked."""
        self._clocks = list(clocks)
        self._watch_host = watch_host
        self._failures: deque[TickFailure] = deque(maxlen=FAILURES_KEPT)
        self._lock = threading.Lock()  # of _clocks and _run; never held while a clock ticks
        self._run: _Run | None = None

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
        """The last 16 errors, oldest first."""
        return tuple(self._failures)

    def start(self) -> None:
        """Begin, with a round at once.  StateError if it runs."""
        with self._lock:
            if self._run is not None:
                raise StateError("start", "the ticker is running", "stop() it first")
            ending = threading.Event()
            thread = threading.Thread(target=self._tick_until, args=(ending,), name="pvclock-ticker", daemon=True)
            self._run = _Run(thread, ending)
            thread.start()

    def stop(self) -> None:
        """Return once no clock is ticked any more.  May be called twice."""
        with self._lock:
            run, self._run = self._run, None
        if run is not None:
            run.ending.set()
            run.thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    # Inside, on the thread

    def _tick_until(self, ending: threading.Event) -> None:
        watches: dict[int, HostWatch] = {}  # by TSC frequency; a watch belongs to one thread
        due = time.monotonic()
        while not ending.is_set():
            with self._lock:
                clocks = tuple(self._clocks)
            self._round(clocks, watches)
            interval_s = max(self.interval_s / max([1.0, *(float(clock.pace) for clock in clocks)]), SHORTEST_S)
            due += interval_s
            if (late_s := time.monotonic() - due) > 0:
                due += late_s // interval_s * interval_s
            ending.wait(max(due - time.monotonic(), 0))

    def _round(self, clocks: tuple[GuestClock, ...], watches: dict[int, HostWatch]) -> None:
        on_host = [clock for clock in clocks if not isinstance(clock.backend.counter, SimulatedCounter)]
        for tsc_hz in {clock.backend.tsc_hz for clock in on_host} | set(watches) if self._watch_host else ():
            with self._kept(None):
                troubles = self._look(tsc_hz, watches)
                for clock in on_host:
                    if clock.backend.tsc_hz == tsc_hz:
                        clock.note(troubles, host_trusted=watches[tsc_hz].tsc_stable)
        for clock in clocks:
            with self._kept(clock):
                clock.tick()
        self.rounds += 1

    def _look(self, tsc_hz: int, watches: dict[int, HostWatch]) -> list[Trouble]:
        """What went wrong with the host since the last round; the first look finds nothing."""
        if tsc_hz not in watches:
            watches[tsc_hz] = HostWatch(tsc_hz, interval_ns=round(self.interval_s * NS_PER_S))
            return []
        return watches[tsc_hz].look()

    @contextmanager
    def _kept(self, clock: GuestClock | None) -> Iterator[None]:
        """Keep what is raised: one VM's trouble is not another's, and the thread must not end by it."""
        try:
            yield
        except BaseException as error:  # noqa: BLE001  # SystemExit from a source, too
            self._failures.append(TickFailure(clock, error))


class _Run(NamedTuple):
    thread: threading.Thread
    ending: threading.Event
