"""Ticks clocks on a schedule from threads of its own, and checks the host once a round."""

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

FINDINGS_KEPT: Final = 64
"""Host troubles kept for a stuck clock."""

STOP_S: Final = 5.0
"""stop()'s default timeout, in seconds."""


class TickFailure(NamedTuple):
    """An error raised by a clock's tick, or by a host check (clock None).  The next round tries again."""

    clock: GuestClock | None
    error: BaseException


class _PendingFindings:
    """Host findings that a clock has not applied yet."""

    def __init__(self) -> None:
        self.troubles: deque[Trouble] = deque(maxlen=FINDINGS_KEPT)
        self.trusted: bool | None = None  # None: nothing to apply

    def add(self, troubles: list[Trouble], trusted: bool) -> None:
        """Add the findings of one host check."""
        self.troubles.extend(troubles)
        self.trusted = trusted

    def take(self) -> tuple[list[Trouble], bool | None]:
        """Remove and return the troubles and whether the TSC is trusted."""
        taken = list(self.troubles), self.trusted
        self.troubles.clear()
        self.trusted = None
        return taken


class Ticker:
    """Calls each clock's tick() every `interval_s` from threads of its own; a context manager.

    interval_s: from 1 ms to MAX_AGE_S seconds; divided by the rate of the fastest clock, which ages faster.
    watch_host: also check the host once a round, and apply the findings to the clocks that run on its TSC (see
    GuestClock.apply_host_findings()).  A late round is not repeated; later rounds keep the schedule.

    A clock whose source, backend or on_dirty does not return is `stuck`: it is not ticked again until it returns, and
    from the next round on another thread ticks the others.

    Thread-safety: all methods may be called from any thread.
    """

    def __init__(self, *clocks: GuestClock, interval_s: float = 1.0, watch_host: bool = True) -> None:
        if not SHORTEST_S <= number("interval_s", interval_s) <= MAX_AGE_S:
            raise RangeError(
                f"interval_s is {shown(interval_s)}; from {SHORTEST_S:g} to {MAX_AGE_S:g}, or pages get too old"
            )
        self.interval_s = interval_s
        self._watch_host = flag("watch_host", watch_host)
        self._failures: deque[TickFailure] = deque(maxlen=FAILURES_KEPT)
        self._workers = Workers(self._tick)
        self._lock = threading.Lock()  # guards the fields below; never taken while a clock ticks
        self._clocks = {instance("clocks", clock, GuestClock): _PendingFindings() for clock in clocks}
        self._schedule: _ScheduleThread | None = None  # any other one ends
        self._begun: set[_ScheduleThread] = set()  # whose threads may still run
        renew_in_children(self)

    def begin_anew(self) -> None:
        """See HasLock: in a child of fork() the ticker is stopped."""
        self._lock = threading.Lock()
        self._schedule = None
        self._begun = set()

    @property
    def has_threads(self) -> bool:
        """True while any thread of this ticker runs.  After stop() only a tick that does not return keeps one."""
        return any(each.thread.is_alive() for each in tuple(self._begun)) or self._workers.has_threads

    @property
    def rounds(self) -> int:
        """Rounds completed; a round skips stuck clocks."""
        return self._workers.rounds

    def add(self, clock: GuestClock) -> None:
        """Tick `clock` from the next round on.  Adding it again changes nothing."""
        instance("clock", clock, GuestClock)
        with self._lock:
            self._clocks.setdefault(clock, _PendingFindings())

    def remove(self, clock: GuestClock) -> None:
        """Stop ticking `clock`; a tick under way completes.  StateError if it was not added."""
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
        """The clocks whose tick has run for more than 50 ms."""
        return self._workers.stuck

    def start(self) -> None:
        """Start, with a round at once.  StateError, with nothing done, if running or if no thread can start."""
        with self._lock:
            if self._schedule is not None:
                raise StateError("start", "the ticker is running", "stop() it first")
            schedule = _ScheduleThread(self._keep_schedule)
            self._begun.add(schedule)
            try:
                self._workers.begin()
                begin(schedule.thread, "start")
                self._schedule = schedule
            except BaseException:
                self._workers.dismiss()
                raise

    def stop(self, timeout_s: float = STOP_S) -> None:
        """Stop, and return when no tick runs, except one that calls this.  Does nothing if stopped.

        StateError, naming the clock, if a tick has not ended after timeout_s; the ticker is stopped then, and start()
        works.  RangeError for timeout_s.  If a signal handler's exception interrupts it, call it again.
        """
        check_timeout(timeout_s)
        until_s = time.monotonic() + timeout_s
        with self._lock:
            self._schedule = None
            begun, left = tuple(self._begun), self._workers.dismiss()
        for schedule in begun:
            schedule.wake_up.call()
            if schedule.thread.is_alive():
                schedule.thread.join(max(until_s - time.monotonic(), 0))
        with self._lock:
            self._begun = {each for each in self._begun if each.thread.is_alive() or each is self._schedule}
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

    def _keep_schedule(self, schedule: _ScheduleThread) -> None:
        watches: dict[int, HostWatch] = {}  # by TSC frequency; a watch belongs to one thread
        due_s = time.monotonic()
        while (clocks := self._clocks_of(schedule)) is not None:
            self._check_host(clocks, watches)
            with self._collect_failure(None):
                self._workers.hand_out(clocks)
            interval_s = max(self.interval_s / max([1.0, *(float(clock.rate) for clock in clocks)]), SHORTEST_S)
            due_s += interval_s
            if (late_s := time.monotonic() - due_s) > 0:
                due_s += (late_s // interval_s + 1) * interval_s
            schedule.wake_up.wait(max(due_s - time.monotonic(), 0))

    def _clocks_of(self, schedule: _ScheduleThread) -> tuple[GuestClock, ...] | None:
        """The clocks to tick; None if `schedule` has been replaced or stopped."""
        with self._lock:
            return tuple(self._clocks) if self._schedule is schedule else None

    def _check_host(self, clocks: tuple[GuestClock, ...], watches: dict[int, HostWatch]) -> None:
        """Check the host, and queue the findings for each clock: applying them may block, so its tick does it."""
        on_host = [clock for clock in clocks if not isinstance(clock.backend.counter, SimulatedCounter)]
        for tsc_hz in {clock.backend.tsc_hz for clock in on_host} | set(watches) if self._watch_host else ():
            with self._collect_failure(None):
                troubles = self._check(tsc_hz, watches)
                with self._lock:
                    for clock in on_host:
                        if clock.backend.tsc_hz == tsc_hz and clock in self._clocks:
                            self._clocks[clock].add(troubles, watches[tsc_hz].tsc_trusted)

    def _check(self, tsc_hz: int, watches: dict[int, HostWatch]) -> list[Trouble]:
        """The host's troubles since the last round; the first check finds none."""
        if tsc_hz not in watches:
            watches[tsc_hz] = HostWatch(tsc_hz, interval_ns=round(self.interval_s * NS_PER_S))
            return []
        return watches[tsc_hz].check()

    # Inside, on a thread that ticks

    def _tick(self, clock: GuestClock) -> None:
        with self._lock:
            if clock not in self._clocks:  # removed since the round began
                return
            troubles, trusted = self._clocks[clock].take()
        if trusted is not None:
            with self._collect_failure(clock):
                clock.apply_host_findings(troubles, tsc_trusted=trusted)
        with self._collect_failure(clock):
            clock.tick()

    @contextmanager
    def _collect_failure(self, clock: GuestClock | None) -> Iterator[None]:
        """Append what is raised to `failures`, so that neither other clocks nor the thread suffer from it."""
        try:
            yield
        except BaseException as error:  # noqa: BLE001  # SystemExit from a source, too
            self._failures.append(TickFailure(clock, error))


class _ScheduleThread:
    """The thread that begins rounds, from one start() to its stop()."""

    def __init__(self, target: Callable[[_ScheduleThread], None]) -> None:
        self.wake_up = WakeUp()
        self.thread = threading.Thread(target=target, args=(self,), name="pvclock-ticker", daemon=True)
