# SPDX-License-Identifier: Apache-2.0 OR MIT
"""What other compiled modules see of a VM's pages."""

from libc.stdint cimport uint8_t, uint64_t

from pvclock._counter cimport Counter
from pvclock._hyperv cimport hyperv_clock
from pvclock._math cimport pvclock_line
from pvclock._memory cimport GuestMemory
from pvclock._publish cimport (
    pvclock_anchor, pvclock_anchor_params, pvclock_own_page, pvclock_page_set, pvclock_reading, pvclock_target
)
from pvclock._scale cimport ClockScale


cdef struct Wanted:
    # What a vCPU's guest and VMM have asked for.
    uint64_t gpa
    uint64_t tsc_offset
    bint registered
    bint out_of_guest  # in the publish at hand


cdef struct WantedOwn:
    # What a vCPU's page with a line of its own is to show.
    uint64_t gpa
    pvclock_own_page page  # all but where it is
    bint is_there
    bint is_unmarked  # it was written, and on_dirty not told


cdef struct Shown:
    # What readers may use of a vCPU's page: set when a publish that wrote it has ended.
    void *page
    uint64_t gpa
    uint64_t tsc_offset
    bint published
    bint flagged  # flags and pads were written, too, since the page is where it is


cdef class OwnPages:
    cdef GuestMemory _memory
    cdef WantedOwn *_wanted  # by vCPU
    cdef pvclock_own_page *pages  # compact: only pages that can be written
    cdef int *vcpus  # by page
    cdef int count

    cdef void put(self, int vcpu, uint64_t gpa, pvclock_own_page page) noexcept
    cdef void take_away(self, int vcpu) noexcept
    cdef bint has(self, int vcpu) noexcept
    cdef void add(self, int vcpu, uint8_t *page) noexcept
    cdef bint are_due(self, object vcpu) except -1
    cdef void set_flags(self, uint8_t flags) noexcept
    cdef void note_written(self) noexcept
    cdef int mark_dirty(self) except -1
    cdef uint64_t ns_at(self, int vcpu, uint64_t guest_tsc) noexcept


cdef class ReferenceClock:
    cdef GuestMemory _memory
    cdef Counter _counter
    cdef hyperv_clock _clock
    cdef uint64_t _gpa
    cdef bint _is_placed
    cdef bint _is_unmarked  # the page was written, and on_dirty not told
    cdef uint64_t _generation  # of the memory that the page was looked up in
    cdef bint _stands  # does time stand still, at _standing_units?
    cdef uint64_t _standing_tsc, _standing_units
    cdef readonly bint is_served

    cdef bint prepare(self, ClockScale scale, uint64_t tsc_offset, bint in_step) noexcept
    cdef void set_rate(self, uint64_t num, uint64_t den) noexcept nogil
    cdef void note_published(self, bint written) noexcept
    cdef void move(self, uint64_t ticks, uint64_t ns) noexcept
    cdef void resume(self, uint64_t tsc, uint64_t ns, ClockScale scale) noexcept
    cdef void begin_anew(self) noexcept
    cdef void stop(self, uint64_t tsc, uint64_t ns) noexcept
    cdef void stand_still(self, uint64_t ns) noexcept
    cdef int mark_dirty(self) except -1


cdef enum:
    # Indices of TimePages._sets: one for each kind of page.
    SHARED_LINE = 0
    OWN_LINE = 1
    REFERENCE = 2
    KINDS = 3


cdef class TimePages:
    cdef readonly GuestMemory memory  # keeps the buffers behind the targets' pointers
    cdef readonly Counter counter
    cdef readonly int vcpus
    cdef readonly bint counter_went_back  # during the last publish, or stood still: the pages are even all the same
    cdef readonly uint64_t break_tsc  # of the last publish, moved as its line was; at first, when this was made
    cdef bint _stands  # does time stand still, at _standing_ns since _standing_tsc?
    cdef uint64_t _standing_tsc, _standing_ns
    cdef Wanted *_wanted  # by vCPU
    cdef Shown *_shown  # by vCPU
    cdef pvclock_page_set[KINDS] _sets
    cdef pvclock_target *_targets  # compact: only pages that can be written
    cdef int *_target_vcpu  # by target
    cdef int _count
    cdef OwnPages _own
    cdef readonly ReferenceClock reference
    cdef bint _changed  # a page or an offset, since the last publish
    cdef uint64_t _generation  # of the memory that all pointers were looked up in
    cdef uint64_t _flagged_generation  # of the memory whose pages may be flagged
    cdef pvclock_anchor _anchor
    cdef pvclock_anchor_params _params
    cdef ClockScale _params_scale  # that _params was made from
    cdef object _line_read  # that _line was made from
    cdef pvclock_line _line

    cdef int _vcpu(self, object vcpu) except -1
    cdef void _look_up_later(self) noexcept
    cdef void _look_up(self) noexcept
    cdef int _prepare(self, ClockScale scale, uint8_t flags, object out_of_guest) except -1
    cdef void _show(self) noexcept
    cdef void _show_own(self) noexcept
    cpdef mark_dirty(self)
    cdef void _move(self, uint64_t ticks, uint64_t ns) noexcept
    cdef int _read(self, object vcpu, pvclock_reading *ret) except -1
    cdef void _read_standing(self, int vcpu, pvclock_reading *ret) noexcept


cdef pvclock_line as_line(object line) except *
