"""A VM's file descriptor: KVM's VM ioctls, one method for each, and no policy.

Errors and close() are as in _fd.pyx.
"""

cimport cython
from cpython.buffer cimport PyBUF_CONTIG, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EPERM, errno
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy, memset
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap

from pvclock.kvm._fd cimport U32_MASK, U64_MASK, Fd, checked
from pvclock.kvm._kvm_abi cimport *
from pvclock.kvm._vcpu cimport Vcpu

from pvclock.arguments import data as checked_data
from pvclock.arguments import flag, sequence, whole
from pvclock.errors import ConfigError, KvmError, WrongType

cdef enum:
    PAGE_BYTES = 4096  # x86's, in which KVM counts the parts of a vCPU's mapping


cdef tuple checked_filter_range(Py_ssize_t place, object given):
    """One of set_msr_filter()'s."""
    parts = sequence(f"denied[{place}]", given, "(flags, base, length, bitmap)")
    if len(parts) != 4:
        raise WrongType(f"denied[{place}]", given, "(flags, base, length, bitmap)")
    flags, base, length, bitmap = parts
    return (
        *[whole(f"denied[{place}]", each, 0, U32_MASK) for each in (flags, base, length)],
        checked_data(f"denied[{place}]", bitmap),
    )


cdef kvm_coalesced_mmio_zone coalesced_zone(object address, object length, object is_port) except *:
    cdef kvm_coalesced_mmio_zone zone
    memset(&zone, 0, sizeof(zone))
    zone.addr, zone.size = whole("address", address, 0, U64_MASK), whole("length", length, 0, U32_MASK)
    zone.pio = flag("is_port", is_port)
    return zone


@cython.final
@cython.internal
cdef class MappedBuffer:
    """Holds a buffer for as long as the kernel maps it into a guest."""

    cdef Py_buffer view

    def __cinit__(self, buffer: object) -> None:
        PyObject_GetBuffer(buffer, &self.view, PyBUF_CONTIG)

    def __dealloc__(self) -> None:
        PyBuffer_Release(&self.view)


@cython.final
cdef class Vm(Fd):
    """A virtual machine; made by Kvm.create_vm()."""

    def __cinit__(self) -> None:
        self._mapped = {}

    def close(self) -> None:
        """Close the VM; its memory is let go of once its vCPUs are closed too."""
        Fd.close(self)
        self._mapped = {}

    def set_user_memory_region(self, slot: int, gpa: int, buffer: object) -> None:
        """KVM_SET_USER_MEMORY_REGION: map a page-aligned writable buffer at `gpa` and hold it; an empty one unmaps."""
        cdef MappedBuffer mapped
        cdef kvm_userspace_memory_region region
        memset(&region, 0, sizeof(region))
        region.slot, region.guest_phys_addr = whole("slot", slot, 0, U32_MASK), whole("gpa", gpa, 0, U64_MASK)
        try:
            mapped = MappedBuffer(buffer)
        except (BufferError, TypeError):
            raise WrongType("buffer", buffer, "a writable, contiguous buffer: a bytearray, an mmap") from None
        region.memory_size, region.userspace_addr = mapped.view.len, <uint64_t>mapped.view.buf
        checked(ioctl(self.fd, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION")
        if region.memory_size:
            self._mapped[slot] = mapped
        else:
            self._mapped.pop(slot, None)

    def set_tss_addr(self, gpa: int) -> None:
        """KVM_SET_TSS_ADDR: three pages that VMX needs for real mode."""
        checked(ioctl(self.fd, KVM_SET_TSS_ADDR, <unsigned long>whole("gpa", gpa, 0, U64_MASK)), "KVM_SET_TSS_ADDR")

    def set_identity_map_addr(self, gpa: int) -> None:
        """KVM_SET_IDENTITY_MAP_ADDR: one page that VMX needs for real mode."""
        cdef uint64_t address = whole("gpa", gpa, 0, U64_MASK)
        checked(ioctl(self.fd, KVM_SET_IDENTITY_MAP_ADDR, &address), "KVM_SET_IDENTITY_MAP_ADDR")

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP: LAPICs, IOAPIC and PIC in the kernel."""
        checked(ioctl(self.fd, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP")

    def set_msr_filter(self, denied: list[tuple[int, int, int, bytes]]) -> None:
        """KVM_X86_SET_MSR_FILTER, everything else allowed.

        denied: up to 16 of (flags, base, length, bitmap): flags 1 reads, 2 writes; a 0 bit sends MSR base + n to user
        space.  The first range that holds an MSR decides, by a 1 as much as by a 0.
        """
        cdef kvm_msr_filter msr_filter
        memset(&msr_filter, 0, sizeof(msr_filter))
        given = sequence("denied", denied, "a list of (flags, base, length, bitmap)")
        denied = [checked_filter_range(place, each) for place, each in enumerate(given)]
        if len(denied) > KVM_MSR_FILTER_MAX_RANGES:
            raise ConfigError(f"{len(denied)} MSR filter ranges; KVM takes {KVM_MSR_FILTER_MAX_RANGES}")
        msr_filter.flags = KVM_MSR_FILTER_DEFAULT_ALLOW
        padded = [bitmap + bytes(7) for _, _, _, bitmap in denied]  # KVM reads whole words
        for i, (flags, base, length, bitmap) in enumerate(denied):
            if length > 8 * len(bitmap):
                raise ConfigError(f"MSR filter range {base:#x}+{length}: a bitmap of {8 * len(bitmap)} bits")
            msr_filter.ranges[i].flags, msr_filter.ranges[i].base = flags, base
            msr_filter.ranges[i].nmsrs = length
            msr_filter.ranges[i].bitmap = <uint8_t *>(<bytes>padded[i])
        checked(ioctl(self.fd, KVM_X86_SET_MSR_FILTER, &msr_filter), "KVM_X86_SET_MSR_FILTER")

    def register_coalesced(self, address: int, length: int, *, is_port: bool) -> None:
        """KVM_REGISTER_COALESCED_MMIO: writes within these ports, or bytes of MMIO, go to the ring and do not exit.

        Vcpu.take_coalesced() has them.  A write that finds the ring full exits as any other, after those in the ring.
        """
        cdef kvm_coalesced_mmio_zone zone = coalesced_zone(address, length, is_port)
        checked(ioctl(self.fd, KVM_REGISTER_COALESCED_MMIO, &zone), "KVM_REGISTER_COALESCED_MMIO")

    def unregister_coalesced(self, address: int, length: int, *, is_port: bool) -> None:
        """KVM_UNREGISTER_COALESCED_MMIO: these writes exit again."""
        cdef kvm_coalesced_mmio_zone zone = coalesced_zone(address, length, is_port)
        checked(ioctl(self.fd, KVM_UNREGISTER_COALESCED_MMIO, &zone), "KVM_UNREGISTER_COALESCED_MMIO")

    def get_irqchip(self, chip_id: int) -> bytes:
        """KVM_GET_IRQCHIP: chip 0 and 1 the two PICs, 2 the IOAPIC, as struct kvm_irqchip."""
        cdef kvm_irqchip chip
        memset(&chip, 0, sizeof(chip))
        chip.chip_id = whole("chip_id", chip_id, 0, U32_MASK)
        checked(ioctl(self.fd, KVM_GET_IRQCHIP, &chip), "KVM_GET_IRQCHIP")
        return (<uint8_t *>&chip)[:sizeof(chip)]

    def set_irqchip(self, irqchip: bytes) -> None:
        """KVM_SET_IRQCHIP to what get_irqchip() gave, which names its chip."""
        cdef kvm_irqchip chip
        cdef bytes state = checked_data("irqchip", irqchip)
        if len(state) != sizeof(chip):
            raise ConfigError(f"irqchip of {len(state)} bytes; KVM's struct has {sizeof(chip)}")
        memcpy(&chip, <uint8_t *>state, sizeof(chip))
        checked(ioctl(self.fd, KVM_SET_IRQCHIP, &chip), "KVM_SET_IRQCHIP")

    def set_irq_line(self, gsi: int, *, is_high: bool) -> None:
        """KVM_IRQ_LINE: the level of an input of the in-kernel interrupt controllers."""
        cdef kvm_irq_level line
        memset(&line, 0, sizeof(line))
        line.irq, line.level = whole("gsi", gsi, 0, U32_MASK), flag("is_high", is_high)
        checked(ioctl(self.fd, KVM_IRQ_LINE, &line), "KVM_IRQ_LINE")

    def signal_msi(self, address: int, message: int) -> bool:
        """KVM_SIGNAL_MSI: raise the interrupt that a write of `message` to `address` is, on a VM with an irqchip.

        True if an APIC took it; False if the guest has blocked it, or no vCPU has that APIC id.
        """
        cdef kvm_msi msi
        cdef uint64_t target = whole("address", address, 0, U64_MASK)
        memset(&msi, 0, sizeof(msi))
        msi.address_lo, msi.address_hi = target & U32_MASK, target >> 32
        msi.data = whole("message", message, 0, U32_MASK)
        cdef int taken = ioctl(self.fd, KVM_SIGNAL_MSI, &msi)
        if taken < 0 and errno == EPERM:  # the -1 by which KVM says that there is no such APIC
            return False
        return checked(taken, "KVM_SIGNAL_MSI") > 0

    def get_clock(self) -> dict[str, int]:
        """KVM_GET_CLOCK: clock (ns), flags, realtime (ns), host_tsc; the last two are 0 unless flags say otherwise."""
        cdef kvm_clock_data data
        memset(&data, 0, sizeof(data))
        checked(ioctl(self.fd, KVM_GET_CLOCK, &data), "KVM_GET_CLOCK")
        return {"clock": data.clock, "flags": data.flags, "realtime": data.realtime, "host_tsc": data.host_tsc}

    def set_clock(self, clock: int, flags: int = 0, realtime: int = 0) -> None:
        """KVM_SET_CLOCK to `clock` ns."""
        cdef kvm_clock_data data
        memset(&data, 0, sizeof(data))
        data.clock, data.flags = whole("clock", clock, 0, U64_MASK), whole("flags", flags, 0, U32_MASK)
        data.realtime = whole("realtime", realtime, 0, U64_MASK)
        checked(ioctl(self.fd, KVM_SET_CLOCK, &data), "KVM_SET_CLOCK")

    def create_vcpu(self, vcpu_id: int) -> Vcpu:
        """KVM_CREATE_VCPU; vcpu_id is the APIC id."""
        cdef Vcpu vcpu = Vcpu.__new__(Vcpu)
        vcpu.vcpu_id = whole("vcpu_id", vcpu_id, 0, U32_MASK >> 1)
        vcpu.fd = checked(ioctl(self.fd, KVM_CREATE_VCPU, <unsigned long>vcpu.vcpu_id), "KVM_CREATE_VCPU")
        vcpu.run_bytes = self.run_bytes
        vcpu._mapped = self._mapped
        run = mmap(NULL, self.run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu.fd, 0)
        if run == MAP_FAILED:
            raise KvmError("mmap of kvm_run", errno)
        vcpu.run_page = <kvm_run *>run
        page = self.check_extension("KVM_CAP_COALESCED_MMIO")
        if self.run_bytes >= (page + 1) * PAGE_BYTES:
            vcpu.coalesced_at = page * PAGE_BYTES
        return vcpu
