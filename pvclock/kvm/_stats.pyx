"""A vCPU's statistics, as KVM counts them: readable at any time, also while the vCPU runs.

Errors and close() are as in _fd.pyx.  Source: Documentation/virt/kvm/api.rst, KVM_GET_STATS_FD.
"""

cimport cython
from libc.errno cimport EIO
from libc.stdint cimport uint64_t
from posix.unistd cimport pread

from pvclock.kvm._fd cimport Fd, checked
from pvclock.kvm._kvm_abi cimport *
from pvclock.kvm._vcpu cimport Vcpu

import os
from struct import Struct

from pvclock.errors import ConfigError, KvmError

cdef object HEADER = Struct("<6I")  # flags, name_size, num_desc, id_offset, desc_offset, data_offset
cdef object DESCRIPTOR = Struct("<IhHII")  # flags, exponent, size (of values), offset, bucket_size; then its name


cdef dict places_of(int fd):
    """Where in the file each statistic's first value is."""
    _, name_bytes, count, _, first, data = HEADER.unpack(os.pread(fd, HEADER.size, 0))
    length = DESCRIPTOR.size + name_bytes
    table = os.pread(fd, count * length, first)
    places = {}
    for at in range(0, len(table), length):
        offset = DESCRIPTOR.unpack_from(table, at)[3]
        places[table[at + DESCRIPTOR.size:at + length].split(b"\0", 1)[0].decode("ascii", "replace")] = data + offset
    return places


@cython.final
cdef class VcpuStats(Fd):
    """The statistics of `vcpu`, which is out of the guest while this is made.

    KvmError on a host without them, which has no KVM_CAP_BINARY_STATS_FD: Linux before 5.14.
    """

    cdef dict _places

    def __init__(self, Vcpu vcpu not None) -> None:
        if self.fd < 0:
            self.fd = checked(ioctl(vcpu._idle_fd("stats"), KVM_GET_STATS_FD, 0), "KVM_GET_STATS_FD")
        self._places = places_of(self.fd)

    @property
    def names(self) -> tuple[str, ...]:
        """What this KVM counts."""
        return tuple(self._places)

    def read(self, name: str) -> int:
        """The present value of a statistic, or the first of one that has several.  ConfigError for an unknown name."""
        cdef uint64_t value = 0
        cdef long length
        if name not in self._places:
            raise ConfigError(f"a statistic {name!r}; this KVM has {', '.join(self._places)}")
        cdef long at = self._places[name]
        with nogil:
            length = pread(self.fd, &value, sizeof(value), at)
        if checked(length, "read of KVM_GET_STATS_FD") != sizeof(value):
            raise KvmError("read of KVM_GET_STATS_FD", EIO)
        return value
