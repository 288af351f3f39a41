# SPDX-License-Identifier: Apache-2.0 OR MIT
"""C declarations of pvclock_abi.h; who cimports them says include_dirs=[pvclock.get_include()] to its compiler."""

from libc.stdint cimport int8_t, int64_t, uint8_t, uint32_t, uint64_t


cdef extern from "pvclock_abi.h" nogil:
    cdef struct pvclock_vcpu_time_info:
        uint32_t version
        uint32_t pad0
        uint64_t tsc_timestamp
        uint64_t system_time
        uint32_t tsc_to_system_mul
        int8_t tsc_shift
        uint8_t flags

    cdef struct pvclock_wall_clock:
        uint32_t version
        uint32_t sec
        uint32_t nsec

    cdef struct pvclock_steal_time:
        uint64_t steal
        uint32_t version
        uint32_t flags
        uint8_t preempted

    cdef struct pvclock_async_pf:
        uint32_t flags
        uint32_t token

    cdef struct pvclock_clock_pairing:
        int64_t sec
        int64_t nsec
        uint64_t tsc
        uint32_t flags

    const uint8_t PVCLOCK_TSC_STABLE_BIT
    const uint8_t PVCLOCK_GUEST_STOPPED
    const uint8_t PVCLOCK_VCPU_PREEMPTED
    const uint8_t PVCLOCK_VCPU_FLUSH_TLB
    const uint32_t PVCLOCK_PAGE_NOT_PRESENT
    const uint32_t PVCLOCK_PAGE_READY
