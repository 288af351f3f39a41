"""/dev/kvm: KVM's system ioctls, one method for each, and no policy.  Errors and close() are as in _fd.pyx."""

cimport cython
from posix.fcntl cimport O_CLOEXEC, O_RDWR, open

from pvclock.kvm._fd cimport Fd, checked, cpuid_entries
from pvclock.kvm._kvm_abi cimport *
from pvclock.kvm._vm cimport Vm

from pvclock.arguments import path as checked_path


@cython.final
cdef class Kvm(Fd):
    """/dev/kvm."""

    def __init__(self, path: str = "/dev/kvm") -> None:
        path = checked_path("path", path)
        self.fd = open(path.encode(), O_RDWR | O_CLOEXEC)
        checked(self.fd, f"open {path}")

    def get_api_version(self) -> int:
        """KVM_GET_API_VERSION; 12 on every kernel since 2.6.22."""
        return checked(ioctl(self.fd, KVM_GET_API_VERSION, 0), "KVM_GET_API_VERSION")

    def get_supported_cpuid(self) -> list[dict[str, int]]:
        """KVM_GET_SUPPORTED_CPUID: entries with function, index, flags, eax, ebx, ecx, edx."""
        return cpuid_entries(self.fd, KVM_GET_SUPPORTED_CPUID, "KVM_GET_SUPPORTED_CPUID")

    def get_supported_hv_cpuid(self) -> list[dict[str, int]]:
        """KVM_GET_SUPPORTED_HV_CPUID: the Hyper-V leaves, as get_supported_cpuid(); KVM_CAP_SYS_HYPERV_CPUID has it."""
        return cpuid_entries(self.fd, KVM_GET_SUPPORTED_HV_CPUID, "KVM_GET_SUPPORTED_HV_CPUID")

    def create_vm(self) -> Vm:
        """KVM_CREATE_VM."""
        cdef Vm vm = Vm.__new__(Vm)
        vm.fd = checked(ioctl(self.fd, KVM_CREATE_VM, 0), "KVM_CREATE_VM")
        vm.run_bytes = checked(ioctl(self.fd, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE")
        return vm
