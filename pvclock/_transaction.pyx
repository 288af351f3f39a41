"""Transactions: one change of a clock at a time, complete before anything is reported.

Compiled, so that no KeyboardInterrupt arrives between taking the lock and the body of a `with`, or between the body and
releasing the lock: signals are handled where Python code runs, which here is in callbacks only.
"""

cimport cython
from libc.stdint cimport uint64_t

from pvclock._memory cimport GuestMemory, fork_count, graver, this_thread

from operator import attrgetter

from pvclock.errors import StateError

cdef object newest = attrgetter("last")
cdef int INTERRUPTS_MAX = 1000  # of one call; more than that do not come from signals


@cython.final
@cython.no_gc_clear
cdef class Transaction:
    """A context manager in which one thread changes a clock in `memory` while others wait.  Nests.

    The outermost `with` ends in three steps, whatever happens.  It reports what this thread wrote to the memory's
    on_dirty while it still has the lock, so a caller that pauses a clock and then reads its dirty log misses nothing;
    it releases the lock; it calls `after()`.  It raises the body's error, else on_dirty's, else after()'s, with later
    ones as notes; an interrupt takes precedence over any error.

    on_dirty may call back into the clock, whose state is complete by then; its own writes are reported too.

    A memory has one live clock: after another transaction's take_over(), entering this one is a StateError.  All
    transactions of a memory share one lock, so none begins while another runs.

    lock: the lock itself, for readers; releasing it triggers neither on_dirty nor after().
    count: what was found in one transaction still holds while this is the same.

    Thread-safety: one object serves all threads.
    """

    def __cinit__(self, GuestMemory memory not None, after: object) -> None:
        self._memory, self._after = memory, after

    @property
    def lock(self) -> object:
        return self._memory.clock_lock

    def __enter__(self) -> Transaction:
        self._memory.clock_lock.acquire()
        if self._token is not None and self._memory.live_clock is not self._token:
            self._memory.clock_lock.release()
            raise StateError("use of this clock", "another clock has taken over this one's memory", "use that clock")
        if self._owner != this_thread():  # then a non-zero _depth is left over from the parent of a fork()
            self._depth = 0
        self._depth += 1
        if self._depth == 1:
            self._owner = this_thread()
            self.count += 1
            try:
                self._memory.defer()
            except BaseException:
                self._depth = 0
                self._memory.clock_lock.release()
                raise
        return self

    def __exit__(self, kind: object, raised: object, traceback: object) -> bool:
        if self._depth == 0 or self._owner != this_thread():
            raise StateError("Transaction.__exit__", "this thread has not entered it", "use a with statement")
        if self._depth > 1:
            self._depth -= 1
            self._memory.clock_lock.release()
            return False
        error = self._end(raised)
        if error is not raised:
            raise error
        return False

    cdef bint try_enter(self) except -1:
        """Enter for a small change, until leave(): False if that has to wait, nests, or has an on_dirty to be told.

        It does not count: who makes such changes knows them.
        """
        cdef bint is_taken
        if self._memory._on_dirty is not None or not self._memory.clock_lock.acquire(False):
            return False
        is_taken = self._token is not None and self._memory.live_clock is not self._token
        if is_taken or (self._depth and self._owner == this_thread()):
            self._memory.clock_lock.release()
            return False
        self._depth, self._owner = 1, this_thread()
        return True

    cdef int leave(self) except -1:
        self._depth = 0
        self._memory.clock_lock.release()
        return 0

    def take_over(self, token: object) -> object:
        """Make `token` the memory's live clock, with this as its transaction; return the previous live clock."""
        with self.lock:
            before = self._memory.live_clock
            self._token = self._memory.live_clock = token
        return before

    cdef object _end(self, error):
        """Report dirty ranges, release the lock, call after(); return the error to raise, or None."""
        dirty = None
        try:
            self._memory.tell()
        except BaseException as told:
            dirty = told
        self._depth = 0
        self._memory.clock_lock.release()
        error = graver(error, dirty)
        try:
            self._after()
        except BaseException as told:
            error = graver(error, told)
        return error


@cython.final
cdef class Turns:
    """A try-lock for an operation that one thread at a time may do: `with turns.take() as is_mine`.

    take() never waits, so it may come before or within a lock.  In a child of fork() it is free.
    """

    cdef bint _taken
    cdef uint64_t _forks  # when it was taken

    def take(self) -> Turn:
        """A context manager that yields whether this turn was free; False also if this thread has it already."""
        return Turn(self)


@cython.final
cdef class Turn:
    """See Turns.take()."""

    cdef Turns _turns
    cdef bint _is_mine

    def __cinit__(self, Turns turns not None) -> None:
        self._turns = turns

    def __enter__(self) -> bool:
        if not self._is_mine and not (self._turns._taken and self._turns._forks == fork_count()):
            self._is_mine = self._turns._taken = True
            self._turns._forks = fork_count()
            return True
        return False

    def __exit__(self, *exc_info: object) -> None:
        if self._is_mine:
            self._is_mine = self._turns._taken = False


def commit(publish: object, change: object, take: object, events: object = None, told: object = None) -> None:
    """Publish, compute the new state, install and record it, as one step that no interrupt splits.

    `publish()` returns the host TSC from which the change takes effect; it may raise only before anything has changed.
    `change(tsc)` returns the new state and the events, `take(state)` installs the state, and `events.record(event)`
    runs for each event.  `told(state)`, if given, runs when all is installed and recorded.  An interrupt is raised
    when all is done; the call that it broke off is repeated, so `change` must be pure, `take` and `told` idempotent.
    """
    cdef list interrupts = []
    tsc = publish()
    state, recorded = to_the_end(change, tsc, interrupts)
    to_the_end(take, state, interrupts)
    for event in recorded:
        record_once(events, event, interrupts)
    if told is not None:
        to_the_end(told, state, interrupts)
    if interrupts:
        raise interrupts[0]


def attempt(begin: object, undo: object, operation: object) -> object:
    """Call `begin()`, then return `operation(reached)`; on an error before `reached()`, call `undo()`.

    `begin` prepares the operation; `undo` reverts as much of that as was done.  The operation calls `reached()`, once
    or more, when it can no longer fail; errors and interrupts after that pass through with everything changed.  An
    interrupted `undo` is called again.
    """
    cdef list was_reached = [], interrupts = []
    reached = was_reached.append
    try:
        begin()
        return operation(lambda: reached(True))
    except BaseException as error:
        if not was_reached:
            to_the_end(lambda _: undo(), None, interrupts)
        for interrupt in interrupts:
            error = graver(error, interrupt)
        raise error


def finish(operation: object, end: object) -> object:
    """Call `operation()`, then `end()` even after an error, and return the operation's result.

    An interrupted `end` is called again until it returns; the interrupt is raised afterwards.
    """
    cdef list interrupts = []
    result = error = None
    try:
        result = operation()
    except BaseException as raised:
        error = raised
    try:
        to_the_end(lambda _: end(), None, interrupts)
    except BaseException as raised:
        error = graver(error, raised)
    for interrupt in interrupts:
        error = graver(error, interrupt)
    if error is not None:
        raise error
    return result


cdef int record_once(events, event, list interrupts) except -1:
    """Record the event; after an interrupt, repeat unless the log already has the event."""
    last = to_the_end(newest, events, interrupts)
    for _ in range(INTERRUPTS_MAX):
        try:
            events.record(event)
            return 0
        except Exception:
            raise
        except BaseException as interrupt:
            interrupts.append(interrupt)
        for found in to_the_end(events.read, last, interrupts).events:
            if found._replace(sequence=event.sequence) == event:
                return 0
    raise interrupts[0]


cdef object to_the_end(function, argument, list interrupts):
    """Call the function until it returns, again after each interrupt, which it collects; Exceptions pass through."""
    for _ in range(INTERRUPTS_MAX):
        try:
            return function(argument)
        except Exception:
            raise
        except BaseException as interrupt:
            interrupts.append(interrupt)
    raise interrupts[0]
