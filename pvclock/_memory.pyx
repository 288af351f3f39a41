"""A VM's memory: buffers at guest-physical addresses, and dirty reports of what pvclock writes there.

The GIL is this module's lock and guards addresses: one from find() is valid until Python code can run, which
allocating, dropping or calling an object may cause.  So functions convert arguments first and make results last;
between find() and the last use of its address there is plain C.  Code that releases the GIL while it uses an address
pins the slots.
"""

cimport cython
from cpython.buffer cimport (
    PyBUF_CONTIG, PyBUF_CONTIG_RO, PyBUF_FORMAT, PyBuffer_Release, PyObject_GetBuffer
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals, PyErr_Clear, PyErr_Occurred
from cpython.bool cimport PyBool_Check
from cpython.long cimport PyLong_CheckExact
from cpython.number cimport PyNumber_Index
from libc.stdint cimport UINT64_MAX, uint8_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memmove, strchr

from threading import RLock

from pvclock.errors import ConfigError, GuestAddressError, RangeError, StateError, WrongType
from pvclock.threads import renew_in_children

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "Python.h":
    ctypedef struct PyThreadState
    PyThreadState *PyThreadState_Get() noexcept
    uint64_t PyThreadState_GetID(PyThreadState *state) noexcept
    uint64_t as_unsigned "PyLong_AsUnsignedLongLong" (object number) noexcept

cdef extern from "<pthread.h>" nogil:
    ctypedef void (*fork_handler)() noexcept nogil
    int pthread_atfork(fork_handler prepare, fork_handler parent, fork_handler child)

# Buffer formats allowed as guest memory, in struct's codes: bytes and plain numbers, no pointers, objects, structures.
cdef const char *PLAIN_FORMATS = b"cbB?hHiIlLqQnNefd"

# Rounds in which on_dirty may itself write to guest memory before tell() takes that as endless.
cdef int TELL_ROUNDS = 64

cdef uint64_t forks = 0  # from the process that loaded this module down to this one


cdef void count_fork() noexcept nogil:
    global forks
    forks += 1


if pthread_atfork(NULL, NULL, count_fork) != 0:
    raise MemoryError


cdef uint64_t fork_count() noexcept:
    """Number of fork()s from the process that loaded this module down to this one."""
    return forks


cdef uint64_t this_thread() noexcept:
    """A number that is unique for ever: threading's ident may be reused once a thread has ended."""
    return PyThreadState_GetID(PyThreadState_Get())


# Arguments


cdef object as_whole(object value, str what):
    """`value` as an int; WrongType unless it has __index__(), and for a bool."""
    if PyLong_CheckExact(value):
        return value
    try:
        if not PyBool_Check(value):
            return PyNumber_Index(value)
    except TypeError:
        pass
    raise WrongType(what, value, "a whole number") from None


cdef uint64_t as_u64(object value, str what) except? 0:
    number = value if PyLong_CheckExact(value) else as_whole(value, what)
    cdef uint64_t found = as_unsigned(number)
    if found == UINT64_MAX and PyErr_Occurred() is not NULL:  # without a try block, which would cost as much again
        PyErr_Clear()
        raise RangeError(f"{what} is {number:#x}; it must fit in 64 bits, unsigned")
    return found


cdef str shortened(object number):
    """A whole number for a message: hex from 2^64 on, since Python refuses very long decimals."""
    return str(number) if -1 << 64 < number < 1 << 64 else hex(number)


# Errors


cdef object graver(object error, object later):
    """Choose which of two errors to raise: the first, but an interrupt before an Exception.  Adds the other as a note.

    Raises nothing itself, since the caller may hold a lock: an interrupt in here is returned like the other errors.
    """
    if error is None or later is None or error is later:
        return later if error is None else error
    if not isinstance(later, Exception) and isinstance(error, Exception):
        error, later = later, error
    try:
        error.add_note(f"and there was {later!r}")
    except Exception:  # the errors may be user classes, whose repr may do anything
        pass
    except BaseException as interrupt:
        return interrupt if isinstance(error, Exception) else error
    return error


# Memory


@cython.final
@cython.internal
@cython.no_gc_clear  # a reference to this protects pointers into the buffer, so the collector must not drop it
cdef class Slot:
    """A buffer mapped at a guest-physical address; keeps the buffer alive."""

    cdef Py_buffer view
    cdef uint64_t gpa
    cdef uint64_t length

    def __cinit__(self, uint64_t gpa, buffer: object) -> None:
        try:
            PyObject_GetBuffer(buffer, &self.view, PyBUF_CONTIG | PyBUF_FORMAT)
        except TypeError:
            raise WrongType("buffer", buffer, "a writable, contiguous buffer: a bytearray, an mmap") from None
        except (BufferError, ValueError) as error:  # NumPy and a closed mmap say ValueError
            raise ConfigError(f"guest memory needs a writable, contiguous buffer: {error}") from None
        if not is_plain(self.view.format):
            raise ConfigError(f"guest memory needs a buffer of bytes or plain numbers, not of format "
                              f"{self.view.format.decode('ascii', 'replace')!r}")
        self.gpa = gpa
        self.length = self.view.len
        if self.length == 0 or self.length - 1 > UINT64_MAX - gpa:
            raise ConfigError(f"slot {gpa:#x}+{self.length}: it must not be empty and must end by 2^64")

    def __dealloc__(self) -> None:
        PyBuffer_Release(&self.view)  # a no-op if never acquired

    cdef bint overlaps(self, Slot other):
        return other.gpa - self.gpa < self.length or self.gpa - other.gpa < other.length


cdef bint is_plain(const char *format) noexcept:
    """Is a buffer's format one plain type, with or without a byte order?  NULL means bytes."""
    if format is NULL:
        return True
    if format[0] != 0 and strchr(b"@=<>!", format[0]) is not NULL:
        format += 1
    return format[0] != 0 and format[1] == 0 and strchr(PLAIN_FORMATS, format[0]) is not NULL


@cython.final
cdef class Deferral:
    """Ranges that one thread wrote and has not reported to on_dirty yet."""

    def __cinit__(self) -> None:
        self.ranges = {}


@cython.final
@cython.no_gc_clear  # users detect stale pointers by its generation, so the collector must not clear its slots
cdef class GuestMemory:
    """A VM's guest-physical memory: writable buffers mapped at addresses, with holes between them.

    GuestMemory(buffer) maps one buffer at 0; GuestMemory() starts empty.  Every access lies within one slot, else
    GuestAddressError.  pvclock calls `on_dirty(gpa, length)`, if set, for all that it wrote: KVM's dirty log does not
    see writes from user space.  `generation` counts changes of the slots.

    on_dirty runs in the thread that wrote, after all writes; its errors reach the writer's caller after all reports.
    It may call back; its own writes are reported after it returns.

    live_clock: the clock that publishes here; clock_lock: the lock under which it changes (see Transaction).

    Thread-safety: all methods may be called from any thread.  A child of fork() has only the thread that called it: no
    other thread's publish continues there, no other thread holds clock_lock, and the child may close() at once.
    """

    def __cinit__(self) -> None:
        self._slots = ()
        self._deferrals = {}
        self._forks = forks
        self.clock_lock = RLock()
        renew_in_children(self)

    def __init__(self, buffer: object = None) -> None:
        self.close()
        if buffer is not None:
            self.add_slot(0, buffer)

    def add_slot(self, gpa: int, buffer: object) -> None:
        """Map a writable, contiguous buffer of bytes or plain numbers at `gpa`.

        WrongType or ConfigError for any other buffer; ConfigError if it overlaps a slot or ends beyond 2^64.
        """
        cdef Slot new = Slot(as_u64(gpa, "gpa"), buffer)
        cdef Slot slot
        cdef tuple old
        while True:
            old = self._slots
            for slot in old:
                if new.overlaps(slot):
                    raise ConfigError(
                        f"slot {new.gpa:#x}+{new.length} overlaps the slot {slot.gpa:#x}+{slot.length}")
            if self._swap(old, (*old, new)):
                return

    def remove_slot(self, gpa: int) -> None:
        """Unmap the slot that begins at `gpa` and release its buffer; pages in it are no longer published."""
        cdef tuple old
        gpa = as_whole(gpa, "gpa")
        while True:
            old = self._slots
            kept = tuple([slot for slot in old if (<Slot>slot).gpa != gpa])
            if len(kept) == len(old):
                raise GuestAddressError(gpa, 0, "is not the beginning of a slot")
            if self._swap(old, kept):
                return

    def close(self) -> None:
        """Unmap everything.  May be called twice."""
        cdef tuple old
        while True:
            old = self._slots
            if self._swap(old, ()):
                return

    cdef bint _swap(self, tuple old, tuple new) except -1:
        """Replace slots `old` by `new` once no publish uses an address; False if the slots are no longer `old`.

        After the last check of the pins there is plain C, so the change is atomic to all threads.  The caller keeps a
        reference to `old`, so buffers are released after the change: that may run any code and release the GIL.
        """
        self._forget_other_threads()
        while self._pins:
            self._replacing += 1  # keeps new publishes out, so that a stream of them cannot starve this
            with nogil:
                sched_yield()  # the publishing thread needs the GIL to unpin
            self._replacing -= 1
            PyErr_CheckSignals()  # outside _replacing: a handler may publish; an interrupt leaves all unchanged
            self._forget_other_threads()
        if self._slots is not old:
            return False
        self.generation += 1
        self._slots = new
        return True

    def begin_anew(self) -> None:
        """See HasLock: locks and deferred ranges of other threads belong to the parent process."""
        if self.clock_lock.acquire(blocking=False):  # free, or held by this thread
            self.clock_lock.release()
        else:
            self.clock_lock = RLock()
        mine = this_thread()
        self._deferrals = {thread: kept for thread, kept in self._deferrals.items() if thread == mine}

    cdef void _forget_other_threads(self) noexcept:
        """In a child of fork(), reset the pins of the parent's threads."""
        if self._forks != forks:
            self._forks = forks
            self._pins = self._replacing = 0

    cdef int wait_for_slots(self) except -1:
        """Wait for pending changes of the slots; a publish calls it before it looks up pointers."""
        self._forget_other_threads()
        while self._replacing:
            with nogil:
                sched_yield()
            PyErr_CheckSignals()
            self._forget_other_threads()
        return 0

    cdef void pin(self) noexcept:
        """Keep the slots until unpin(); addresses stay valid meanwhile, even without the GIL."""
        self._forget_other_threads()
        self._pins += 1

    cdef void unpin(self) noexcept:
        self._pins -= 1

    def __enter__(self) -> GuestMemory:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def on_dirty(self) -> object:
        """Callback for ranges that pvclock wrote, or None; settable."""
        return self._on_dirty

    @on_dirty.setter
    def on_dirty(self, on_dirty: object) -> None:
        if on_dirty is not None and not callable(on_dirty):
            raise WrongType("on_dirty", on_dirty, "a function of (gpa, length), or None")
        self._on_dirty = on_dirty

    @property
    def slots(self) -> list[tuple[int, int]]:
        """(gpa, length) of each slot, by address."""
        cdef Slot slot
        extents = []
        for slot in self._slots:
            extents.append((slot.gpa, slot.length))
        return sorted(extents)

    cdef uint8_t *find(self, uint64_t gpa, uint64_t length) noexcept:
        """The host address of a guest range, or NULL; valid until Python code can run."""
        cdef uint64_t into
        for slot in self._slots:
            # Subtract, never add: the guest chooses gpa, and gpa + length can wrap.
            into = gpa - (<Slot>slot).gpa
            if into < (<Slot>slot).length and length <= (<Slot>slot).length - into:
                return <uint8_t *>(<Slot>slot).view.buf + into
        return NULL

    cdef uint8_t *at(self, object gpa, uint64_t length) except NULL:
        """find() for an address of any size; GuestAddressError if there is no memory."""
        cdef uint8_t *found = NULL
        gpa = as_whole(gpa, "gpa")
        if 0 <= gpa < 1 << 64:
            found = self.find(gpa, length)
        if found is NULL:
            raise GuestAddressError(gpa, length)
        return found

    def contains(self, gpa: int, length: int) -> bool:
        """Can `length` bytes from `gpa` be read and written?"""
        cdef uint64_t count = as_u64(length, "length")
        gpa = as_whole(gpa, "gpa")
        return 0 <= gpa < 1 << 64 and self.find(gpa, count) is not NULL

    def read(self, gpa: int, length: int) -> bytes:
        """`length` bytes from `gpa`."""
        cdef uint64_t count = as_u64(length, "length")
        gpa = as_whole(gpa, "gpa")
        self.at(gpa, count)  # before allocating: the guest may have chosen the length
        data = PyBytes_FromStringAndSize(NULL, count)
        memcpy(PyBytes_AS_STRING(data), self.at(gpa, count), count)
        return data

    def host_address(self, gpa: int) -> int:
        """Where the byte at `gpa` is in this process, for debuggers that look into it, while its slot is there."""
        return <uintptr_t>self.at(gpa, 1)

    def write(self, gpa: int, data: object) -> None:
        """Write a bytes-like object at `gpa`; GuestAddressError, with nothing written, if it does not fit."""
        cdef Py_buffer view
        gpa = as_whole(gpa, "gpa")
        try:
            PyObject_GetBuffer(data, &view, PyBUF_CONTIG_RO)
        except TypeError:
            raise WrongType("data", data, "a bytes-like object") from None
        except (BufferError, ValueError) as error:
            raise ConfigError(f"write() needs a contiguous bytes-like object: {error}") from None
        try:
            memmove(self.at(gpa, view.len), view.buf, view.len)
            self.mark_dirty(gpa, view.len)
        finally:
            PyBuffer_Release(&view)

    # Dirty reports

    def defer_dirty(self) -> None:
        """Collect the ranges that this thread writes, each once, until tell_dirty().  Nests."""
        self.defer()

    def tell_dirty(self) -> None:
        """End this thread's last defer_dirty(); the outermost call reports the collected ranges to on_dirty, in order.

        Raises on_dirty's first error after all reports, with further ones as notes; an interrupt takes precedence.
        """
        self.tell()

    cdef Deferral defer(self):
        cdef Deferral mine
        cdef uint64_t thread = this_thread()
        mine = self._deferrals.get(thread)
        if mine is None:
            mine = Deferral()
            self._deferrals[thread] = mine
        mine.depth += 1
        return mine

    cdef int mark_dirty(self, uint64_t gpa, uint64_t length) except -1:
        """Report a range that this thread wrote to on_dirty, now or at tell()."""
        if self._on_dirty is None:
            return 0
        cdef Deferral mine = self.defer()
        try:
            mine.ranges[gpa, length] = None
        finally:
            self.tell()
        return 0

    cdef int tell(self) except -1:
        cdef Deferral mine
        cdef uint64_t thread = this_thread()
        mine = self._deferrals.get(thread)
        if mine is None or mine.depth == 0:
            raise StateError("tell_dirty", "this thread defers nothing", "call defer_dirty() first")
        mine.depth -= 1
        if mine.depth or mine.telling:
            return 0  # the outermost call, or the one that is reporting now, will report
        error = None
        if mine.ranges:
            mine.telling = True
            try:
                error = self._tell(mine)
            finally:  # else this thread's later writes would never be reported
                mine.telling = False
                mine.ranges = {}
        if mine.depth == 0:
            self._deferrals.pop(thread, None)
        if error is not None:
            raise error
        return 0

    cdef object _tell(self, Deferral mine):
        """Report all collected ranges, and those that on_dirty writes meanwhile; return the error to raise, or None."""
        error = None
        on_dirty = self._on_dirty  # once: another thread may set it to None at any time
        for _ in range(TELL_ROUNDS):
            ranges, mine.ranges = mine.ranges, {}
            if not ranges or on_dirty is None:
                return error
            for gpa, length in ranges:
                try:
                    on_dirty(gpa, length)
                except BaseException as raised:
                    error = graver(error, raised)
        mine.ranges = {}
        return graver(error, StateError(
            "on_dirty", "it writes to guest memory at each report of a write", "do not write at every report"))
