# SPDX-License-Identifier: Apache-2.0 OR MIT
"""What other compiled modules see of a clock's transactions."""

from libc.stdint cimport uint64_t

from pvclock._memory cimport GuestMemory


cdef class Transaction:
    cdef GuestMemory _memory
    cdef object _after
    cdef object _token  # equal to memory.live_clock while this clock is live; None before take_over()
    cdef int _depth
    cdef uint64_t _owner  # the thread, while _depth is not 0
    cdef readonly uint64_t count  # of outermost `with`s so far, modulo 2^64

    cdef bint try_enter(self) except -1
    cdef int leave(self) except -1
    cdef object _end(self, object error)


cdef object to_the_end(object function, object argument, list interrupts)
