"""The gate between a VM's vCPU threads and its guest: which vCPUs are in, what keeps them out, is there a run?

Two words decide.  A vCPU stores its `in_guest` and then loads `shut`; a holder changes `shut` and then loads every
`in_guest`.  All of these are sequentially consistent (C11), so one of the two always sees the other, and the way in
takes no lock.  tests/model/gate.pml is the model.

That protocol does not need the GIL.  What does: begin(), renew(), add_vcpu() and take_away(), which change several
words as one step; a Hold's `_taken`; and the calls of request_exit().  Those four keep the GIL from their first change
to their last, start_new_thread() included, which only makes the thread.  This module does not declare itself
free-threaded, so a build of Python without the GIL turns it on when it imports this.

For a signal each method is one step: Python runs signal handlers between bytecodes, and there are none here.  A method
that waits runs them, too, and has changed nothing if one raises.  Dropping a `Hold` gives it back, so no exception can
leave one behind.

Waiting is by futex on `changes`, which every step that may end a wait counts up.
"""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.signal cimport SIG_DFL
from libc.stdint cimport uint32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from posix.signal cimport sigaction, sigaction_t, sigemptyset
from posix.time cimport timespec
from posix.unistd cimport getpid

from pvclock.kvm._fd cimport checked

from _thread import start_new_thread
from time import monotonic

from pvclock.arguments import whole
from pvclock.errors import RangeError, StateError

cdef extern from * nogil:
    """
    #include <limits.h>
    #include <linux/futex.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    static void futex_wait(uint32_t *word, uint32_t seen, const struct timespec *timeout)
    {
        syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, timeout, NULL, 0);
    }

    static void futex_wake_all(uint32_t *word)
    {
        syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
    }

    static uint32_t this_thread(void)
    {
        return (uint32_t)syscall(SYS_gettid);
    }

    /* For a thread that has ended it does nothing; pthread_kill() may crash. */
    static void kick_thread(uint32_t thread, int signum)
    {
        syscall(SYS_tgkill, getpid(), thread, signum);
    }
    """
    void futex_wait(uint32_t *word, uint32_t seen, const timespec *timeout)
    void futex_wake_all(uint32_t *word)
    uint32_t this_thread()
    void kick_thread(uint32_t thread, int signum)

    const int SEQ_CST "__ATOMIC_SEQ_CST"
    uint32_t load "__atomic_load_n"(uint32_t *word, int order)
    void store "__atomic_store_n"(uint32_t *word, uint32_t value, int order)
    uint32_t exchange "__atomic_exchange_n"(uint32_t *word, uint32_t value, int order)
    uint32_t add "__atomic_add_fetch"(uint32_t *word, uint32_t value, int order)
    uint32_t set_bits "__atomic_or_fetch"(uint32_t *word, uint32_t bits, int order)
    uint32_t clear_bits "__atomic_and_fetch"(uint32_t *word, uint32_t kept, int order)

# In `shut`: no vCPU goes in unless it is 0.
cdef enum:
    PAUSED = 1
    ENDED = 2
    CLOSED = 4
    ONE_HOLD = 8  # counted in the bits from here on

# What is waited for.
cdef enum:
    UNTIL_STARTED
    UNTIL_ENDED
    UNTIL_DEPARTED

cdef long LOOK_AGAIN_NS = 10_000_000  # kicks, signals and deadlines are looked at again this often
cdef long NS_PER_S = 1_000_000_000
cdef int SIGNALS = 64


cdef struct Place:
    # A vCPU's own words; 64 bytes, so that no two vCPUs share a cache line of them.
    uint32_t in_guest
    uint32_t thread  # the kernel's id while it can be kicked, else 0
    uint32_t unused[14]


@cython.final
cdef class Gate:
    """The gate of `vcpus`, which can be told to request_exit(); `kick_signal` gets their threads out of KVM_RUN.

    most: how many vCPUs there can be, with those that add_vcpu() brings; by default no more.
    A run lasts from begin() to end(); once all its threads have departed another one can begin, until close().

    Thread-safety: all methods may be called from any thread, but a vCPU's own calls from that vCPU's thread.
    A forked child has none of the threads: there every vCPU is out, and the run is over.
    """

    cdef list _vcpus
    cdef Py_ssize_t _most  # a Place for each of them, because a place never moves
    cdef int _kick_signal
    cdef int _pid
    cdef Place *_places
    cdef uint32_t _shut
    cdef uint32_t _changes
    cdef uint32_t _began  # 1 from begin() to renew()
    cdef uint32_t _runs  # how many have begun, or were forgotten, modulo 2^32
    cdef uint32_t _starting  # 1 from begin() until threads_started()
    cdef uint32_t _threads  # vCPU threads that have not departed

    def __cinit__(self, vcpus: list[object], kick_signal: int, most: int | None = None) -> None:
        self._vcpus = list(vcpus)
        self._most = max(len(self._vcpus), 1 if most is None else most)
        self._kick_signal = kick_signal
        self._pid = getpid()
        self._places = <Place *>calloc(self._most, sizeof(Place))
        if self._places is NULL:
            raise MemoryError

    def __dealloc__(self) -> None:
        free(self._places)

    # Keeping vCPUs out

    def hold(self) -> Hold:
        """A context manager that keeps all vCPUs out of the guest: entered once the last one is out."""
        return Hold(self)

    def pause(self) -> None:
        """Return once no vCPU is in the guest, and let none in before resume(); paused twice is paused.

        If a signal's handler raises meanwhile, the vCPUs run on as before.
        """
        cdef Hold hold = Hold(self)
        hold.take()
        set_bits(&self._shut, PAUSED, SEQ_CST)
        hold.give_back()

    def resume(self) -> None:
        """End pause(): the vCPUs go on once the last hold is given back."""
        clear_bits(&self._shut, ~<uint32_t>PAUSED, SEQ_CST)
        self._tell()

    def is_paused(self) -> bool:
        """Was pause() called, and resume() not since?"""
        return (load(&self._shut, SEQ_CST) & PAUSED) != 0

    def keeps_all_out(self) -> bool:
        """Are all vCPUs out of the guest until resume() or begin(): paused, or without a run?

        A Hold does not count, because it is given back.  Ask within one, and keep it for as long as no vCPU may run: a
        resume() that comes meanwhile lets none in before.
        """
        cdef uint32_t shut = load(&self._shut, SEQ_CST)
        if shut & PAUSED or self.threads() == 0:
            return True
        return bool(shut & ENDED) and not self._inside()

    # The run

    def begin(self, start_threads: Callable[[], None]) -> None:
        """Begin a run: `start_threads`, on a thread of its own, starts one for each vCPU and calls threads_started().

        In one step, which no signal can take apart, as it can Thread.start().  StateError while a run goes on or its
        threads have not departed, and after close(); RuntimeError if there can be no more threads, and then it has
        not begun.
        """
        cdef uint32_t count = len(self._vcpus)
        cdef uint32_t began = load(&self._began, SEQ_CST)
        cdef uint32_t shut = load(&self._shut, SEQ_CST)
        if shut & CLOSED:
            raise StateError("start", "the vCPUs are closed", "make another Runner, or Machine")
        if began and not shut & ENDED:
            raise StateError("start", "the vCPUs run already", "stop() them before")
        if self.threads() or load(&self._starting, SEQ_CST):
            raise StateError("start", "threads of the last run have not ended", "stop() it on another thread")
        store(&self._began, 1, SEQ_CST)
        store(&self._threads, count, SEQ_CST)
        store(&self._starting, 1, SEQ_CST)
        clear_bits(&self._shut, ~<uint32_t>ENDED, SEQ_CST)
        try:
            start_new_thread(start_threads, ())
        except BaseException:
            store(&self._starting, 0, SEQ_CST)
            store(&self._threads, 0, SEQ_CST)
            store(&self._began, began, SEQ_CST)
            set_bits(&self._shut, shut & ENDED, SEQ_CST)
            raise
        add(&self._runs, 1, SEQ_CST)

    def renew(self) -> None:
        """Forget a run that has ended: as before the first one.  StateError while one goes on or has threads.

        Who still waits for anything of that run waits no longer.
        """
        if self.threads() or load(&self._starting, SEQ_CST):
            raise StateError("reset", "the vCPUs have threads", "stop() them before")
        store(&self._began, 0, SEQ_CST)
        if not load(&self._shut, SEQ_CST) & CLOSED:
            clear_bits(&self._shut, ~<uint32_t>ENDED, SEQ_CST)
        add(&self._runs, 1, SEQ_CST)
        self._tell()

    @property
    def vcpus(self) -> tuple[object, ...]:
        """The vCPUs, by number."""
        return tuple(self._vcpus)

    def add_vcpu(self, vcpu: object, start_thread: Callable[[int], None]) -> int:
        """Another vCPU, which gets the next number; in one step.  Returns that number.

        If a run goes on, `start_thread`, on a thread of its own, starts that vCPU's, or calls take_away() if it cannot,
        and then threads_started(); else the next run does it.  StateError if there are `most` already, and while the
        threads of a run are being started; RuntimeError if there can be no more threads, and then it was not added.
        """
        cdef Py_ssize_t number = len(self._vcpus)
        if number >= self._most:
            raise StateError("add_vcpu", f"all {self._most} vCPUs are there", "make the Runner with a larger max_vcpus")
        if load(&self._starting, SEQ_CST):
            raise StateError("add_vcpu", "threads of vCPUs are being started", "wait until start() has returned")
        self._vcpus.append(vcpu)
        if not load(&self._began, SEQ_CST) or load(&self._shut, SEQ_CST) & ENDED:
            return number
        add(&self._threads, 1, SEQ_CST)
        store(&self._starting, 1, SEQ_CST)
        try:
            start_new_thread(start_thread, (number,))
        except BaseException:
            store(&self._starting, 0, SEQ_CST)
            add(&self._threads, <uint32_t>-1, SEQ_CST)
            self._vcpus.pop()
            raise
        return number

    def take_away(self) -> bool:
        """Take the last vCPU away, which could get no thread; True if it was the last that a run waited for."""
        self._vcpus.pop()
        return add(&self._threads, <uint32_t>-1, SEQ_CST) == 0

    def threads_started(self) -> None:
        """Note that each vCPU has its thread, or that depart() or take_away() was called for it."""
        store(&self._starting, 0, SEQ_CST)
        self._tell()

    def end(self) -> None:
        """End the run: no vCPU goes in any more, and those that are in are kicked.  It does not wait for them."""
        set_bits(&self._shut, ENDED, SEQ_CST)
        self._tell()
        self._kick_inside()

    def close(self) -> None:
        """end(), and begin() never again."""
        set_bits(&self._shut, CLOSED, SEQ_CST)
        self.end()

    def wait_until_started(self) -> None:
        """Wait for threads_started()."""
        self._wait_for(UNTIL_STARTED, None)

    def wait_until_ended(self, timeout_s: float | None = None) -> bool:
        """Wait for the end of this run; False if it has not come within `timeout_s`."""
        return self._wait_for(UNTIL_ENDED, timeout_s)

    def wait_until_departed(self) -> None:
        """Wait until no thread of the run is left.  For after end(), and not for a vCPU's own thread."""
        self._wait_for(UNTIL_DEPARTED, None)

    def has_begun(self) -> bool:
        """Has a run begun, since renew()?"""
        return load(&self._began, SEQ_CST) != 0

    def has_ended(self) -> bool:
        """Has the last run ended, or end() come before the first?"""
        return (load(&self._shut, SEQ_CST) & ENDED) != 0

    def threads(self) -> int:
        """How many vCPUs of a run that has begun have not departed."""
        return load(&self._threads, SEQ_CST) if self._is_ours() else 0

    def thread_id(self, vcpu: int) -> int | None:
        """The kernel's id of vCPU's thread while it runs, else None."""
        return load(&self._place(vcpu).thread, SEQ_CST) or None

    # A vCPU's thread

    def arrive(self, vcpu: int) -> None:
        """This thread is vCPU's from now on, and can be kicked."""
        store(&self._place(vcpu).thread, this_thread(), SEQ_CST)

    def enter(self, vcpu: int) -> bool:
        """Go in, as soon as the gate is open; False when the run has ended."""
        cdef Place *place = self._place(vcpu)
        cdef uint32_t seen, shut
        while True:
            store(&place.in_guest, 1, SEQ_CST)
            if load(&self._shut, SEQ_CST) == 0:
                return True
            store(&place.in_guest, 0, SEQ_CST)
            self._tell()
            with nogil:  # until it is over, so that each change meanwhile does not take the GIL from who makes it
                while True:
                    seen = load(&self._changes, SEQ_CST)
                    shut = load(&self._shut, SEQ_CST)
                    if shut & ENDED or shut == 0:
                        break
                    futex_wait(&self._changes, seen, NULL)
            if shut & ENDED:
                return False

    def leave(self, vcpu: int) -> None:
        """Note that vCPU is out of the guest."""
        store(&self._place(vcpu).in_guest, 0, SEQ_CST)
        if load(&self._shut, SEQ_CST):
            self._tell()

    def depart(self, vcpu: int) -> bool:
        """End the run on behalf of vCPU, whose thread ends or could not be started; True for the last one."""
        cdef uint32_t left
        cdef Place *place = self._place(vcpu)
        store(&place.in_guest, 0, SEQ_CST)
        store(&place.thread, 0, SEQ_CST)
        self.end()
        left = add(&self._threads, <uint32_t>-1, SEQ_CST)
        self._tell()
        return left == 0

    # Inside

    cdef Place *_place(self, vcpu) except NULL:
        if not 0 <= vcpu < self._most:
            raise RangeError(f"vCPU {vcpu}; the Runner has vCPUs 0 to {self._most - 1}")
        return &self._places[<Py_ssize_t>vcpu]

    cdef bint _is_ours(self) noexcept:
        return getpid() == self._pid

    cdef void _tell(self) noexcept:
        add(&self._changes, 1, SEQ_CST)
        futex_wake_all(&self._changes)

    cdef bint _inside(self) noexcept:
        cdef Py_ssize_t vcpu
        if self._is_ours():
            for vcpu in range(len(self._vcpus)):
                if load(&self._places[vcpu].in_guest, SEQ_CST):
                    return True
        return False

    cdef int _kick_inside(self) except -1:
        """Kick every vCPU that is in; how many there are."""
        cdef Py_ssize_t vcpu
        cdef int inside = 0
        cdef uint32_t thread
        if not self._is_ours():
            return 0
        for vcpu in range(len(self._vcpus)):
            if load(&self._places[vcpu].in_guest, SEQ_CST):
                inside += 1
                self._vcpus[vcpu].request_exit()
                thread = load(&self._places[vcpu].thread, SEQ_CST)
                if thread:
                    kick_thread(thread, self._kick_signal)
        return inside

    cdef int _drive_out(self) except -1:
        cdef uint32_t seen = load(&self._changes, SEQ_CST)
        while self._kick_inside():
            self._wait_a_little(seen, LOOK_AGAIN_NS)
            seen = load(&self._changes, SEQ_CST)
        return 0

    cdef int _wait_a_little(self, uint32_t seen, long ns) except -1:
        """Wait until something has changed since `seen`, up to `ns`; raise what a signal's handler does."""
        cdef timespec timeout
        timeout.tv_sec, timeout.tv_nsec = ns / NS_PER_S, ns % NS_PER_S
        with nogil:
            futex_wait(&self._changes, seen, &timeout)
        return PyErr_CheckSignals()

    cdef bint _is_over(self, int what, uint32_t runs) noexcept:
        """Is the wait for `what`, one of UNTIL_..., over?  runs: `_runs` when the wait began."""
        if not self._is_ours() or load(&self._runs, SEQ_CST) != runs:  # the next run begins after all that
            return True
        if what == UNTIL_ENDED:
            return (load(&self._shut, SEQ_CST) & ENDED) != 0
        if load(&self._starting, SEQ_CST):
            return False
        return what == UNTIL_STARTED or load(&self._threads, SEQ_CST) == 0

    cdef bint _wait_for(self, int what, timeout_s) except -1:
        """Wait for `what`; False if `timeout_s` passed first."""
        cdef uint32_t seen = load(&self._changes, SEQ_CST)
        cdef uint32_t runs = load(&self._runs, SEQ_CST)
        cdef long ns = LOOK_AGAIN_NS
        deadline = None if timeout_s is None else monotonic() + timeout_s
        while not self._is_over(what, runs):
            if deadline is not None:
                left_s = deadline - monotonic()
                if left_s <= 0:
                    return False
                ns = max(1, min(LOOK_AGAIN_NS, <long>(min(1.0, left_s) * NS_PER_S)))
            if what == UNTIL_DEPARTED:
                self._kick_inside()
            self._wait_a_little(seen, ns)
            seen = load(&self._changes, SEQ_CST)
        return True


@cython.final
@cython.no_gc_clear  # else a hold in a garbage cycle has lost its gate when it is given back
cdef class Hold:
    """Keeps all vCPUs of a gate out of the guest, from `with` to its end, or until it is dropped.

    Keep one for as long as no vCPU may run: resume() meanwhile takes effect when the last hold is given back.
    """

    cdef Gate _gate
    cdef bint _taken

    def __cinit__(self, gate: Gate) -> None:
        self._gate = gate

    def __dealloc__(self) -> None:
        self.give_back()

    def __enter__(self) -> None:
        self.take()

    def __exit__(self, *exc_info: object) -> None:
        self.give_back()

    cdef int take(self) except -1:
        if self._taken:
            raise StateError("hold", "the vCPUs are kept out by this hold already", "ask for another one")
        self._taken = True
        add(&self._gate._shut, ONE_HOLD, SEQ_CST)
        try:
            self._gate._drive_out()
        except BaseException:
            self.give_back()
            raise
        return 0

    cdef void give_back(self) noexcept:
        if self._taken:
            self._taken = False
            if add(&self._gate._shut, <uint32_t>-ONE_HOLD, SEQ_CST) == 0:  # else nobody may go in yet
                self._gate._tell()


cdef void do_nothing(int signum) noexcept nogil:
    pass


def install_kick_signal(signum: int) -> None:
    """Let `signum` interrupt KVM_RUN in the thread that gets it, and do nothing else.

    StateError if the process uses the signal already.
    """
    cdef sigaction_t ours, old
    memset(&ours, 0, sizeof(ours))
    ours.sa_handler = do_nothing
    sigemptyset(&ours.sa_mask)
    signum = whole("kick_signal", signum, 1, SIGNALS)
    checked(sigaction(signum, NULL, &old), "sigaction")
    if old.sa_handler != SIG_DFL and old.sa_handler != do_nothing:
        raise StateError("install_kick_signal", f"signal {signum} has a handler already", "choose another kick signal")
    checked(sigaction(signum, &ours, NULL), "sigaction")
