"""A machine's timers in guest time: what its VMM does at an instant of its guest's.

Input, a shutdown or an event of the host's, scheduled so, comes when the guest's clock says so: later by a pause,
sooner by a skip, and at a tenth of the rate after ten times as long.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final
from weakref import ref

from pvclock.arguments import function, instance, whole
from pvclock.errors import RangeError, StateError
from pvclock.kvm import Runner
from pvclock.machine.run_state import RunState, RunStates
from pvclock.quantities import NS_PER_S, U64_MASK, GuestNs, shown
from pvclock.threads import WakeUp, begin, check_timeout, renew_in_children, wake_precisely
from pvclock.timekeeping.timers import Firing, Timer, Timers

if TYPE_CHECKING:
    from pvclock.machine.clock_service import ClockService
    from pvclock.machine.time_travel import TimeTravel

__all__ = ["GuestTimer", "GuestTimers"]

LONGEST_S: Final = 3600.0
"""Of a sleep; then the time left is asked anew."""
LOOK_AGAIN_S: Final = 50e-6
"""Until settle() does."""
SHORTEST_S: Final = 50e-6
"""Of one before a timer that is not due: a clock that counts execution time may stand still just before it."""
ARRIVAL_S: Final = 0.05
"""How long a travel waits at most, the vCPUs out, for what is due where it has arrived: a callback may pause or stop
the machine, which waits for the travel in its turn."""
DUE_NS: Final = 0
"""next_due_ns() while a timer is due, or its callback runs."""


class GuestTimer:
    """One deadline, made by GuestTimers.at(); read only.

    guest_ns: the guest time at which it is due.  callback: None once it was called or cancelled, so that a timer that
    is kept does not keep that alive.
    """

    __slots__ = ("_timer", "callback", "guest_ns")

    def __init__(self, guest_ns: GuestNs, callback: Callable[[], object]) -> None:
        self.guest_ns = guest_ns
        self.callback: Callable[[], object] | None = callback
        self._timer: Timer | None = None

    @property
    def active(self) -> bool:
        """Will it be called?  No longer in its callback."""
        return self.callback is not None

    def __repr__(self) -> str:
        return f"GuestTimer(guest_ns={self.guest_ns}, active={self.active})"


class GuestTimers:
    """The timers of a machine whose clock is `service`'s, whose vCPUs are `runner`'s, and which may `travel`.

    Guest time is clock_service.now_ns(), in ns since the clock began; it goes on after a reset().  Callbacks are called
    without arguments, in the order of their times and then of adding, one after the other, on a thread of their own and
    without a lock: they may call all methods of the machine and of this.  They are called while the machine runs; what
    has become due before start() or in a pause is called once it does.  A machine that travels in time stops at each,
    and does not go on before its callback has returned (docs/time-travel.md).

    What a callback raises ends the run, as what a device raises does: Machine.wait() raises it.  Timers that were not
    called stay for the next start().  They are not part of a saved clock, and stay when the machine is rolled back:
    one that was called is not called again.

    Thread-safety: all methods may be called from any thread.
    """

    def __init__(self, service: ClockService, runner: Runner, run_state: RunStates, travel: TimeTravel) -> None:
        self._service = service
        self._runner = runner
        self._run_state = run_state
        self._wake_up = WakeUp()  # clock and run state have this alone: threads of theirs must not keep callbacks alive
        self._lock = threading.Lock()  # of all that follows; never taken around a callback
        self._timers = Timers()
        self._due: deque[GuestTimer] = deque()
        self._is_calling = False
        self._is_closed = False
        self._thread: threading.Thread | None = None
        self._tell_travel = travel.notify
        me = ref(self)  # the travel's thread must not keep callbacks alive either
        travel.next_event, travel.on_arrival = partial(_next_due_ns, me), partial(_settle, me)
        service.tell_of_time(self._wake_up.call)
        run_state.add_handler(partial(_wake, self._wake_up))
        renew_in_children(self)

    def begin_anew(self) -> None:
        """See HasLock: in a child of fork() nothing calls them."""
        self._lock = threading.Lock()
        self._is_calling = False
        self._thread = None

    def at(self, guest_ns: int, callback: Callable[[], object]) -> GuestTimer:
        """Call `callback` once guest time has come to `guest_ns`; at once if it has.

        RangeError outside 0 to 2^64 - 1; StateError once the machine is closed, or if there is no thread for it.
        """
        timer = GuestTimer(GuestNs(whole("guest_ns", guest_ns, 0, U64_MASK)), function("callback", callback))
        with self._lock:
            self._check_open("at")
            self._begin_thread("at")
            timer._timer = self._timers.add(timer.guest_ns, partial(self._take, timer))  # noqa: SLF001  # its maker
        self.changed()
        self._tell_travel()
        return timer

    def after(self, ns: int, callback: Callable[[], object]) -> GuestTimer:
        """at(), `ns` of guest time from now.  RangeError if negative, or beyond the 2^64 ns of guest time."""
        ns = whole("ns", ns, 0)
        end_ns = self._service.now_ns() + ns
        if end_ns > U64_MASK:
            raise RangeError(f"after({shown(ns)}): a guest's clock ends at 2^64 ns")
        return self.at(end_ns, callback)

    def cancel(self, timer: GuestTimer) -> bool:
        """Do not call it; False if it was called, is being called, or was cancelled."""
        instance("timer", timer, GuestTimer)
        with self._lock:
            was_active, timer.callback = timer.active, None
            if timer._timer is not None:  # noqa: SLF001  # its maker
                self._timers.remove(timer._timer)  # noqa: SLF001
        self._tell_travel()
        return was_active

    def next_due_ns(self) -> int | None:
        """The guest time in ns up to which the VMM does nothing to its guest by a timer; None if none is set.

        It is 0 while one is due or its callback runs.  Timers of the guest's clock interface are among them.
        """
        due_ns = self.own_due_ns(), self._service.next_timer_ns()
        return min((each for each in due_ns if each is not None), default=None)

    def own_due_ns(self) -> int | None:
        """next_due_ns(), of what at() has set alone; neither waits for the clock's lock nor for the vCPUs."""
        with self._lock:
            return DUE_NS if self._is_calling or self._due else self._timers.next_due_ns

    def changed(self) -> None:
        """Look anew how long it is to the next timer: for who moves guest time without the engine's clock."""
        self._wake_up.call()

    def settle(self, timeout_s: float) -> bool:
        """Wait for the callbacks of all timers that are due; False if they have not returned after timeout_s.

        Returns at once where none may be called: the machine does not run, or this is a callback's own thread.
        """
        check_timeout(timeout_s)
        self._wake_up.call()
        until_s = time.monotonic() + timeout_s
        while self._is_due() and threading.current_thread() is not self._thread:
            if time.monotonic() >= until_s:
                return False
            time.sleep(LOOK_AGAIN_S)  # a lock here would be one that a callback's own call could wait for
        return True

    def close(self) -> None:
        """Call nothing any more; a callback that runs is not waited for.  May be called again."""
        self._is_closed = True
        self._wake_up.call()

    # Inside

    def _check_open(self, operation: str) -> None:
        if self._is_closed:
            raise StateError(operation, "the machine is closed", "make another machine")

    def _begin_thread(self, operation: str) -> None:
        if self._thread is None or not self._thread.is_alive():
            has_gone = self._wake_up.call
            wake_up = self._wake_up
            begun = partial(_run, ref(self, lambda _: has_gone()), wake_up)
            self._thread = threading.Thread(target=begun, name="pvclock-machine-timers", daemon=True)
            begin(self._thread, operation)

    def _is_due(self) -> bool:
        """Is a callback running, or to be called now?"""
        with self._lock:
            if self._is_calling:
                return True
            due_ns = self._timers.next_due_ns
            return self._may_call() and (bool(self._due) or (due_ns is not None and due_ns <= self._service.now_ns()))

    # On the thread

    def expire(self) -> float | None:
        """Call what is due; returns the seconds of the host until it is worth to look again, None until a change.

        For the thread alone.
        """
        try:
            while (callback := self._next_callback()) is not None:
                callback()
                self._tell_travel()
            return self._host_s_left()
        except BaseException as failure:  # noqa: BLE001  # wait() raises it, SystemExit too
            if not self._runner.gate.has_ended():
                self._runner.fail(failure)
            return None
        finally:
            self._is_calling = False

    @property
    def is_over(self) -> bool:
        """Was it closed?"""
        return self._is_closed

    def _next_callback(self) -> Callable[[], object] | None:
        """The next one that is due, which is taken; None if none is, or may not be called now."""
        with self._lock:
            self._is_calling = False
            if not self._may_call():
                return None
            self._advance()
            while self._due:
                callback, self._due[0].callback = self._due[0].callback, None
                self._due.popleft()
                if callback is not None:  # cancelled since
                    self._is_calling = True
                    return callback
        return None

    def _advance(self) -> None:
        now = GuestNs(self._service.now_ns())
        if now < self._timers.now:  # the machine was rolled back, or the kernel's clock has stepped
            self._timers.rewind(now)
        self._timers.advance(now)

    def _take(self, timer: GuestTimer, _firing: Firing) -> None:
        self._due.append(timer)

    def _may_call(self) -> bool:
        is_running = self._run_state.current is RunState.RUNNING  # it comes last in start()
        return is_running and not self._is_closed and not self._runner.gate.has_ended()

    def _host_s_left(self) -> float | None:
        with self._lock:
            due_ns = self._timers.next_due_ns
        if due_ns is None or not self._may_call():
            return None
        left_ns = self._service.host_ns_until(due_ns)
        return None if left_ns is None else min(max(left_ns / NS_PER_S, SHORTEST_S), LONGEST_S)


def _next_due_ns(timers: ref[GuestTimers]) -> int | None:
    """For a travel: see TimeTravel.next_event."""
    present = timers()
    return None if present is None else present.own_due_ns()


def _settle(timers: ref[GuestTimers], _arrival: object) -> None:
    """For a travel: what is due where it arrives is done before the guest runs, unless it waits for the guest."""
    if (present := timers()) is not None:
        present.settle(ARRIVAL_S)


def _wake(wake_up: WakeUp, _before: object, _now: object) -> None:
    """A handler of the run state."""
    wake_up.call()


def _run(timers: ref[GuestTimers], wake_up: WakeUp) -> None:
    """While it sleeps the thread has no timers, so that a dropped machine ends it."""
    wake_precisely()
    while (present := timers()) is not None and not present.is_over:
        left_s = present.expire()
        del present
        wake_up.wait(left_s)
