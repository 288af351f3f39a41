# SPDX-License-Identifier: Apache-2.0 OR MIT
"""C declarations of Hyper-V's headers: reference TSC page and counter, message slots."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from pvclock._publish cimport pvclock_counter, pvclock_page_kind


cdef extern from *:
    ctypedef unsigned long long pvclock_u128  # 128 bits


cdef extern from "hyperv_abi.h" nogil:
    cdef struct hyperv_tsc_page:
        uint32_t sequence
        uint32_t reserved
        uint64_t scale
        int64_t offset

    cdef struct hyperv_message_header:
        uint32_t type
        uint8_t payload_size
        uint8_t flags
        uint64_t sender

    enum:
        HYPERV_MESSAGE_BYTES
        HYPERV_MSR_REFERENCE_TSC
        HYPERV_MSR_TIME_REF_COUNT
        HYPERV_PAGE_BYTES
        HYPERV_SEQUENCE_INVALID
        HYPERV_SEQUENCE_RESERVED
        HYPERV_UNIT_NS


cdef extern from "hyperv_publish.h" nogil:
    cdef struct hyperv_line:
        uint64_t tsc
        uint64_t units
        uint64_t fraction
        uint64_t scale_units
        uint64_t scale

    cdef struct hyperv_clock:
        void *page
        uint64_t num
        uint64_t den
        uint64_t tsc_offset
        uint64_t least_units
        uint32_t sequence
        uint8_t can_read_tsc
        uint8_t is_new
        uint32_t line_version
        hyperv_line line
        uint64_t line_den
        uint64_t moved_ticks

    cdef struct hyperv_reading:
        uint64_t tsc
        uint64_t units
        uint32_t sequence

    const pvclock_page_kind pvclock_page_kind_hyperv

    uint32_t hyperv_sequence_after(uint32_t sequence)
    uint64_t hyperv_line_read(const hyperv_line *line, uint64_t tsc)
    pvclock_u128 hyperv_moved_line_fixed(const hyperv_clock *clock, uint64_t tsc)
    void hyperv_clock_move(hyperv_clock *clock, uint64_t ticks, uint64_t ns)
    void hyperv_clock_resume(
        hyperv_clock *clock, uint64_t stopped, uint64_t ticks, uint64_t ns, uint64_t num, uint64_t den
    )
    int hyperv_counter_read(const hyperv_clock *clock, const pvclock_counter *counter, uint64_t *ret)
    int hyperv_read(
        const void *page, uint64_t tsc_offset, const pvclock_counter *counter, unsigned int tries, hyperv_reading *ret
    )


cdef extern from "hyperv_message.h" nogil:
    int hyperv_message_post(void *slot, const void *message, size_t bytes, int waits)
