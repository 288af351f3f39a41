# SPDX-License-Identifier: Apache-2.0 OR MIT
"""What other compiled modules see of guest memory."""

from libc.stdint cimport uint8_t, uint64_t


cdef object as_whole(object value, str what)
cdef uint64_t as_u64(object value, str what) except? 0
cdef str shortened(object number)
cdef object graver(object error, object later)
cdef uint64_t fork_count() noexcept
cdef uint64_t this_thread() noexcept


cdef class Deferral:
    cdef int depth
    cdef bint telling  # on_dirty is being called
    cdef dict ranges  # (gpa, length): each once, in order


cdef class GuestMemory:
    cdef tuple _slots
    cdef int _pins  # publishes that use pointers with the GIL released
    cdef int _replacing  # callers that wait to change the slots
    cdef uint64_t _forks  # of this process, when the two were counted
    cdef dict _deferrals  # by this_thread()
    cdef object __weakref__
    cdef readonly uint64_t generation
    cdef object _on_dirty
    cdef readonly object clock_lock  # of the clocks in this memory, of which one at a time is live
    cdef public object live_clock  # that one's token

    cdef bint _swap(self, tuple old, tuple new) except -1
    cdef void _forget_other_threads(self) noexcept
    cdef int wait_for_slots(self) except -1
    cdef void pin(self) noexcept
    cdef void unpin(self) noexcept
    cdef uint8_t *find(self, uint64_t gpa, uint64_t length) noexcept
    cdef uint8_t *at(self, object gpa, uint64_t length) except NULL
    cdef int mark_dirty(self, uint64_t gpa, uint64_t length) except -1
    cdef Deferral defer(self)
    cdef int tell(self) except -1
    cdef object _tell(self, Deferral mine)
