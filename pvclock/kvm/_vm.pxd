# SPDX-License-Identifier: Apache-2.0 OR MIT
"""A VM's file descriptor, for _system.pyx, which makes it."""

cimport cython

from pvclock.kvm._fd cimport Fd


@cython.final
cdef class Vm(Fd):
    cdef size_t run_bytes
    cdef dict _mapped  # by slot; shared with the vCPUs, for each of them keeps the kernel's VM alive
