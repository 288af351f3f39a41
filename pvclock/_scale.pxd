# SPDX-License-Identifier: Apache-2.0 OR MIT
"""What other compiled modules see of a scale."""

from pvclock._math cimport pvclock_scale


cdef class ClockScale:
    cdef pvclock_scale c
    cdef readonly object hz
