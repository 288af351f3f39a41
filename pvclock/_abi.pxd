"""C declarations of pvclock_abi.h."""

from libc.stdint cimport int8_t, uint8_t, uint32_t, uint64_t


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

    const uint8_t PVCLOCK_TSC_STABLE_BIT
    const uint8_t PVCLOCK_GUEST_STOPPED
