"""A file descriptor of KVM: closed once, and the two ioctls that more than one kind of descriptor takes.

Every failure is a KvmError with the ioctl's name and errno.  All objects are context managers; close() may be called
twice.  Source: Documentation/virt/kvm/api.rst.
"""

from libc.errno cimport errno
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from posix.unistd cimport close

from pvclock.kvm._kvm_abi cimport *

from pvclock.arguments import whole
from pvclock.errors import ConfigError, KvmError

cdef int CPUID_ENTRIES_MAX = 256  # KVM_MAX_CPUID_ENTRIES

CAPABILITY_NUMBERS = {
    "KVM_CAP_IRQCHIP": KVM_CAP_IRQCHIP,
    "KVM_CAP_USER_MEMORY": KVM_CAP_USER_MEMORY,
    "KVM_CAP_SET_TSS_ADDR": KVM_CAP_SET_TSS_ADDR,
    "KVM_CAP_NR_VCPUS": KVM_CAP_NR_VCPUS,
    "KVM_CAP_MAX_VCPUS": KVM_CAP_MAX_VCPUS,
    "KVM_CAP_COALESCED_MMIO": KVM_CAP_COALESCED_MMIO,
    "KVM_CAP_COALESCED_PIO": KVM_CAP_COALESCED_PIO,
    "KVM_CAP_SIGNAL_MSI": KVM_CAP_SIGNAL_MSI,
    "KVM_CAP_ADJUST_CLOCK": KVM_CAP_ADJUST_CLOCK,
    "KVM_CAP_TSC_CONTROL": KVM_CAP_TSC_CONTROL,
    "KVM_CAP_GET_TSC_KHZ": KVM_CAP_GET_TSC_KHZ,
    "KVM_CAP_TSC_DEADLINE_TIMER": KVM_CAP_TSC_DEADLINE_TIMER,
    "KVM_CAP_KVMCLOCK_CTRL": KVM_CAP_KVMCLOCK_CTRL,
    "KVM_CAP_HYPERV_TIME": KVM_CAP_HYPERV_TIME,
    "KVM_CAP_HYPERV_SYNIC": KVM_CAP_HYPERV_SYNIC,
    "KVM_CAP_HYPERV_ENFORCE_CPUID": KVM_CAP_HYPERV_ENFORCE_CPUID,
    "KVM_CAP_SYS_HYPERV_CPUID": KVM_CAP_SYS_HYPERV_CPUID,
    "KVM_CAP_VCPU_ATTRIBUTES": KVM_CAP_VCPU_ATTRIBUTES,
    "KVM_CAP_IMMEDIATE_EXIT": KVM_CAP_IMMEDIATE_EXIT,
    "KVM_CAP_STEAL_TIME": KVM_CAP_STEAL_TIME,
    "KVM_CAP_X86_USER_SPACE_MSR": KVM_CAP_X86_USER_SPACE_MSR,
    "KVM_CAP_X86_MSR_FILTER": KVM_CAP_X86_MSR_FILTER,
    "KVM_CAP_ENFORCE_PV_FEATURE_CPUID": KVM_CAP_ENFORCE_PV_FEATURE_CPUID,
    "KVM_CAP_VM_TSC_CONTROL": KVM_CAP_VM_TSC_CONTROL,
}

U32_MASK = (1 << 32) - 1
U64_MASK = (1 << 64) - 1


cdef long checked(long result, str call) except -1:
    """The result of a system call; KvmError with its errno for a negative one."""
    if result < 0:
        raise KvmError(call, errno)
    return result


cdef list cpuid_entries(int fd, unsigned long request, str call):
    """The entries that `request` returns."""
    cdef kvm_cpuid2 *cpuid = <kvm_cpuid2 *>calloc(1, sizeof(kvm_cpuid2) + CPUID_ENTRIES_MAX * sizeof(kvm_cpuid_entry2))
    if cpuid is NULL:
        raise MemoryError
    try:
        cpuid.nent = CPUID_ENTRIES_MAX
        checked(ioctl(fd, request, cpuid), call)
        return [cpuid.entries[i] for i in range(cpuid.nent)]
    finally:
        free(cpuid)


cdef unsigned long capability_number(object capability) except? 0:
    """A capability given by its name or by its number."""
    if not isinstance(capability, str):
        return whole("capability", capability, 0, U32_MASK)
    if capability not in CAPABILITY_NUMBERS:
        raise ConfigError(f"capability {capability!r} is not known by name; give its number in <linux/kvm.h>")
    return CAPABILITY_NUMBERS[capability]


cdef class Fd:
    """A file descriptor of KVM."""

    def __cinit__(self) -> None:
        self.fd = -1

    def __dealloc__(self) -> None:
        if self.fd >= 0:
            close(self.fd)

    def close(self) -> None:
        """Close the descriptor; the kernel keeps what other descriptors still need."""
        if self.fd >= 0:
            close(self.fd)
        self.fd = -1

    def fileno(self) -> int:
        """The number of the descriptor, -1 once closed."""
        return self.fd

    def __enter__(self) -> object:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def check_extension(self, capability: int | str) -> int:
        """KVM_CHECK_EXTENSION by number or name ("KVM_CAP_..."): 0 if it is absent, else what api.rst says of it.

        ConfigError for a name that pvclock does not know.
        """
        cdef unsigned long number = capability_number(capability)
        return checked(ioctl(self.fd, KVM_CHECK_EXTENSION, number), "KVM_CHECK_EXTENSION")

    def enable_cap(self, capability: int | str, argument: int) -> None:
        """KVM_ENABLE_CAP by number or name, with args[0]; ConfigError for a name that pvclock does not know."""
        cdef kvm_enable_cap cap
        memset(&cap, 0, sizeof(cap))
        cap.cap, cap.args[0] = capability_number(capability), whole("argument", argument, 0, U64_MASK)
        checked(ioctl(self.fd, KVM_ENABLE_CAP, &cap), "KVM_ENABLE_CAP")
