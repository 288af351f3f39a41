"""Sources of host TSC: the CPU's own, kernel time on hosts whose TSC cannot be trusted, or a simulated value."""

cimport cython
from libc.stdint cimport uint64_t
from posix.time cimport CLOCK_MONOTONIC_RAW, clock_gettime, timespec

from pvclock._memory cimport as_whole
from pvclock._publish cimport (
    pvclock_counter_read, pvclock_host_counter, pvclock_rdtsc_after_stores, pvclock_rdtsc_ordered
)

from pvclock.errors import RangeError, WrongType

cdef extern from *:
    ctypedef unsigned long long u128 "unsigned __int128"

cdef uint64_t NS_PER_S = 1_000_000_000


def read_tsc() -> int:
    """This CPU's TSC, read after all earlier loads completed, like Linux's rdtsc_ordered()."""
    return pvclock_rdtsc_ordered()


cdef class Counter:
    """A source of host TSC.  C code reads it, so this module's subclasses are the only ones; WrongType for others."""

    def __cinit__(self, *args: object) -> None:
        if type(self) not in (HostCounter, KernelTimeCounter, SimulatedCounter):
            raise WrongType("counter", self, "a HostCounter, KernelTimeCounter or SimulatedCounter")

    def read(self) -> int:
        """Host TSC now, in ticks, read after all earlier loads completed."""
        return pvclock_counter_read(&self.c)

    @property
    def margin_ticks(self) -> int:
        """Ticks between a publish's TSC reading and its break point."""
        return self.c.margin_ticks


@cython.final
cdef class HostCounter(Counter):
    """This CPU's own time stamp counter."""

    def __cinit__(self) -> None:
        self.c = pvclock_host_counter()


cdef uint64_t kernel_time_read(void *context) noexcept nogil:
    cdef timespec now
    pvclock_rdtsc_after_stores()  # for its fences
    clock_gettime(CLOCK_MONOTONIC_RAW, &now)
    cdef u128 ns = <u128>now.tv_sec * NS_PER_S + now.tv_nsec
    return <uint64_t>(ns * (<KernelTimeCounter>context).hz / NS_PER_S)


@cython.final
cdef class KernelTimeCounter(Counter):
    """CLOCK_MONOTONIC_RAW in ticks of `hz`: KVM steers guest TSCs by it where the host's own is unstable."""

    cdef uint64_t hz

    def __cinit__(self, hz: int) -> None:
        self.hz = as_ticks(hz)
        self.c = pvclock_host_counter()  # for its margin: guests still read the CPU's TSC
        self.c.read = kernel_time_read
        self.c.context = <void *>self


cdef uint64_t simulated_counter_read(void *context) noexcept nogil:
    return (<SimulatedCounter>context).ticks


@cython.final
cdef class SimulatedCounter(Counter):
    """A counter that moves only when `value` (ticks, 0 to 2^64 - 1) is set."""

    cdef uint64_t ticks

    def __cinit__(self, value: int = 0) -> None:
        self.c.read = simulated_counter_read
        self.c.context = <void *>self
        self.ticks = as_ticks(value)

    @property
    def value(self) -> int:
        """The count, in ticks; settable."""
        return self.ticks

    @value.setter
    def value(self, value: int) -> None:
        self.ticks = as_ticks(value)


cdef uint64_t as_ticks(object value) except? 0:
    number = as_whole(value, "value")
    if not 0 <= number < 1 << 64:
        raise RangeError(f"TSC is {number:#x}; it must fit in 64 bits, unsigned")
    return number
