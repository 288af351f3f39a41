# SPDX-License-Identifier: Apache-2.0 OR MIT
"""What other compiled modules see of a guest's budget."""


cdef class GuestBudget:
    cdef readonly int left
    cdef readonly object suppressed  # events beyond the budget so far
    cdef object _filled_ns

    cpdef fill(self, raw_ns)
    cpdef bint take(self)
    cpdef bint suppress(self, raw_ns)
