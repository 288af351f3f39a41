# SPDX-License-Identifier: Apache-2.0 OR MIT
"""What C code sees of a Counter."""

from pvclock._publish cimport pvclock_counter


cdef class Counter:
    cdef pvclock_counter c
