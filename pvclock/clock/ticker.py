"""Threads that tick clocks on a schedule, and look at the host for them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Final, NamedTuple, Self

from pvclock._counter import SimulatedCounter
from pvclock.arguments import flag, instance, number
from pvclock.clock.guest_clock import MAX_AGE_S, GuestClock
from pvclock.clock.tick_workers import Workers
from pvclock.errors import RangeError, StateError
from pvclock.host.watch import HostWatch, Trouble
from pvclock.quantities import NS_PER_S, shown
from pvclock.threads import WakeUp, begin, check_timeout, renew_in_children

__all__ = ["SHORTEST_S", "TickFailure", "Ticker"]

FAILURES_KEPT: Final = 16
SHORTEST_S: Final = 0.001

NEWS_KEPT: Final = 64
"""Troubles of the host kept for a clock that is stuck."""

STOP_S: Final = 5.0
"""How long stop() waits for a tick unless told otherwise."""


class TickFailure(NamedTuple):
    """An error of a clock's tick, or (None) of a look at the host; both are tried again in the next round."""

    clock: GuestClock | None
    error: BaseException


class _HostNews:
    """What a clock is still to be told of its host."""

    def __init__(self) -> None:
        self.troubles: deque[Trouble] = deque(maxlen=NEWS_KEPT)
        self.trusted: bool | None = None  # None: nothing is to be told

    def add(self, troubles: list[Trouble], trusted: bool) -> None:
        """Keep what a look has found."""
        self.troubles.extend(troubles)
        self.trusted = trusted

    def take(self) -> tuple[list[Trouble], bool | None]:
        """The troubles and whether the TSC is to be trusted; they are told once."""
        taken = list(self.troubles), self.trusted
        self.troubles.clear()
        self.trusted = None
        return taken


class Ticker:
    """Calls tick() of each clock every `interval_s` from threads of its own; a context manager.

    interval_s: from 1 ms to MAX_AGE_S, and shortened as far as the fastest clock needs it (see MAX_AGE_S).  watch_host:
    look at the host once a round, too, and tell the clocks that run on its TSC of its trouble (see GuestClock.heed).  A
    round that comes late is not made up for: the next ones keep the schedule.

    A clock whose source, backend or on_dirty does not return is `stuck`: it is left alone until it does, and the others
    are ticked by another thread from the next round on.

    Thread-safety: all methods may be called from any thread.
    """

    def __init__(self, *clocks: GuestClock, interval_s: float = 1.0, watch_host: bool = True) -> None:
        if not SHORTEST_S <= number("interval_s", interval_s) <= MAX_AGE_S:
            raise RangeError(
                f"interval_s is {shown(interval_s)}; from {SHORTEST_S:g} to {MAX_AGE_S:g}, else pages get too old"
            )
        self.interval_s = interval_s
        self._watch_host = flag("watch_host", watch_host)
        self._failures: deque[TickFailure] = deque(maxlen=FAILURES_KEPT)
        self._workers = Workers(self._tick)
        self._lock = threading.Lock()  # of what follows; never held while a clock ticks
        self._clocks = {instance("clocks", clock, GuestClock): _HostNews() for clock in clocks}
        self._keeper: _Keeper | None = None  # any other ends
        self._begun: set[_Keeper] = set()  # all whose thread may not have ended
        renew_in_children(self)

    def begin_anew(self) -> None:
        """See HasLock: in a child of fork() a ticker is stopped."""
        self._lock = threading.Lock()
        self._keeper = None
        self._begun = set()

    @property
    def has_threads(self) -> bool:
        """Are there threads of this ticker?  After stop() none, but for one in a tick that does not return."""
        return any(keeper.thread.is_alive() for keeper in tuple(self._begun)) or self._workers.has_threads

    @property
    def rounds(self) -> int:
        """How often all clocks were ticked, stuck ones not counted."""
        return self._workers.rounds

    def add(self, clock: GuestClock) -> None:
        """Tick `clock`, too, from the next round on; once a round, however often it is added."""
        instance("clock", clock, GuestClock)
        with self._lock:
            self._clocks.setdefault(clock, _HostNews())

    def remove(self, clock: GuestClock) -> None:
        """Tick `clock` no more; a tick that is under way goes on.  StateError if it is not ticked here."""
        instance("clock", clock, GuestClock)
        with self._lock:
            if self._clocks.pop(clock, None) is None:
                raise StateError("remove", "this clock is not ticked here", "add() it first")

    @property
    def failures(self) -> tuple[TickFailure, ...]:
        """The last 16 errors, oldest first."""
        return tuple(self._failures)

    @property
    def stuck(self) -> tuple[GuestClock, ...]:
        """The clocks whose tick has been under way for 50 ms or more."""
        return self._workers.stuck

    def start(self) -> None:
        """Begin, with a round at once.  StateError if it runs, or, and nothing done, where no thread can be begun."""
        with self._lock:
            if self._keeper is not None:
                raise StateError("start", "the ticker is running", "stop() it first")
            keeper = _Keeper(self._keep_schedule)
            self._begun.add(keeper)
            try:
                self._workers.begin()
                begin(keeper.thread, "start")
                self._keeper = keeper
            except BaseException:
                self._workers.dismiss()
                raise

    def stop(self, timeout_s: float = STOP_S) -> None:
        """Return once no clock is ticked any more, but for one in whose tick this is called.  May be called twice.

        StateError, which names the clock, if a tick has not ended after timeout_s; nothing else is ticked then, and
        start() is possible.  RangeError for timeout_s.  After an interrupt, call it again.
        """
        check_timeout(timeout_s)
        until_s = time.monotonic() + timeout_s
        with self._lock:
            self._keeper = None
            keepers, left = tuple(self._begun), self._workers.dismiss()
        for keeper in keepers:
            keeper.wake_up.call()
            if keeper.thread.is_alive():
                keeper.thread.join(timeout_s)
        with self._lock:
            self._begun = {keeper for keeper in self._begun if keeper.thread.is_alive() or keeper is self._keeper}
        if stuck := self._workers.wait(left, until_s):
            state = f"the tick of {', '.join(map(str, stuck))} has not ended after {timeout_s:g} s"
            raise StateError("stop", state, "its source, backend or on_dirty must return; nothing else is ticked")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    # Inside, on the thread that keeps the schedule

    def _keep_schedule(self, keeper: _Keeper) -> None:
        watches: dict[int, HostWatch] = {}  # by TSC frequency; a watch belongs to one thread
        due_s = time.monotonic()
        while (clocks := self._clocks_of(keeper)) is not None:
            self._look_at_host(clocks, watches)
            with self._kept(None):
                self._workers.hand_out(clocks)
            interval_s = max(self.interval_s / max([1.0, *(float(clock.rate) for clock in clocks)]), SHORTEST_S)
            due_s += interval_s
            if (late_s := time.monotonic() - due_s) > 0:
                due_s += (late_s // interval_s + 1) * interval_s
            keeper.wake_up.wait(max(due_s - time.monotonic(), 0))

    def _clocks_of(self, keeper: _Keeper) -> tuple[GuestClock, ...] | None:
        """The clocks that are to be ticked; None for a keeper that is to end."""
        with self._lock:
            return tuple(self._clocks) if self._keeper is keeper else None

    def _look_at_host(self, clocks: tuple[GuestClock, ...], watches: dict[int, HostWatch]) -> None:
        """Keep for each clock what went wrong with its host since the last round: a tick, which may block, tells it."""
        on_host = [clock for clock in clocks if not isinstance(clock.backend.counter, SimulatedCounter)]
        for tsc_hz in {clock.backend.tsc_hz for clock in on_host} | set(watches) if self._watch_host else ():
            with self._kept(None):
                troubles = self._check(tsc_hz, watches)
                with self._lock:
                    for clock in on_host:
                        if clock.backend.tsc_hz == tsc_hz and clock in self._clocks:
                            self._clocks[clock].add(troubles, watches[tsc_hz].tsc_stable)

    def _check(self, tsc_hz: int, watches: dict[int, HostWatch]) -> list[Trouble]:
        """What went wrong with the host since the last round; the first look finds nothing."""
        if tsc_hz not in watches:
            watches[tsc_hz] = HostWatch(tsc_hz, interval_ns=round(self.interval_s * NS_PER_S))
            return []
        return watches[tsc_hz].check()

    # Inside, on a thread that ticks

    def _tick(self, clock: GuestClock) -> None:
        with self._lock:
            if clock not in self._clocks:  # removed meanwhile
                return
            troubles, trusted = self._clocks[clock].take()
        if trusted is not None:
            with self._kept(clock):
                clock.apply_host_findings(troubles, host_trusted=trusted)
        with self._kept(clock):
            clock.tick()

    @contextmanager
    def _kept(self, clock: GuestClock | None) -> Iterator[None]:
        """Keep what is raised: one VM's trouble is not another's, and no thread must end by it."""
        try:
            yield
        except BaseException as error:  # noqa: BLE001  # SystemExit from a source, too
            self._failures.append(TickFailure(clock, error))


class _Keeper:
    """The thread that keeps the schedule, from one start() to its stop()."""

    def __init__(self, target: Callable[[_Keeper], None]) -> None:
        self.wake_up = WakeUp()
        self.thread = threading.Thread(target=target, args=(self,), name="pvclock-ticker", daemon=True)
