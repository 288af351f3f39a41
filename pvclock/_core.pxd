"""What other compiled modules see of guest memory."""

from libc.stdint cimport uint8_t, uint64_t


cdef class GuestMemory:
    cdef list _slots
    cdef int _pins  # publishes that use pointers with the GIL released
    cdef int _replacing  # callers that wait to change the slots
    cdef readonly uint64_t generation
    cdef public object on_dirty

    cdef _replace(self, list slots)
    cdef wait_for_slots(self)
    cdef uint8_t *find(self, uint64_t gpa, uint64_t length) noexcept
    cdef uint8_t *at(self, object gpa, uint64_t length) except NULL
    cdef mark_dirty(self, uint64_t gpa, uint64_t length)
