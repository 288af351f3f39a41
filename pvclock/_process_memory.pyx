"""Another process's memory: many small places in one system call, long pieces, and which pages hold something."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EFAULT, ENODATA, EPERM, ESRCH, errno
from libc.stdint cimport uint64_t
from posix.types cimport off_t, pid_t
from posix.unistd cimport pread

import os

from pvclock._memory cimport as_u64

from pvclock.errors import MemoryNotReadable, RangeError, VmEnded

cdef extern from "<limits.h>" nogil:
    enum: IOV_MAX

cdef extern from "<sys/uio.h>" nogil:  # under _GNU_SOURCE, which Python.h defines
    cdef struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t process_vm_readv(pid_t pid, const iovec *local, unsigned long locals,
                             const iovec *remote, unsigned long remotes, unsigned long flags)

# Bits 63 and 62 of an entry: Linux's Documentation/admin-guide/mm/pagemap.rst.
cdef uint64_t HOLDS_SOMETHING = <uint64_t>3 << 62

PTRACE_SCOPE = "/proc/sys/kernel/yama/ptrace_scope"


def read_process(pid: int, addresses: object, length: int) -> list:
    """`length` bytes (1 or more) from each of `addresses` of process `pid`, in order.

    1024 places are read in one system call, without the GIL.  VmEnded if there is no such process; MemoryNotReadable
    with the first address that cannot be read, or with what helps if this process may not read that one's memory.
    """
    cdef list places = list(addresses), found = []
    cdef size_t first, size = as_length(length)
    for first in range(0, len(places), IOV_MAX):
        found += read_batch(pid, places[first:first + IOV_MAX], size)
    return found


def read_process_range(pid: int, address: int, length: int) -> bytes:
    """`length` bytes (1 or more) from `address` of process `pid`; as read_process(), for long pieces."""
    return read_batch(pid, [address], as_length(length))[0]


def read_files(places: object, length: int) -> list:
    """`length` bytes (1 or more) from each of `places`, (fd, offset) of a file, in order; without the GIL.

    OSError for what cannot be read, or is beyond the end of a file.
    """
    cdef list found = []
    cdef size_t size = as_length(length)
    cdef int fd
    cdef off_t offset
    cdef char *into
    cdef ssize_t got
    for fd, offset in places:
        piece = PyBytes_FromStringAndSize(NULL, size)
        into = PyBytes_AS_STRING(piece)
        with nogil:
            got = pread(fd, into, size, offset)
        if got < <ssize_t>size:
            raise OSError(errno if got < 0 else ENODATA, os.strerror(errno if got < 0 else ENODATA))
        found.append(piece)
    return found


def present_pages(pagemap: bytes) -> list:
    """(first, count) of each run of pages that are in memory or swapped out, by their 8-byte entries of a pagemap.

    What a process never touched, or gave back, is in none.
    """
    cdef const uint64_t *entries = <const uint64_t *>PyBytes_AS_STRING(pagemap)
    cdef size_t count = len(pagemap) // sizeof(uint64_t), first = 0, end = 0
    cdef list runs = []
    while end < count:
        first = end
        while first < count and not entries[first] & HOLDS_SOMETHING:
            first += 1
        end = first
        while end < count and entries[end] & HOLDS_SOMETHING:
            end += 1
        if end > first:
            runs.append((first, end - first))
    return runs


cdef list read_batch(pid_t pid, list places, size_t size):
    """As read_process(), for up to IOV_MAX places."""
    cdef iovec local[IOV_MAX]
    cdef iovec remote[IOV_MAX]
    cdef list found = [PyBytes_FromStringAndSize(NULL, size) for _ in places]
    cdef size_t i, count = len(places), done = 0
    cdef ssize_t got
    for i in range(count):
        local[i].iov_base, local[i].iov_len = PyBytes_AS_STRING(found[i]), size
        remote[i].iov_base, remote[i].iov_len = <void *>as_u64(places[i], "address"), size
    while done < count:
        with nogil:
            got = readv(pid, local + done, remote + done, count - done)
        if got < <ssize_t>size:
            raise not_readable(pid, -got if got < 0 else EFAULT, places[done] + max(got, 0))
        done += got // size
    return found


cdef ssize_t readv(pid_t pid, const iovec *local, const iovec *remote, size_t count) noexcept nogil:
    """Bytes read, or the negative errno."""
    cdef ssize_t got = process_vm_readv(pid, local, count, remote, count, 0)
    return got if got >= 0 else -errno


cdef size_t as_length(object length) except 0:
    if not 0 < length < 1 << 31:  # Linux reads no more in one call
        raise RangeError(f"length is {length}; it must be from 1 to 2^31 - 1")
    return length


# Errors


cdef object not_readable(pid_t pid, int error, object address):
    if error == ESRCH:
        return VmEnded(pid)
    if error == EFAULT:
        return MemoryNotReadable(pid, f"nothing can be read at its address {address:#x}")
    if error == EPERM:
        return MemoryNotReadable(pid, f"process_vm_readv is not permitted; {what_helps()}")
    return MemoryNotReadable(pid, f"process_vm_readv: {os.strerror(error)}")


cdef str what_helps():
    """What makes process_vm_readv() permitted, by the ptrace_scope of this host, if its kernel has one."""
    scope = ptrace_scope()
    if scope == "3":
        return f"{PTRACE_SCOPE} is 3, which forbids it to all until the next boot; --qmp reads by pmemsave instead"
    helps = "run as root, or give this Python the capability (setcap cap_sys_ptrace=ep)"
    if scope is None or scope == "0":
        helps += ", or run as the process's own user"
    elif scope == "1":
        helps += f"; or, as the process's own user, write 0 to {PTRACE_SCOPE}, which is 1"
    else:
        helps += f"; {PTRACE_SCOPE} is {scope}, which forbids it to all others"
    return helps + "; or use --qmp, which reads by pmemsave"


cdef object ptrace_scope():
    try:
        with open(PTRACE_SCOPE, encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return None
