# SPDX-License-Identifier: Apache-2.0 OR MIT
"""C declarations of pvclock_tsc.h, pvclock_anchor.h, pvclock_publish.h, pvclock_own_line.h, pvclock_words.h and
pvclock_records.h.

A module that cimports them is built with include_dirs=[pvclock.get_include()]: docs/c.md has a complete setup.py.
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


cdef extern from "pvclock_anchor.h" nogil:
    cdef struct pvclock_anchor:
        uint64_t tsc_timestamp
        uint64_t system_time
        pvclock_scale scale

    cdef struct pvclock_anchor_params:
        pvclock_scale scale

    void pvclock_anchor_move(pvclock_anchor *anchor, uint64_t ticks, uint64_t ns)
    uint64_t pvclock_anchor_read(const pvclock_anchor *anchor, uint64_t tsc)
    pvclock_anchor_params pvclock_anchor_params_of(pvclock_scale scale)


cdef extern from "pvclock_publish.h" nogil:
    cdef struct pvclock_page_kind:
        pass

    cdef struct pvclock_page_set:
        const pvclock_page_kind *kind
        void *pages
        size_t count
        int is_due

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

    const pvclock_page_kind pvclock_page_kind_pvclock

    int pvclock_publish(
        pvclock_target *targets,
        size_t count,
        const pvclock_line *timeline,
        const pvclock_anchor_params *params,
        const pvclock_counter *counter,
        pvclock_anchor *anchor,
        uint64_t *break_tsc,
    )
    void pvclock_page_follow_tsc(pvclock_target *target, const pvclock_anchor *anchor)
    int pvclock_publish_at(
        pvclock_page_set *sets,
        size_t count,
        const pvclock_line *timeline,
        const pvclock_anchor_params *params,
        const pvclock_counter *counter,
        pvclock_anchor *anchor,
        uint64_t *break_tsc,
        int again,
    )
    int pvclock_read(
        const void *page,
        uint64_t tsc_offset,
        const pvclock_counter *counter,
        unsigned int tries,
        pvclock_reading *ret,
    )


cdef extern from "pvclock_own_line.h" nogil:
    cdef struct pvclock_own_page:
        void *page
        pvclock_anchor line
        uint32_t version
        uint8_t flags
        uint8_t is_due

    const pvclock_page_kind pvclock_page_kind_own_line

    void pvclock_own_pages_write_now(pvclock_own_page *pages, size_t count)


cdef extern from "pvclock_words.h" nogil:
    uint32_t pvclock_version_odd(uint32_t version)
    uint32_t pvclock_load32(const void *at)
    void pvclock_store32(void *at, uint32_t value)


cdef extern from "pvclock_records.h" nogil:
    void pvclock_publish_wall_clock(void *record, uint32_t sec, uint32_t nsec)
    void pvclock_set_preempted(void *record)
    uint8_t pvclock_clear_preempted(void *record)
    void pvclock_add_steal_time(void *record, uint64_t ns)
    uint8_t pvclock_publish_steal_time(void *record, uint64_t ns)
    void pvclock_eoi_offer(uint8_t *flag)
    int pvclock_eoi_take(uint8_t *flag)
