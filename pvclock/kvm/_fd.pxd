# SPDX-License-Identifier: Apache-2.0 OR MIT
"""What the wrappers of KVM's three kinds of file descriptor share."""


cdef class Fd:
    cdef int fd


cdef object U32_MASK
cdef object U64_MASK

cdef long checked(long result, str call) except -1
cdef list cpuid_entries(int fd, unsigned long request, str call)
