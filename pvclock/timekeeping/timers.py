"""Timers in guest time: one-shot and periodic deadlines, and Palacios' update callbacks.

Guest time is handed in, so a timer follows pause, skip and dilation by itself: whoever owns the clock calls advance()
with the guest's time, and again when guest time reaches `next_due_ns`.  No clock is read here and nothing waits.

After a jump a periodic timer has missed periods.  What becomes of them is declared with the timer: `Merge`, `Once` or
`Replay`.  Under each of them one advance() makes at most one call a timer, so that no jump, however far and however
short the period that a guest chose, lets loose a storm.

Guest time ends at 2^64 - 1 ns.  A periodic timer whose next call would come after that has had its last one: it ends,
and what it still owed counts as dropped.

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
"""So many entries of removed timers a queue may always hold; beyond that, as many as there are timers in it."""


class Share(NamedTuple):
    """What one call makes of the periods that have ended: it stands for `periods`, `dropped` get none, the rest wait.

    pause_ns: guest time before the next call, at least.
    """

    periods: int
    dropped: int
    pause_ns: int


class Merge(NamedTuple):
    """One call stands for all periods missed, and is told how many."""

    def share(self, ended: int) -> Share:
        """All `ended` periods go with this call."""
        return Share(ended, 0, 0)


class Once(NamedTuple):
    """One call for the oldest period missed; the others are dropped, and the call is told how many."""

    def share(self, ended: int) -> Share:
        """One of `ended` periods goes with this call."""
        return Share(1, ended - 1, 0)


class Replay(NamedTuple):
    """Each period missed gets its own call, oldest first, spacing_ns of guest time apart or more.

    spacing_ns: from 1 to below the period, so that the timer catches up in the end.  Periods that end meanwhile wait
    behind those that are owed.  An advance() gives one period at most: one that comes later than `next_due_ns` replays
    more slowly.
    """

    spacing_ns: int

    def share(self, ended: int) -> Share:
        """One of `ended` periods goes with this call; the others are owed."""
        return Share(1, 0, self.spacing_ns)


Missed: TypeAlias = Merge | Once | Replay
"""What becomes of missed periods."""

MERGE: Final = Merge()
START: Final = GuestNs(0)


class Firing(NamedTuple):
    """What a timer's callback is told.

    deadline_ns: when the oldest of its periods ended.  late_ns: how long ago that was.  periods: how many it stands
    for, from that one on.  owed: how many have ended besides and will be delivered.  dropped: how many never will be.
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
    """One deadline, made by Timers.add() and to be read only.

    deadline_ns: the end of the oldest period not yet delivered, or the last one of a timer that has ended.  due_ns:
    when its call may come, which is later than the deadline while periods are replayed.  Neither exceeds 2^64 - 1.
    period_ns: None for one-shot.  callback: None once there will be no
    further call, so that a timer kept does not keep what its callback holds.
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
        """Will it fire (again)?  A one-shot timer is no longer active when its callback is called."""
        return self.callback is not None

    def __repr__(self) -> str:
        return f"Timer(deadline_ns={self.deadline_ns}, period_ns={self.period_ns}, active={self.active})"


class Timers:
    """The timers of one VM or one vCPU; guest time is `now` ns until the first advance().

    cycles, cycles_hz: for update callbacks, the guest's cycle count now and its frequency in Hz.  The count is
    Palacios' monotonic one: 64 bits that never wrap and do not move with the guest's writes of its TSC.
    newest_update_first: the order in which update callbacks run.  Palacios puts a new one at the front of its list, so
    that its updates run so; the default is the order in which they were added.

    Callbacks may add and remove timers and updates, themselves included; what they add is called from the next
    advance() on, even if it is due already.

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
        self._updates: list[UpdateCallback] = []  # in the order of their calls
        self._timers: dict[int, Timer] = {}
        self._serial = 0
        self._advancing = False
        # Heaps of (due_ns, serial), one entry a timer: ints only, so that entries of removed timers keep nothing alive.
        self._queue: list[tuple[int, int]] = []
        self._firing: list[tuple[int, int]] = []

    @property
    def now(self) -> GuestNs:
        """Guest time of the last advance(), in ns; within a callback, of this one."""
        return self._now

    @property
    def next_due_ns(self) -> GuestNs | None:
        """The guest time in ns at which advance() will have a timer to fire, past or not; None without timers.

        Never more than 2^64 - 1: a timer that would be due later has ended.
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
        """Call `callback` when guest time is deadline_ns, and with period_ns at each multiple of it from there on.

        deadline_ns: 0 to 2^64 - 1; one that is past fires at the next advance().  period_ns: 1 to 2^64 - 1.  RangeError
        beyond these, and for a Replay that could not catch up.
        """
        deadline_ns = GuestNs(whole("deadline_ns", deadline_ns, 0, U64_MASK))
        function("callback", callback)
        if not isinstance(missed, Merge | Once | Replay):
            raise WrongType("missed", missed, "a Merge, Once or Replay")
        if period_ns is not None:
            period_ns = whole("period_ns", period_ns, 1, U64_MASK)
        if isinstance(missed, Replay):
            if period_ns is None:
                raise RangeError("missed is a Replay, for a one-shot timer: it has no period to replay")
            what = f"spacing_ns, replaying a period of {period_ns} ns,"
            missed = Replay(whole(what, missed.spacing_ns, 1, period_ns - 1))
        timer = self._timers[self._serial] = Timer(self._serial, deadline_ns, callback, period_ns, missed)
        self._serial += 1
        heappush(self._queue, (timer.due_ns, timer.serial))
        return timer

    def remove(self, timer: Timer) -> bool:
        """Take `timer` away, and what it is owed; False if it has expired, was removed or is another's."""
        if self._timers.get(instance("timer", timer, Timer).serial) is not timer:
            return False
        del self._timers[timer.serial]
        timer.callback = None
        # An entry is found only by search, so it stays until it comes up or such entries are the most.
        if len(self._queue) > 2 * len(self._timers) + STALE_MAX:
            self._queue[:] = [entry for entry in self._queue if entry[1] in self._timers]
            heapify(self._queue)
        return True

    def add_update(self, callback: UpdateCallback) -> None:
        """Call `callback(elapsed cycles, frequency in Hz)` at every advance(), before timers fire.

        Cycles elapse since the advance before, also for a new callback.  StateError without a `cycles_hz`.
        """
        function("callback", callback)
        if self._cycles_hz is None:
            raise StateError("add_update", "the frequency of the cycles is not known", "give Timers its cycles_hz")
        self._updates.insert(0 if self._newest_update_first else len(self._updates), callback)

    def remove_update(self, callback: UpdateCallback) -> bool:
        """Take back one add_update() of `callback`; False if there is none."""
        if function("callback", callback) not in self._updates:
            return False
        self._updates.remove(callback)
        return True

    def clear(self) -> None:
        """Remove all timers and updates; no callback is kept, and none is called any more, not even in this advance."""
        for timer in self._timers.values():
            timer.callback = None
        for kept in (self._timers, self._updates, self._queue, self._firing):
            kept.clear()

    def advance(self, now: GuestNs, cycles: int | None = None) -> int:
        """Guest time is `now` ns, the guest's cycle count `cycles`: fire what is due, and return how many timers fired.

        The order is that in which calls became due (deadlines, but for replays); equal ones go as they were added.
        `now` may stand still.  RangeError if either goes back or beyond 2^64 - 1, StateError if a callback calls or if
        there are updates and no `cycles`; then nothing has changed.

        A callback's exception does not stop the others: the first is raised when all have been called, the rest are
        in its notes, and a timer goes on as if its callback had returned.  A KeyboardInterrupt or the like comes out
        at once, and timers not yet called are called at the next advance().
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
        """Take over the time, and return the cycles since the last one; or raise, with nothing changed."""
        if self._advancing:
            raise StateError(
                "advance", f"callbacks of the advance to {self._now} ns are running", "return from them first"
            )
        if cycles is None and self._updates:
            raise StateError(
                "advance", f"{len(self._updates)} update callbacks and no cycles", "hand in the cycle count"
            )
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
        """The exception with the others in its notes.  The list is left empty: its frame is in their tracebacks."""
        for other in others:
            raised.add_note(f"in the same advance to {self._now} ns another callback raised {other!r}")
        others.clear()
        return raised

    def _update(self, elapsed_cycles: int, errors: list[Exception]) -> None:
        for callback in tuple(self._updates):
            if callback in self._updates:  # else one before it has removed it
                _call(errors, callback, elapsed_cycles, self._cycles_hz)

    def _fire(self, timer: Timer, errors: list[Exception]) -> None:
        """Call a timer that is due.  It is re-armed or removed first, so that its callback finds it as it will be."""
        callback = timer.callback
        firing, goes_on = _expire(timer, self._now)
        if goes_on:
            heappush(self._queue, (timer.due_ns, timer.serial))
        else:
            self.remove(timer)
        _call(errors, callback, firing)

    def _clean_head(self, queue: list[tuple[int, int]]) -> bool:
        """Drop the entries of removed timers from the head of `queue`; is a timer left?"""
        while queue and queue[0][1] not in self._timers:
            heappop(queue)
        return bool(queue)


class VcpuTimeouts:
    """Palacios' timeouts: one active for each vCPU, and a second one is refused.

    Deadlines are guest time in ns where Palacios counts cycles.  Run for N ms of guest time: one for each vCPU at that
    deadline, each of which keeps its vCPU out of the guest.
    """

    def __init__(self, timers: Timers) -> None:
        self._timers = instance("timers", timers, Timers)
        self._of_vcpu: dict[int, Timer] = {}

    def add(self, vcpu: int, deadline_ns: GuestNs, callback: TimerCallback) -> Timer:
        """Call `callback` once when guest time is deadline_ns; it may set the next.

        StateError while one is active; deadline_ns is as for Timers.add().
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
        """Take vCPU's timeout away; False if none was active."""
        timer = self._of_vcpu.pop(whole("vcpu", vcpu), None)
        return timer is not None and self._timers.remove(timer)


def _expire(timer: Timer, now: GuestNs) -> tuple[Firing, bool]:
    """Account for the periods of `timer` that have ended by `now`, and move it on by those that are settled.

    Returns what to tell, and whether there will be another call: none for a one-shot timer or beyond guest time's end.
    """
    deadline_ns, late_ns = timer.deadline_ns, now - timer.deadline_ns
    if timer.period_ns is None:
        return Firing(timer, deadline_ns, late_ns, 1, 0, 0), False
    ended = late_ns // timer.period_ns + 1
    periods, dropped, pause_ns = timer.missed.share(ended)
    # A whole number of periods on: lateness never shifts the grid.
    next_deadline_ns = deadline_ns + (periods + dropped) * timer.period_ns
    next_due_ns = max(next_deadline_ns, now + pause_ns)
    if next_due_ns > U64_MASK:
        return Firing(timer, deadline_ns, late_ns, periods, 0, ended - periods), False
    timer.deadline_ns, timer.due_ns = GuestNs(next_deadline_ns), GuestNs(next_due_ns)
    return Firing(timer, deadline_ns, late_ns, periods, ended - periods - dropped, dropped), True


def _call(errors: list[Exception], callback: Callable[..., object] | None, *arguments: object) -> None:
    if callback is None:  # no timer in the queue; a type checker does not know
        return
    try:
        callback(*arguments)
    except Exception as error:  # noqa: BLE001 - advance() raises it when all have been called
        errors.append(error)
