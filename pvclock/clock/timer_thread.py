"""Expires the timers of a guest's clock interface from a thread of its own, as they come due."""

from __future__ import annotations

import threading
import time
from collections import deque
from types import TracebackType
from typing import Final, Self
from weakref import ref

from pvclock._counter import SimulatedCounter
from pvclock.arguments import instance
from pvclock.clock.guest_clock import GuestClock
from pvclock.errors import ConfigError, StateError
from pvclock.quantities import NS_PER_S
from pvclock.threads import WakeUp, begin, check_timeout, renew_in_children, wake_precisely

__all__ = ["TimerThread"]

FAILURES_KEPT: Final = 16

REST_NS: Final = 20_000
"""Least rest between two expiries, so that no guest takes a host CPU by timers that are always due."""

STANDING_NS: Final = 200_000
"""The same on a counter that may stand still, and tells nobody when it goes on: how often it is looked at."""

RETRY_NS: Final = 100_000_000
"""After an error: the VMM's service may work again, or a clock that was taken over from be live again."""

LONGEST_NS: Final = 3600 * NS_PER_S

LOOK_AGAIN_S: Final = 50e-6
"""Until settle() does."""

STOP_S: Final = 5.0
"""stop()'s default timeout, in seconds."""


class TimerThread:
    """Calls clock.expire_timers() whenever a timer of the guest's interface is due; a context manager.

    It sleeps until then in host time, at the clock's present rate, and is woken where timers or time change.  After an
    expiry it rests for as long as that took, 20 us or more: however many vCPUs have timers that are always due, they
    take half a host CPU at most.  Only a change, such as a write by the guest, ends a rest early.  It ends with its
    clock, if that is dropped.  ConfigError for a clock on a simulated backend, whose time is set by hand:
    call expire_timers() after that.

    Thread-safety: all methods may be called from any thread.
    """

    def __init__(self, clock: GuestClock) -> None:
        self._clock = instance("clock", clock, GuestClock)
        if isinstance(clock.backend.counter, SimulatedCounter) and clock.backend.counter_follows_host:
            raise ConfigError("a TimerThread on a simulated backend; call expire_timers() where its time changes")
        self._failures: deque[BaseException] = deque(maxlen=FAILURES_KEPT)
        self._lock = threading.Lock()  # guards the fields below
        self._present: _Rounds | None = None  # any other one ends
        self._begun: set[_Rounds] = set()  # whose threads may still run
        renew_in_children(self)

    def begin_anew(self) -> None:
        """See HasLock: in a child of fork() it is stopped."""
        self._lock = threading.Lock()
        self._present = None
        self._begun = set()

    @property
    def is_running(self) -> bool:
        """True from start() to stop()."""
        return self._present is not None

    @property
    def has_threads(self) -> bool:
        """True while its thread runs.  After stop() only a delivery that does not return keeps it."""
        return any(each.thread.is_alive() for each in tuple(self._begun))

    @property
    def is_delivering(self) -> bool:
        """True while it looks which timers are due, and until what they cause is done."""
        rounds = self._present
        return rounds is not None and rounds.is_delivering

    @property
    def failures(self) -> tuple[BaseException, ...]:
        """The last 16 errors of expire_timers(), oldest first."""
        return tuple(self._failures)

    def start(self) -> None:
        """Start; what is due expires at once.  StateError, with nothing done, if running or if no thread can start."""
        with self._lock:
            if self._present is not None:
                raise StateError("start", "the timer thread is running", "stop() it first")
            rounds = _Rounds(self._clock, self._failures)
            self._begun.add(rounds)
            try:
                self._clock.timers.watch(rounds.wake_up.call)
                begin(rounds.thread, "start")
                self._present = rounds
            except BaseException:
                self._end(rounds)
                raise

    def stop(self, timeout_s: float = STOP_S) -> None:
        """Stop, and return when nothing is being delivered, except by a delivery that calls this.

        Does nothing if stopped.  StateError if a delivery has not ended after timeout_s; it is stopped then, and
        start() works.  RangeError for timeout_s.  If a signal handler's exception interrupts it, call it again.
        """
        check_timeout(timeout_s)
        with self._lock:
            self._present = None
            begun = tuple(self._begun)
            for rounds in begun:
                self._end(rounds)
        for rounds in begun:
            if rounds.thread.is_alive() and rounds.thread is not threading.current_thread():
                rounds.thread.join(timeout_s)
        with self._lock:
            self._begun = {each for each in self._begun if each.thread.is_alive() or each is self._present}
            left = self._begun - {self._present}
        if any(each.thread is not threading.current_thread() for each in left):
            state = f"a delivery has not ended after {timeout_s:g} s"
            raise StateError("stop", state, "the VMM's inject() must return, and so must on_dirty")

    def settle(self, timeout_s: float = STOP_S) -> bool:
        """Wait for the delivery that is under way, if any; False if it has not ended after timeout_s.

        After GuestClock.pause() and this, no timer raises an interrupt or writes a message before resume().  That is
        all: a hypercall whose handler is under way may still send its interrupts.  Within a delivery it does not wait.
        """
        check_timeout(timeout_s)
        rounds = self._present
        if rounds is None or rounds.thread is threading.current_thread():
            return True
        until_s = time.monotonic() + timeout_s
        while rounds.is_delivering:  # it takes microseconds; a lock here is one that an interrupt could leave taken
            if time.monotonic() >= until_s:
                return False
            time.sleep(LOOK_AGAIN_S)
        return True

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _end(self, rounds: _Rounds) -> None:
        rounds.is_over = True
        self._clock.timers.unwatch(rounds.wake_up.call)
        rounds.wake_up.call()


class _Rounds:
    """The thread from one start() to its stop(); it has neither the TimerThread nor, while it sleeps, the clock."""

    def __init__(self, clock: GuestClock, failures: deque[BaseException]) -> None:
        self.is_over = False
        self.wake_up = WakeUp()
        self.is_delivering = False
        self.thread = threading.Thread(target=self._run, name="pvclock-timers", daemon=True)
        self._failures = failures
        self._rest_ns = REST_NS if clock.backend.counter_follows_host else STANDING_NS
        wake_up = self.wake_up
        self._clock = ref(clock, lambda _: wake_up.call())

    def _run(self) -> None:
        wake_precisely()
        while not self.is_over and (clock := self._clock()) is not None:
            began_ns = time.monotonic_ns()
            self.is_delivering = True  # before the clock is asked whether it is paused: see settle()
            ns = self._expire(clock)
            self.is_delivering = False
            del clock
            rest_ns = max(self._rest_ns, time.monotonic_ns() - began_ns)
            self.wake_up.wait(min(max(ns, rest_ns), LONGEST_NS) / NS_PER_S)

    def _expire(self, clock: GuestClock) -> int:
        """Expire what is due; returns the host ns until the next timer."""
        try:
            clock.expire_timers()
            ns = clock.timers.host_ns_left()
        except BaseException as error:  # noqa: BLE001  # SystemExit from a service, too
            self._failures.append(error)
            return RETRY_NS
        return LONGEST_NS if ns is None else ns
