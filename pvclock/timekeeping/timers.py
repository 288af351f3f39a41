"""Timers in guest time: one-shot and periodic deadlines, and Palacios' update callbacks.

The clock's owner calls advance() with guest time, and again when guest time reaches `next_due_ns`; so timers follow
pause, skip and dilation.  This module reads no clock and never waits.

After a jump a periodic timer has missed periods; each timer declares how to handle them: `Merge`, `Once` or `Replay`.
Under each of these one advance() calls a timer at most once, however far the jump and however short the period that a
guest chose.

Guest time ends at 2^64 - 1 ns.  A periodic timer whose next call would come later ends, and its owed periods count as
dropped.

Source: Palacios vmm_time.c (v3_add_timer, v3_update_timers) and vmm_timeout.c; the policies are pvclock's own.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Final, NamedTuple, TypeAlias

from pvclock.arguments import flag, function, instance, whole
from pvclock.errors import RangeError, StateError, WrongType
from pvclock.quantities import U64_MASK, GuestNs

__all__ = ["Firing", "Merge", "Missed", "Once", "Replay", "Share", "Timer", "Timers", "VcpuTimeouts"]

STALE_MAX: Final = 16
"""A queue is purged once entries of removed timers exceed the live timers by this many."""


class Share(NamedTuple):
    """How one call splits the ended periods: it covers `periods`, `dropped` get no call, the rest stay owed.

    pause_ns: least guest time until the next call.
    """

    periods: int
    dropped: int
    pause_ns: int


class Merge(NamedTuple):
    """One call covers all missed periods and gets their number."""

    def share(self, ended: int) -> Share:
        """Cover all `ended` periods."""
        return Share(ended, 0, 0)


class Once(NamedTuple):
    """One call for the oldest missed period; it drops the others and gets their number."""

    def share(self, ended: int) -> Share:
        """Cover one of `ended` periods, drop the others."""
        return Share(1, ended - 1, 0)


class Replay(NamedTuple):
    """Each missed period gets its own call, oldest first, at least spacing_ns of guest time apart.

    spacing_ns: 1 to period - 1, so that the timer catches up.  Periods that end meanwhile queue behind the owed ones.
    One advance() delivers at most one period, so calling it later than `next_due_ns` slows the replay down.
    """

    spacing_ns: int

    def share(self, ended: int) -> Share:
        """Cover one of `ended` periods; the others stay owed."""
        return Share(1, 0, self.spacing_ns)


Missed: TypeAlias = Merge | Once | Replay
"""How a timer handles missed periods."""

MERGE: Final = Merge()
START: Final = GuestNs(0)


class Firing(NamedTuple):
    """The argument of a timer's callback.

    deadline_ns: end of the oldest period that this call covers.  late_ns: now - deadline_ns.  periods: how many it
    covers.  owed: ended periods still to be delivered.  dropped: ended periods that never will be.
    """

    timer: Timer
    deadline_ns: GuestNs
    late_ns: int
    periods: int
    owed: int
    dropped: int


TimerCallback: TypeAlias = Callable[[Firing], object]
UpdateCallback: TypeAlias = Callable[[int, int], object]


class Timer:
    """One deadline, made by Timers.add(); read only.

    deadline_ns: end of the oldest undelivered period, or of the last one once the timer ended.  due_ns: the earliest
    time of its next call, after the deadline while periods are replayed.  Neither exceeds 2^64 - 1.  period_ns: None
    for one-shot.  callback: None once the timer ended, so that a kept timer does not keep its callback alive.
    """

    __slots__ = ("callback", "deadline_ns", "due_ns", "missed", "period_ns", "serial")

    def __init__(
        self, serial: int, deadline_ns: GuestNs, callback: TimerCallback, period_ns: int | None, missed: Missed
    ) -> None:
        self.serial = serial
        self.deadline_ns = deadline_ns
        self.due_ns = deadline_ns
        self.callback: TimerCallback | None = callback
        self.period_ns = period_ns
        self.missed = missed

    @property
    def active(self) -> bool:
        """Will it fire again?  A one-shot timer is already inactive in its callback."""
        return self.callback is not None

    def __repr__(self) -> str:
        return f"Timer(deadline_ns={self.deadline_ns}, period_ns={self.period_ns}, active={self.active})"


class Timers:
    """The timers of one VM or one vCPU; guest time is `now` ns until the first advance().

    cycles, cycles_hz: for update callbacks, the guest's cycle count now and its frequency in Hz.  The count is
    Palacios' monotonic one: 64 bits, never wraps, unaffected by the guest's TSC writes.
    newest_update_first: run update callbacks newest first, as Palacios does; the default is the order of adding.

    Callbacks may add and remove timers and updates, themselves included; added ones first run at the next advance(),
    even if already due.

    Thread-safety: none; the owner of the clock calls under its own lock.
    """

    def __init__(
        self,
        now: GuestNs = START,
        *,
        cycles: int = 0,
        cycles_hz: int | None = None,
        newest_update_first: bool = False,
    ) -> None:
        self._now = GuestNs(whole("now", now, 0, U64_MASK))
        self._cycles = whole("cycles", cycles, 0, U64_MASK)
        self._cycles_hz = None if cycles_hz is None else whole("cycles_hz", cycles_hz, 1, U64_MASK)
        self._newest_update_first = flag("newest_update_first", newest_update_first)
        self._updates: list[UpdateCallback] = []  # in call order
        self._timers: dict[int, Timer] = {}
        self._serial = 0
        self._advancing = False
        # Heaps of (due_ns, serial), one entry a timer.  Ints only: entries of removed timers keep no callback alive.
        self._queue: list[tuple[int, int]] = []
        self._firing: list[tuple[int, int]] = []

    @property
    def now(self) -> GuestNs:
        """Guest time of the last advance(), in ns; in a callback, of the running one."""
        return self._now

    @property
    def next_due_ns(self) -> GuestNs | None:
        """Guest time in ns at which the next timer is due, possibly in the past; None without timers.

        At most 2^64 - 1.
        """
        heads = [queue[0][0] for queue in (self._firing, self._queue) if self._clean_head(queue)]
        return GuestNs(min(heads)) if heads else None

    def __len__(self) -> int:
        return len(self._timers)

    def add(
        self,
        deadline_ns: GuestNs,
        callback: TimerCallback,
        *,
        period_ns: int | None = None,
        missed: Missed = MERGE,
    ) -> Timer:
        """Call `callback` at guest time deadline_ns, and every period_ns after it if given.

        deadline_ns: 0 to 2^64 - 1; a past one fires at the next advance().  period_ns: 1 to 2^64 - 1.  RangeError
        outside these, and for a Replay that could not catch up.
        """
        deadline_ns = GuestNs(whole("deadline_ns", deadline_ns, 0, U64_MASK))
        function("callback", callback)
        if not isinstance(missed, Merge | Once | Replay):
            raise WrongType("missed", missed, "a Merge, Once or Replay")
        if period_ns is not None:
            period_ns = whole("period_ns", period_ns, 1, U64_MASK)
        if isinstance(missed, Replay):
            if period_ns is None:
                raise RangeError("missed is a Replay, but a one-shot timer has no period to replay")
            what = f"spacing_ns, replaying a period of {period_ns} ns,"
            missed = Replay(whole(what, missed.spacing_ns, 1, period_ns - 1))
        timer = self._timers[self._serial] = Timer(self._serial, deadline_ns, callback, period_ns, missed)
        self._serial += 1
        heappush(self._queue, (timer.due_ns, timer.serial))
        return timer

    def remove(self, timer: Timer) -> bool:
        """Remove `timer` and its owed periods; False if it ended, was removed, or belongs to other Timers."""
        if self._timers.get(instance("timer", timer, Timer).serial) is not timer:
            return False
        del self._timers[timer.serial]
        timer.callback = None
        # Finding the heap entry takes a search; leave it until it reaches the head or stale entries predominate.
        if len(self._queue) > 2 * len(self._timers) + STALE_MAX:
            self._queue[:] = [entry for entry in self._queue if entry[1] in self._timers]
            heapify(self._queue)
        return True

    def add_update(self, callback: UpdateCallback) -> None:
        """Call `callback(elapsed cycles, frequency in Hz)` at every advance(), before timers fire.

        Elapsed cycles count from the previous advance(), for a new callback too.  StateError without `cycles_hz`.
        """
        function("callback", callback)
        if self._cycles_hz is None:
            raise StateError("add_update", "the frequency of the cycles is unknown", "pass cycles_hz to Timers")
        self._updates.insert(0 if self._newest_update_first else len(self._updates), callback)

    def remove_update(self, callback: UpdateCallback) -> bool:
        """Undo one add_update() of `callback`; False if there is none."""
        if function("callback", callback) not in self._updates:
            return False
        self._updates.remove(callback)
        return True

    def clear(self) -> None:
        """Remove all timers and updates and drop their callbacks; a running advance() calls none of them any more."""
        for timer in self._timers.values():
            timer.callback = None
        for kept in (self._timers, self._updates, self._queue, self._firing):
            kept.clear()

    def rewind(self, now: GuestNs) -> None:
        """Take guest time back to `now` ns, as when a machine is rolled back; deadlines stay, and nothing fires again.

        RangeError outside 0 to the present `now`; StateError if a callback calls this.
        """
        if self._advancing:
            raise StateError(
                "rewind", f"callbacks of the advance to {self._now} ns are running", "return from them first"
            )
        self._now = GuestNs(whole("now", now, 0, self._now))

    def advance(self, now: GuestNs, cycles: int | None = None) -> int:
        """Fire what is due at guest time `now` ns and guest cycle count `cycles`; return how many timers fired.

        Calls go in order of due_ns, then of adding.  `now` may stand still.  RangeError if either goes back or beyond
        2^64 - 1; StateError if a callback calls this, or if there are updates and no `cycles`.  Errors change nothing.

        A callback's exception does not stop the others: advance() raises the first after all calls, with the rest as
        notes, and the timer continues as if its callback had returned.  KeyboardInterrupt and the like pass through at
        once; the timers not yet called are called at the next advance().
        """
        elapsed_cycles = self._step_to(now, cycles)
        errors: list[Exception] = []
        fired = 0
        self._advancing = True
        try:
            while self._queue and self._queue[0][0] <= self._now:
                self._firing.append(heappop(self._queue))  # comes out sorted, which is a heap too
            self._update(elapsed_cycles, errors)
            while self._clean_head(self._firing):
                self._fire(self._timers[heappop(self._firing)[1]], errors)
                fired += 1
        except BaseException as stop:
            self._noted(stop, errors)
            raise
        finally:
            while self._firing:
                heappush(self._queue, self._firing.pop())
            self._advancing = False
        if errors:
            raise self._noted(errors.pop(0), errors)
        return fired

    def _step_to(self, now: GuestNs, cycles: int | None) -> int:
        """Set time and cycles and return the cycles elapsed; or raise and change nothing."""
        if self._advancing:
            raise StateError(
                "advance", f"callbacks of the advance to {self._now} ns are running", "return from them first"
            )
        if cycles is None and self._updates:
            raise StateError("advance", f"{len(self._updates)} update callbacks and no cycles", "pass the cycle count")
        now = GuestNs(whole("now", now, 0, U64_MASK))
        cycles = self._cycles if cycles is None else whole("cycles", cycles, 0, U64_MASK)
        if now < self._now:
            raise RangeError(f"guest time went backwards: it was {self._now} ns and is {now} ns")
        if cycles < self._cycles:
            raise RangeError(f"the guest's cycles went backwards or wrapped: they were {self._cycles} and are {cycles}")
        elapsed = cycles - self._cycles
        self._now, self._cycles = now, cycles
        return elapsed

    def _noted(self, raised: BaseException, others: list[Exception]) -> BaseException:
        """Add the others to the exception as notes.  Empties the list, which their tracebacks' frame refers to."""
        for other in others:
            raised.add_note(f"in the same advance to {self._now} ns another callback raised {other!r}")
        others.clear()
        return raised

    def _update(self, elapsed_cycles: int, errors: list[Exception]) -> None:
        for callback in tuple(self._updates):
            if callback in self._updates:  # an earlier one may have removed it
                _call(errors, callback, elapsed_cycles, self._cycles_hz)

    def _fire(self, timer: Timer, errors: list[Exception]) -> None:
        """Call a due timer.  Re-arms or removes it first, so that its callback sees the final state."""
        callback = timer.callback
        firing, is_rearmed = _expire(timer, self._now)
        if is_rearmed:
            heappush(self._queue, (timer.due_ns, timer.serial))
        else:
            self.remove(timer)
        _call(errors, callback, firing)

    def _clean_head(self, queue: list[tuple[int, int]]) -> bool:
        """Drop entries of removed timers from the head of `queue`; return whether a timer is left."""
        while queue and queue[0][1] not in self._timers:
            heappop(queue)
        return bool(queue)


class VcpuTimeouts:
    """Palacios' timeouts: at most one active a vCPU; a second one is refused.

    Deadlines are guest time in ns; Palacios counts cycles.  To run for N ms of guest time, set one for each vCPU at
    that deadline, whose callback keeps the vCPU out of the guest.
    """

    def __init__(self, timers: Timers) -> None:
        self._timers = instance("timers", timers, Timers)
        self._of_vcpu: dict[int, Timer] = {}

    def add(self, vcpu: int, deadline_ns: GuestNs, callback: TimerCallback) -> Timer:
        """Call `callback` once at guest time deadline_ns (as for Timers.add()); it may set the next timeout.

        StateError while the vCPU has an active one.
        """
        vcpu = whole("vcpu", vcpu)
        deadline_ns = GuestNs(whole("deadline_ns", deadline_ns, 0, U64_MASK))
        present = self._of_vcpu.get(vcpu)
        if present is not None and present.active:
            raise StateError(
                f"timeout of vCPU {vcpu} at {deadline_ns} ns",
                f"one is active until {present.deadline_ns} ns",
                "remove it or wait for it",
            )
        timer = self._of_vcpu[vcpu] = self._timers.add(deadline_ns, callback)
        return timer

    def remove(self, vcpu: int) -> bool:
        """Remove vCPU's timeout; False if none was active."""
        timer = self._of_vcpu.pop(whole("vcpu", vcpu), None)
        return timer is not None and self._timers.remove(timer)


def _expire(timer: Timer, now: GuestNs) -> tuple[Firing, bool]:
    """Account for the periods of `timer` that ended by `now`, and move its deadline past those covered or dropped.

    Returns the callback's argument, and whether there will be another call: none for a one-shot timer, or beyond
    2^64 - 1 ns.
    """
    deadline_ns, late_ns = timer.deadline_ns, now - timer.deadline_ns
    if timer.period_ns is None:
        return Firing(timer, deadline_ns, late_ns, 1, 0, 0), False
    ended = late_ns // timer.period_ns + 1
    periods, dropped, pause_ns = timer.missed.share(ended)
    # Move by whole periods, so that lateness never shifts the grid.
    next_deadline_ns = deadline_ns + (periods + dropped) * timer.period_ns
    next_due_ns = max(next_deadline_ns, now + pause_ns)
    if next_due_ns > U64_MASK:
        return Firing(timer, deadline_ns, late_ns, periods, 0, ended - periods), False
    timer.deadline_ns, timer.due_ns = GuestNs(next_deadline_ns), GuestNs(next_due_ns)
    return Firing(timer, deadline_ns, late_ns, periods, ended - periods - dropped, dropped), True


def _call(errors: list[Exception], callback: Callable[..., object] | None, *arguments: object) -> None:
    if callback is None:  # never so for a queued timer; for the type checker
        return
    try:
        callback(*arguments)
    except Exception as error:  # noqa: BLE001 - advance() raises it when all have been called
        errors.append(error)
