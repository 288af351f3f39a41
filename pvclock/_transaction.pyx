"""One change of a clock at a time, whole before anybody is told of it.

Compiled, so that no KeyboardInterrupt falls between taking the lock and the body of a `with`, or between the body and
giving the lock back: signals are handled where Python code runs, and here that is in callbacks only.
"""

cimport cython
from libc.stdint cimport uint64_t

from pvclock._memory cimport GuestMemory, fork_count, graver, this_thread

from operator import attrgetter

from pvclock.errors import StateError

cdef object newest = attrgetter("last")
cdef int INTERRUPTS_MAX = 1000  # of one call; beyond that it is no signal that raises them


@cython.final
@cython.no_gc_clear
cdef class Transaction:
    """A context manager in which one thread changes a clock in `memory`; others wait.  It may be nested.

    At the end of the outermost `with`: the memory's on_dirty is told of what this thread wrote in it, the lock still
    held, so that who pauses a clock and then takes its dirty log misses nothing; then the lock is given back; then
    `after()` is called.  All three come whatever happens: where the body raised, that comes out, with what on_dirty and
    then after() raised as notes; else the first of these does.  But an interrupt comes out before any error.

    on_dirty may call back into the clock, whose state is whole by then; what it writes is told, too.

    A memory has one live clock: once a transaction has been taken over from by another one's take_over(), entering it
    is a StateError.  They have one lock, so neither begins while the other is under way.

    lock: the lock itself, for those who only read; nobody is told when it is given back.

    Thread-safety: one object is for all threads.
    """

    cdef GuestMemory _memory
    cdef object _after
    cdef object _token  # in the memory while this is its live clock's; None before take_over()
    cdef int _depth
    cdef uint64_t _owner  # the thread, while _depth is not 0

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
        if self._owner != this_thread():  # and who left it in the middle did so in the parent of a fork()
            self._depth = 0
        self._depth += 1
        if self._depth == 1:
            self._owner = this_thread()
            try:
                self._memory.defer()
            except BaseException:
                self._depth = 0
                self._memory.clock_lock.release()
                raise
        return self

    def __exit__(self, kind: object, raised: object, traceback: object) -> bool:
        if self._depth == 0 or self._owner != this_thread():
            raise StateError("Transaction.__exit__", "this thread is in none", "use a with statement")
        if self._depth > 1:
            self._depth -= 1
            self._memory.clock_lock.release()
            return False
        error = self._end(raised)
        if error is not raised:
            raise error
        return False

    def take_over(self, token: object) -> object:
        """From now on this is the transaction of the memory's live clock, `token`; returns that of the one before."""
        with self.lock:
            before = self._memory.live_clock
            self._token = self._memory.live_clock = token
        return before

    cdef object _end(self, error):
        """Tell, give the lock back, and tell who waits for that; returns the error that is to come out, if any."""
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
    """Whose turn is it to do what one at a time may?  `with turns.take() as is_mine`: who is first; others go without.

    Nobody waits, so it may be taken before a lock or within it.  In a child of fork() it is nobody's.
    """

    cdef bint _taken
    cdef uint64_t _forks  # when it was taken

    def take(self) -> Turn:
        """A context manager; False where it is another's turn, or this thread's already."""
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


def commit(publish: object, change: object, take: object, events: object = None) -> None:
    """Publish, have what changes by that, and record it, as one step that no interrupt takes apart.

    `publish()` returns the host TSC from which on the change holds, and raises before anything has changed, or not at
    all.  `change(tsc)` then returns the new state and the events, `take(state)` makes that the present one, and
    `events.record(event)` is called for each, if any.  An interrupt that comes meanwhile comes out when all is done:
    what it broke off is called again, so `change` is pure and `take` does nothing the second time.
    """
    cdef list interrupts = []
    tsc = publish()
    state, recorded = to_the_end(change, tsc, interrupts)
    to_the_end(take, state, interrupts)
    for event in recorded:
        record_once(events, event, interrupts)
    if interrupts:
        raise interrupts[0]


def attempt(begin: object, undo: object, operation: object) -> object:
    """Call `begin()`, then `operation(reached)`, and return what that returns; where it was not reached, `undo()`.

    `begin` is what must be changed before the operation, and `undo` what takes that back, as far as it was done.
    `reached()` is called by the operation, once or more, when it cannot fail any more: what it raises afterwards, an
    interrupt included, comes out with everything changed.  No interrupt takes `undo` apart, so it is asked again.
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
    """Return what `operation()` does, once `end()` was called, whatever happened.

    An interrupt that comes in `end` comes out when that is done: it is called again, until it returns.
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
    """Record the event; what an interrupt broke off is done again, unless the event is there."""
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
    """Call the function until it returns: again after each interrupt, which is kept; an Exception comes out."""
    for _ in range(INTERRUPTS_MAX):
        try:
            return function(argument)
        except Exception:
            raise
        except BaseException as interrupt:
            interrupts.append(interrupt)
    raise interrupts[0]
