# SPDX-License-Identifier: Apache-2.0 OR MIT
"""C declarations of pvclock_tsc.h and pvclock_publish.h.

Who cimports them says include_dirs=[pvclock.get_include()] to its compiler: docs/c.md has a complete setup.py.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pvclock._math cimport pvclock_line, pvclock_scale


cdef extern from "pvclock_tsc.h" nogil:
    cdef struct pvclock_counter:
        uint64_t (*read)(void *context) noexcept nogil
        void *context
        uint64_t margin_ticks

    uint64_t pvclock_rdtsc_ordered()
    uint64_t pvclock_rdtsc_after_stores()
    pvclock_counter pvclock_host_counter()
    uint64_t pvclock_counter_read(const pvclock_counter *counter)


cdef extern from "pvclock_publish.h" nogil:
    cdef struct pvclock_anchor:
        uint64_t tsc_timestamp
        uint64_t system_time
        pvclock_scale scale

    cdef struct pvclock_rate:
        pvclock_scale scale

    cdef struct pvclock_target:
        void *page
        uint64_t tsc_offset
        uint8_t flags
        uint8_t in_guest

    cdef struct pvclock_reading:
        uint64_t tsc
        uint64_t ns
        uint32_t version
        uint8_t flags

    void pvclock_anchor_move(pvclock_anchor *anchor, uint64_t ticks, uint64_t ns)
    uint64_t pvclock_anchor_read(const pvclock_anchor *anchor, uint64_t tsc)
    pvclock_rate pvclock_rate_of(pvclock_scale scale)
    uint32_t pvclock_version_odd(uint32_t version)
    int pvclock_publish(
        pvclock_target *targets,
        size_t count,
        const pvclock_line *timeline,
        const pvclock_rate *rate,
        const pvclock_counter *counter,
        pvclock_anchor *anchor,
        uint64_t *break_tsc,
    )
    int pvclock_publish_at(
        pvclock_target *targets,
        size_t count,
        const pvclock_line *timeline,
        const pvclock_rate *rate,
        const pvclock_counter *counter,
        pvclock_anchor *anchor,
        uint64_t *break_tsc,
        int again,
    )
    void pvclock_publish_wall_clock(void *record, uint32_t sec, uint32_t nsec)
    void pvclock_set_preempted(void *record)
    uint8_t pvclock_clear_preempted(void *record)
    void pvclock_add_steal_time(void *record, uint64_t ns)
    uint8_t pvclock_publish_steal_time(void *record, uint64_t ns)
    void pvclock_eoi_offer(uint8_t *flag)
    int pvclock_eoi_take(uint8_t *flag)
    uint32_t pvclock_load32(const void *at)
    void pvclock_store32(void *at, uint32_t value)
    int pvclock_read(
        const void *page,
        uint64_t tsc_offset,
        const pvclock_counter *counter,
        unsigned int tries,
        pvclock_reading *ret,
    )
