"""One instant on the host TSC and on a system clock, read in one bracket."""

from libc.stdint cimport uint64_t
from posix.time cimport clock_gettime, clockid_t, timespec

from pvclock._publish cimport pvclock_rdtsc_ordered

from pvclock.quantities import NS_PER_S as _NS_PER_S


def sample_clock(clock_id: int, tries: int = 8) -> tuple[int, int, int]:
    """(host TSC, ns of the system clock `clock_id`, width in ticks) of one instant.

    Reads the clock between two readings of the TSC, `tries` times, and returns the narrowest bracket with the TSC at
    its middle: exact to width/2 ticks.  OSError for a clock that does not exist.
    """
    cdef clockid_t clock = clock_id
    cdef timespec now, best_now = timespec(0, 0)
    cdef uint64_t before, width, best_before = 0, best_width = <uint64_t>-1
    cdef int failed = 0
    for _ in range(max(tries, 1)):
        before = pvclock_rdtsc_ordered()
        failed |= clock_gettime(clock, &now)
        width = pvclock_rdtsc_ordered() - before
        if width < best_width:
            best_before, best_width, best_now = before, width, now
    if failed:
        raise OSError(f"clock_gettime: this system has no clock {clock_id}")
    return best_before + best_width // 2, best_now.tv_sec * _NS_PER_S + best_now.tv_nsec, best_width
