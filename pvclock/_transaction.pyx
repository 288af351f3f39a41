"""One change of a clock at a time, whole before anybody is told of it.

Compiled, so that no KeyboardInterrupt falls between taking the lock and the body of a `with`, or between the body and
giving the lock back: signals are handled where Python code runs, and here that is in callbacks only.
"""

cimport cython
from cpython.pythread cimport PyThread_get_thread_ident

from pvclock._memory cimport GuestMemory, graver

from threading import RLock

from pvclock.errors import StateError


@cython.final
@cython.no_gc_clear
cdef class Transaction:
    """A context manager in which one thread changes a clock in `memory`; others wait.  It may be nested.

    At the end of the outermost `with`: the memory's on_dirty is told of what this thread wrote in it, the lock still
    held, so that who pauses a clock and then takes its dirty log misses nothing; then the lock is given back; then
    `after()` is called.  All three come whatever happens: where the body raised, that comes out, with what on_dirty and
    then after() raised as notes; else the first of these does.  But an interrupt comes out before any error.

    on_dirty may call back into the clock, whose state is whole by then; what it writes is told, too.

    lock: the lock itself, for those who only read; nobody is told when it is given back.

    Thread-safety: one object is for all threads.
    """

    cdef readonly object lock
    cdef GuestMemory _memory
    cdef object _after
    cdef object _acquire, _release
    cdef int _depth
    cdef unsigned long _owner  # the thread, while _depth is not 0

    def __cinit__(self, GuestMemory memory not None, after: object) -> None:
        self._memory, self._after = memory, after
        self.lock = RLock()
        self._acquire, self._release = self.lock.acquire, self.lock.release

    def __enter__(self) -> Transaction:
        self._acquire()
        self._depth += 1
        if self._depth == 1:
            self._owner = PyThread_get_thread_ident()
            try:
                self._memory.defer()
            except BaseException:
                self._depth = 0
                self._release()
                raise
        return self

    def __exit__(self, kind: object, raised: object, traceback: object) -> bool:
        if self._depth == 0 or self._owner != PyThread_get_thread_ident():
            raise StateError("Transaction.__exit__", "this thread is in none", "use a with statement")
        if self._depth > 1:
            self._depth -= 1
            self._release()
            return False
        error = self._end(raised)
        if error is not raised:
            raise error
        return False

    cdef object _end(self, error):
        """Tell, give the lock back, and tell who waits for that; returns the error that is to come out, if any."""
        try:
            self._memory.tell()
        except BaseException as told:
            error = graver(error, told)
        self._depth = 0
        self._release()
        try:
            self._after()
        except BaseException as told:
            error = graver(error, told)
        return error
