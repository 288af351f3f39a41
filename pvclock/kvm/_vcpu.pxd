# SPDX-License-Identifier: Apache-2.0 OR MIT
"""A vCPU's file descriptor, for _vm.pyx, which makes it."""

cimport cython

from pvclock.kvm._fd cimport Fd
from pvclock.kvm._kvm_abi cimport kvm_run
from libc.stdint cimport uint32_t, uint64_t


@cython.final
cdef class Vcpu(Fd):
    cdef readonly int vcpu_id
    cdef kvm_run *run_page
    cdef size_t run_bytes
    cdef size_t coalesced_at  # where in the mapping KVM's coalesced ring is, in bytes; 0 if it has none
    cdef dict _mapped  # the VM's
    cdef bint running
    cdef object _serve_write  # see serve_writes(); None without

    cdef int _idle_fd(self, str operation) except? -1
    cdef kvm_run *_exited(self, str operation, uint32_t reason, uint32_t or_reason) except NULL
    cdef int _run(self) noexcept nogil
    cdef bint _is_served(self) except -1
    cdef _exit(self)
    cdef _io_exit(self)
    cdef uint64_t _msr(self, str operation, unsigned long request, str call, uint32_t index, uint64_t value) except? 0
    cdef dict _msrs(self, str operation, unsigned long request, str call, dict values, bint skips_unknown)
    cdef int _tsc_offset(self, str operation, unsigned long request, uint64_t *offset) except? -1
    cdef bytes _get_struct(self, str operation, unsigned long request, str call, size_t length)
    cdef int _set_struct(
        self, str operation, unsigned long request, str call, size_t length, str parameter, object given
    ) except -1
