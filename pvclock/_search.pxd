# SPDX-License-Identifier: Apache-2.0 OR MIT
"""C declarations of pvclock_search.h; who cimports them says include_dirs=[pvclock.get_include()] to its compiler."""

from libc.stdint cimport uint32_t, uint64_t

from pvclock._math cimport pvclock_u128


cdef extern from "pvclock_search.h" nogil:
    const uint32_t PVCLOCK_PPM

    cdef struct pvclock_search_terms:
        pvclock_u128 rate_least
        pvclock_u128 rate_most
        uint64_t newest_tsc

    cdef struct pvclock_places:
        uint64_t *offsets
        size_t room
        uint64_t count

    cdef struct pvclock_search_result:
        uint64_t even
        pvclock_places other_rate
        pvclock_places pages

    int pvclock_search_terms_of(uint64_t tsc_hz, uint32_t within_ppm, uint64_t newest_tsc, pvclock_search_terms *ret)
    void pvclock_search(const void *memory, size_t length, const pvclock_search_terms *terms,
                        pvclock_search_result *result)
