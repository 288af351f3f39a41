# SPDX-License-Identifier: Apache-2.0 OR MIT
"""C declarations of pvclock_math.h; who cimports them says include_dirs=[pvclock.get_include()] to its compiler."""

from libc.stdint cimport int8_t, uint32_t, uint64_t


cdef extern from *:
    ctypedef unsigned long long pvclock_u128  # 128 bits


cdef extern from "pvclock_math.h" nogil:
    cdef struct pvclock_scale:
        uint32_t mul
        int8_t shift

    cdef struct pvclock_line:
        uint64_t tsc
        uint64_t ns
        uint64_t rem
        uint64_t num
        uint64_t den

    int pvclock_time_scale(uint64_t scaled_hz, uint64_t base_hz, pvclock_scale *ret)
    int pvclock_time_scale_of_rate(uint64_t num, uint64_t den, int nearest, pvclock_scale *ret)
    uint64_t pvclock_scale_delta(uint64_t delta, pvclock_scale scale)
    int pvclock_unscale_delta(uint64_t ns, pvclock_scale scale, uint64_t *ret)
    uint64_t pvclock_mul_shr(uint64_t a, uint64_t b, unsigned int bits)
    int pvclock_tsc_ratio(uint32_t guest_khz, uint32_t host_khz, unsigned int frac_bits, uint64_t *ret)
    uint64_t pvclock_guest_tsc(uint64_t host_tsc, uint64_t ratio, unsigned int frac_bits, uint64_t offset)
    pvclock_line pvclock_line_at(pvclock_line line, uint64_t tsc)
    pvclock_line pvclock_line_turn(pvclock_line line, uint64_t num, uint64_t den)
    pvclock_u128 pvclock_fixed_rate(uint64_t num, uint64_t den, uint64_t unit_ns)
