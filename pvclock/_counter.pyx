"""Where ticks come from: the CPU's TSC, kernel time on hosts whose TSC cannot be trusted, or a simulation's hand."""

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
    """This CPU's TSC, ordered as Linux's rdtsc_ordered(): not before any earlier load has its value."""
    return pvclock_rdtsc_ordered()


cdef class Counter:
    """Where host TSC comes from: one of this module's; C code reads it, so Python cannot add others."""

    def __cinit__(self, *args: object) -> None:
        if type(self) not in (HostCounter, KernelTimeCounter, SimulatedCounter):
            raise WrongType("counter", self, "a HostCounter, KernelTimeCounter or SimulatedCounter")

    def read(self) -> int:
        """Host TSC now, in ticks; not before any earlier load has its value."""
        return pvclock_counter_read(&self.c)

    @property
    def margin_ticks(self) -> int:
        """How far ahead of the present a publish puts its break point, in ticks."""
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
    """CLOCK_MONOTONIC_RAW in ticks of `hz`: what KVM steers guests' TSCs by, where the host's own is unstable."""

    cdef uint64_t hz

    def __cinit__(self, hz: int) -> None:
        self.hz = as_ticks(hz)
        self.c = pvclock_host_counter()  # its margin: a guest reads its TSC by the CPU's all the same
        self.c.read = kernel_time_read
        self.c.context = <void *>self


cdef uint64_t simulated_counter_read(void *context) noexcept nogil:
    return (<SimulatedCounter>context).ticks


@cython.final
cdef class SimulatedCounter(Counter):
    """A counter that stands where it is put: `value`, in ticks modulo 2^64."""

    cdef uint64_t ticks

    def __cinit__(self, value: int = 0) -> None:
        self.c.read = simulated_counter_read
        self.c.context = <void *>self
        self.ticks = as_ticks(value)

    @property
    def value(self) -> int:
        """Ticks; settable."""
        return self.ticks

    @value.setter
    def value(self, value: int) -> None:
        self.ticks = as_ticks(value)


cdef uint64_t as_ticks(object value) except? 0:
    number = as_whole(value, "value")
    if not 0 <= number < 1 << 64:
        raise RangeError(f"TSC is {number:#x}; it must fit in 64 bits, unsigned")
    return number
