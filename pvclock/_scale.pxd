# SPDX-License-Identifier: Apache-2.0 OR MIT
"""What other compiled modules see of a scale."""

from libc.stdint cimport uint64_t

from pvclock._math cimport pvclock_scale


cdef class ClockScale:
    cdef pvclock_scale c
    cdef uint64_t num, den  # the ns in a tick that it is to show
    cdef readonly object hz
