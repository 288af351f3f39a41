"""KVM's ioctls: one class for each kind of file descriptor, one method for each ioctl, and no policy.

Every failure is a KvmError with the ioctl's name and errno.  All objects are context managers; close() may be called
twice.  Source: Documentation/virt/kvm/api.rst.
"""

cimport cython
from cpython.buffer cimport PyBUF_CONTIG, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EAGAIN, EINTR, EINVAL, ENXIO, errno
from libc.signal cimport SIG_DFL
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.fcntl cimport O_CLOEXEC, O_RDWR, open
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from posix.signal cimport sigaction, sigaction_t, sigemptyset
from posix.unistd cimport close

from pvclock.kvm._kvm_abi cimport *

from pvclock.arguments import data as checked_data
from pvclock.arguments import flag, sequence, whole
from pvclock.arguments import path as checked_path
from pvclock.errors import ConfigError, KvmError, RangeError, StateError, WrongType
from pvclock.kvm import exits
from pvclock.kvm.arguments import members

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)

CAPABILITY_NUMBERS = {
    "KVM_CAP_IRQCHIP": KVM_CAP_IRQCHIP,
    "KVM_CAP_USER_MEMORY": KVM_CAP_USER_MEMORY,
    "KVM_CAP_SET_TSS_ADDR": KVM_CAP_SET_TSS_ADDR,
    "KVM_CAP_NR_VCPUS": KVM_CAP_NR_VCPUS,
    "KVM_CAP_ADJUST_CLOCK": KVM_CAP_ADJUST_CLOCK,
    "KVM_CAP_TSC_CONTROL": KVM_CAP_TSC_CONTROL,
    "KVM_CAP_GET_TSC_KHZ": KVM_CAP_GET_TSC_KHZ,
    "KVM_CAP_TSC_DEADLINE_TIMER": KVM_CAP_TSC_DEADLINE_TIMER,
    "KVM_CAP_KVMCLOCK_CTRL": KVM_CAP_KVMCLOCK_CTRL,
    "KVM_CAP_HYPERV_TIME": KVM_CAP_HYPERV_TIME,
    "KVM_CAP_VCPU_ATTRIBUTES": KVM_CAP_VCPU_ATTRIBUTES,
    "KVM_CAP_IMMEDIATE_EXIT": KVM_CAP_IMMEDIATE_EXIT,
    "KVM_CAP_STEAL_TIME": KVM_CAP_STEAL_TIME,
    "KVM_CAP_X86_USER_SPACE_MSR": KVM_CAP_X86_USER_SPACE_MSR,
    "KVM_CAP_X86_MSR_FILTER": KVM_CAP_X86_MSR_FILTER,
    "KVM_CAP_ENFORCE_PV_FEATURE_CPUID": KVM_CAP_ENFORCE_PV_FEATURE_CPUID,
    "KVM_CAP_VM_TSC_CONTROL": KVM_CAP_VM_TSC_CONTROL,
}

# Made once: an IntFlag takes longer to make than the rest of the exit.
cdef tuple MSR_EXIT_REASONS = tuple([exits.MsrExitReason(bits) for bits in range(8)])

# What the dicts that stand for these structs have in them.
cdef kvm_regs NO_REGS
cdef kvm_sregs NO_SREGS
cdef kvm_cpuid_entry2 NO_CPUID_ENTRY
cdef dict REGS = NO_REGS
cdef dict SREGS = NO_SREGS
cdef dict CPUID_ENTRY = NO_CPUID_ENTRY

cdef str NO_MEMORY = "the VM has no memory: give it some by Vm.set_user_memory_region()"
cdef int SIGNALS = 64
cdef object U32_MASK = (1 << 32) - 1
cdef object U64_MASK = (1 << 64) - 1
cdef int MAX_CPUID_ENTRIES = 256
cdef enum:
    CONSOLE_BYTES = 4096


cdef unsigned long capability_number(object capability) except? 0:
    """A capability given by its name or by its number."""
    if not isinstance(capability, str):
        return whole("capability", capability, 0, U32_MASK)
    if capability not in CAPABILITY_NUMBERS:
        raise ConfigError(f"capability {capability!r} is not known by name; give its number in <linux/kvm.h>")
    return CAPABILITY_NUMBERS[capability]


cdef long checked(long result, str call) except -1:
    if result < 0:
        raise KvmError(call, errno)
    return result


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


cdef class Fd:
    """A file descriptor of KVM."""

    cdef int fd

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
        cdef kvm_cpuid2 *cpuid = <kvm_cpuid2 *>calloc(
            1, sizeof(kvm_cpuid2) + MAX_CPUID_ENTRIES * sizeof(kvm_cpuid_entry2)
        )
        if cpuid is NULL:
            raise MemoryError
        try:
            cpuid.nent = MAX_CPUID_ENTRIES
            checked(ioctl(self.fd, KVM_GET_SUPPORTED_CPUID, cpuid), "KVM_GET_SUPPORTED_CPUID")
            return [cpuid.entries[i] for i in range(cpuid.nent)]
        finally:
            free(cpuid)

    def create_vm(self) -> Vm:
        """KVM_CREATE_VM."""
        cdef Vm vm = Vm.__new__(Vm)
        vm.fd = checked(ioctl(self.fd, KVM_CREATE_VM, 0), "KVM_CREATE_VM")
        vm.run_bytes = checked(ioctl(self.fd, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE")
        return vm


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

    cdef size_t run_bytes
    cdef dict _mapped  # by slot; shared with the vCPUs, for each of them keeps the kernel's VM alive

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
        return vcpu


@cython.final
cdef class Vcpu(Fd):
    """A virtual CPU; made by Vm.create_vcpu().

    Thread-safety: while one thread is in run(), others may call request_exit() and take_console(); the rest is a
    StateError, for KVM would let it wait for the guest's next exit.
    console_port: one-byte writes to it are kept for take_console() without an exit to Python; -1 for none.
    """

    cdef readonly int vcpu_id
    cdef public int console_port
    cdef kvm_run *run_page
    cdef size_t run_bytes
    cdef dict _mapped  # the VM's
    cdef bint running
    cdef volatile uint8_t console[CONSOLE_BYTES]
    cdef volatile size_t console_written  # by the thread that runs the vCPU
    cdef volatile size_t console_taken

    def __cinit__(self) -> None:
        self.console_port = -1

    def __dealloc__(self) -> None:
        if self.run_page is not NULL:
            munmap(self.run_page, self.run_bytes)

    def close(self) -> None:
        """Unmap kvm_run and close the vCPU; StateError while it runs."""
        self._idle_fd("close")
        if self.run_page is not NULL:
            munmap(self.run_page, self.run_bytes)
        self.run_page = NULL
        Fd.close(self)
        self._mapped = None

    cdef int _idle_fd(self, str operation) except? -1:
        """The descriptor, for what KVM does only while the vCPU is out of the guest."""
        if self.running:
            raise StateError(operation, f"vCPU {self.vcpu_id} is running", "pause it first")
        return self.fd

    cdef kvm_run *_exited(self, str operation, uint32_t reason, uint32_t or_reason) except NULL:
        """kvm_run, if it holds an exit of that kind: its union means something else at every other time."""
        self._idle_fd(operation)
        if self.run_page is NULL or self.run_page.exit_reason not in (reason, or_reason):
            raise StateError(operation, f"vCPU {self.vcpu_id} has no such exit to answer", "answer what run() returned")
        return self.run_page

    # Running

    def run(self) -> exits.Exit:
        """KVM_RUN, without the GIL, until an exit that Python must see; Interrupted after a kick or a signal."""
        cdef int failure
        if self.run_page is NULL:
            raise StateError("run", f"vCPU {self.vcpu_id} is closed", "make another one")
        self._idle_fd("run")
        self.running = True
        with nogil:
            failure = self._run()
        self.running = False
        if failure == EINTR:
            self.run_page.immediate_exit = 0
            return exits.Interrupted()
        if failure:
            raise KvmError("KVM_RUN", failure, "" if self._mapped else NO_MEMORY)
        return self._exit()

    cdef int _run(self) noexcept nogil:
        """Run until an exit that Python must see; returns 0 or the errno of KVM_RUN."""
        while True:
            if ioctl(self.fd, KVM_RUN, 0) == 0:
                if not self._kept_console_byte():
                    return 0
            # EAGAIN: an application processor took its INIT or SIPI and has not begun yet.
            elif errno != EAGAIN:
                return errno

    cdef bint _kept_console_byte(self) noexcept nogil:
        cdef kvm_run *run = self.run_page
        if run.exit_reason != KVM_EXIT_IO or run.io.port != self.console_port:
            return False
        if run.io.direction != KVM_EXIT_IO_OUT or run.io.size * run.io.count != 1:
            return False
        if self.console_written - self.console_taken == CONSOLE_BYTES:
            return False
        self.console[self.console_written % CONSOLE_BYTES] = (<uint8_t *>run)[run.io.data_offset]
        self.console_written += 1
        return True

    def take_console(self) -> bytes:
        """The bytes that the guest wrote to the console port since the last call; one caller at a time."""
        cdef size_t written = self.console_written  # once: the vCPU may be writing more
        taken = bytearray()
        while self.console_taken != written:
            taken.append(self.console[self.console_taken % CONSOLE_BYTES])
            self.console_taken += 1
        return bytes(taken)

    def request_exit(self) -> None:
        """Make the present or the next KVM_RUN return Interrupted; a thread inside it needs a signal as well."""
        if self.run_page is not NULL:
            self.run_page.immediate_exit = 1

    cdef _exit(self):
        cdef kvm_run *run = self.run_page
        cdef uint32_t reason = run.exit_reason
        if reason == KVM_EXIT_IO:
            return self._io_exit()
        if reason == KVM_EXIT_X86_RDMSR:
            return exits.RdmsrExit(run.msr.index, MSR_EXIT_REASONS[run.msr.reason & 7])
        if reason == KVM_EXIT_X86_WRMSR:
            return exits.WrmsrExit(run.msr.index, run.msr.data, MSR_EXIT_REASONS[run.msr.reason & 7])
        if reason == KVM_EXIT_MMIO:
            data = run.mmio.data[:run.mmio.len] if run.mmio.is_write else None
            return exits.Mmio(run.mmio.phys_addr, run.mmio.len, data)
        if reason == KVM_EXIT_HLT:
            return exits.Halt()
        if reason == KVM_EXIT_SHUTDOWN:
            return exits.Shutdown()
        if reason == KVM_EXIT_SYSTEM_EVENT:
            return exits.SystemEvent(run.system_event.type)
        if reason == KVM_EXIT_FAIL_ENTRY:
            return exits.FailEntry(run.fail_entry.hardware_entry_failure_reason)
        if reason == KVM_EXIT_INTERNAL_ERROR:
            data = tuple([run.internal.data[i] for i in range(min(run.internal.ndata, 16))])
            return exits.InternalError(run.internal.suberror, data)
        return exits.UnknownExit(reason)

    cdef _io_exit(self):
        cdef kvm_run *run = self.run_page
        cdef size_t length = run.io.size * run.io.count
        if run.io.direction == KVM_EXIT_IO_OUT:
            data = (<uint8_t *>run + run.io.data_offset)[:length]
            return exits.IoOut(run.io.port, run.io.size, data)
        return exits.IoIn(run.io.port, run.io.size, run.io.count)

    def complete_io(self, data: bytes) -> None:
        """Answer IoIn with size * count bytes, given to the guest at the next run()."""
        data = checked_data("data", data)
        cdef kvm_run *run = self._exited("complete_io", KVM_EXIT_IO, KVM_EXIT_IO)
        cdef Py_ssize_t length = run.io.size * run.io.count
        if len(data) != length:
            raise ConfigError(f"answer of {len(data)} bytes to an IN of {length}")
        memcpy(<uint8_t *>run + run.io.data_offset, <uint8_t *>data, length)

    def complete_mmio(self, data: bytes) -> None:
        """Answer an Mmio read with as many bytes as it asks for."""
        data = checked_data("data", data)
        cdef kvm_run *run = self._exited("complete_mmio", KVM_EXIT_MMIO, KVM_EXIT_MMIO)
        if len(data) != run.mmio.len:
            raise ConfigError(f"answer of {len(data)} bytes to a read of {run.mmio.len}")
        memcpy(run.mmio.data, <uint8_t *>data, len(data))

    def complete_msr(self, value: int = 0, *, fault: bool = False) -> None:
        """Answer RdmsrExit or WrmsrExit: `value` for a read, or #GP(0) in the guest at the next run()."""
        cdef uint64_t answer
        cdef bint fails = fault is True
        if not fails and fault is not False:
            flag("fault", fault)
        if type(value) is not int:
            value = whole("value", value)
        try:
            answer = value
        except OverflowError:  # which costs nothing for what is right
            answer = whole("value", value, 0, U64_MASK)
        cdef kvm_run *run = self._exited("complete_msr", KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR)
        run.msr.data = answer
        run.msr.error = fails

    # Registers

    def get_regs(self) -> dict[str, int]:
        """KVM_GET_REGS: rax to r15, rip, rflags."""
        cdef kvm_regs regs
        checked(ioctl(self._idle_fd("get_regs"), KVM_GET_REGS, &regs), "KVM_GET_REGS")
        return regs

    def set_regs(self, regs: dict[str, int]) -> None:
        """KVM_SET_REGS: all that get_regs() gives."""
        cdef kvm_regs c = members("regs", regs, REGS)
        checked(ioctl(self._idle_fd("set_regs"), KVM_SET_REGS, &c), "KVM_SET_REGS")

    def get_sregs(self) -> dict[str, object]:
        """KVM_GET_SREGS: segments (dicts), gdt, idt, cr0 to cr8, efer, apic_base, interrupt_bitmap."""
        cdef kvm_sregs sregs
        checked(ioctl(self._idle_fd("get_sregs"), KVM_GET_SREGS, &sregs), "KVM_GET_SREGS")
        return sregs

    def set_sregs(self, sregs: dict[str, object]) -> None:
        """KVM_SET_SREGS: all that get_sregs() gives."""
        cdef kvm_sregs c
        try:
            c = members("sregs", sregs, SREGS)
        except OverflowError as error:
            raise RangeError(f"sregs: {error}; a segment's selector has 16 bits and its limit 32") from None
        checked(ioctl(self._idle_fd("set_sregs"), KVM_SET_SREGS, &c), "KVM_SET_SREGS")

    def set_cpuid(self, entries: list[dict[str, int]]) -> None:
        """KVM_SET_CPUID2: entries as of Kvm.get_supported_cpuid()."""
        sequence("entries", entries, "a list of entries, as Kvm.get_supported_cpuid() gives them")
        for place, entry in enumerate(entries):
            members(f"entries[{place}]", entry, CPUID_ENTRY)
        cdef kvm_cpuid2 *cpuid = <kvm_cpuid2 *>calloc(1, sizeof(kvm_cpuid2) + len(entries) * sizeof(kvm_cpuid_entry2))
        if cpuid is NULL:
            raise MemoryError
        try:
            cpuid.nent = len(entries)
            for i, entry in enumerate(entries):
                cpuid.entries[i].function, cpuid.entries[i].index = entry["function"], entry["index"]
                cpuid.entries[i].flags = entry["flags"]
                cpuid.entries[i].eax, cpuid.entries[i].ebx = entry["eax"], entry["ebx"]
                cpuid.entries[i].ecx, cpuid.entries[i].edx = entry["ecx"], entry["edx"]
            checked(ioctl(self._idle_fd("set_cpuid"), KVM_SET_CPUID2, cpuid), "KVM_SET_CPUID2")
        finally:
            free(cpuid)

    def get_msr(self, index: int) -> int:
        """KVM_GET_MSRS of one MSR, past every filter."""
        return self._msr("get_msr", KVM_GET_MSRS, "KVM_GET_MSRS", whole("index", index, 0, U32_MASK), 0)

    def set_msr(self, index: int, value: int) -> None:
        """KVM_SET_MSRS of one MSR, past every filter: a host-initiated write."""
        index, value = whole("index", index, 0, U32_MASK), whole("value", value, 0, U64_MASK)
        self._msr("set_msr", KVM_SET_MSRS, "KVM_SET_MSRS", index, value)

    cdef uint64_t _msr(
        self, str operation, unsigned long request, str call, uint32_t index, uint64_t value
    ) except? 0:
        cdef uint64_t space[ONE_MSR_WORDS]
        cdef kvm_msrs *msrs = <kvm_msrs *>space
        memset(space, 0, sizeof(space))
        msrs.nmsrs, msrs.entries[0].index, msrs.entries[0].data = 1, index, value
        # KVM does not fail here: it says how many of the MSRs it took.
        if checked(ioctl(self._idle_fd(operation), request, msrs), call) != 1:
            raise KvmError(f"{call} {index:#x}", EINVAL)
        return msrs.entries[0].data

    def get_mp_state(self) -> int:
        """KVM_GET_MP_STATE: 0 runnable, 1 uninitialised, 3 halted."""
        cdef kvm_mp_state state
        checked(ioctl(self._idle_fd("get_mp_state"), KVM_GET_MP_STATE, &state), "KVM_GET_MP_STATE")
        return state.mp_state

    def set_mp_state(self, mp_state: int) -> None:
        """KVM_SET_MP_STATE."""
        cdef kvm_mp_state state = kvm_mp_state(whole("mp_state", mp_state, 0, U32_MASK))
        checked(ioctl(self._idle_fd("set_mp_state"), KVM_SET_MP_STATE, &state), "KVM_SET_MP_STATE")

    # Time

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ."""
        return checked(ioctl(self._idle_fd("get_tsc_khz"), KVM_GET_TSC_KHZ, 0), "KVM_GET_TSC_KHZ")

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ."""
        cdef unsigned long rate_khz = whole("khz", khz, 0, U32_MASK)
        checked(ioctl(self._idle_fd("set_tsc_khz"), KVM_SET_TSC_KHZ, rate_khz), "KVM_SET_TSC_KHZ")

    def kvmclock_ctrl(self) -> None:
        """KVM_KVMCLOCK_CTRL: the kernel's clock shows GUEST_STOPPED from the next run() on."""
        checked(ioctl(self._idle_fd("kvmclock_ctrl"), KVM_KVMCLOCK_CTRL, 0), "KVM_KVMCLOCK_CTRL")

    def has_tsc_offset(self) -> bool:
        """KVM_HAS_DEVICE_ATTR of the TSC offset.  A host that has it may still not honour it."""
        cdef int result = self._tsc_offset("has_tsc_offset", KVM_HAS_DEVICE_ATTR, NULL)
        if result < 0 and errno in (ENXIO, EINVAL):  # EINVAL before Linux 5.16
            return False
        return checked(result, "KVM_HAS_DEVICE_ATTR TSC_OFFSET") == 0

    def get_tsc_offset(self) -> int:
        """KVM_GET_DEVICE_ATTR of the TSC offset, in ticks."""
        cdef uint64_t offset = 0
        checked(self._tsc_offset("get_tsc_offset", KVM_GET_DEVICE_ATTR, &offset), "KVM_GET_DEVICE_ATTR TSC_OFFSET")
        return offset

    def set_tsc_offset(self, offset: int) -> None:
        """KVM_SET_DEVICE_ATTR of the TSC offset, in ticks modulo 2^64."""
        cdef uint64_t value = whole("offset", offset, 0, U64_MASK)
        checked(self._tsc_offset("set_tsc_offset", KVM_SET_DEVICE_ATTR, &value), "KVM_SET_DEVICE_ATTR TSC_OFFSET")

    cdef int _tsc_offset(self, str operation, unsigned long request, uint64_t *offset) except? -1:
        cdef kvm_device_attr attr
        memset(&attr, 0, sizeof(attr))
        attr.group, attr.attr, attr.addr = KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, <uint64_t>offset
        return ioctl(self._idle_fd(operation), request, &attr)


cdef void do_nothing(int signum) noexcept nogil:
    pass


def install_kick_signal(signum: int) -> None:
    """Let `signum` interrupt KVM_RUN in the thread that gets it, and do nothing else.

    StateError if the process uses the signal already.
    """
    cdef sigaction_t ours, old
    memset(&ours, 0, sizeof(ours))
    ours.sa_handler = do_nothing
    sigemptyset(&ours.sa_mask)
    signum = whole("kick_signal", signum, 1, SIGNALS)
    checked(sigaction(signum, NULL, &old), "sigaction")
    if old.sa_handler != SIG_DFL and old.sa_handler != do_nothing:
        raise StateError("install_kick_signal", f"signal {signum} has a handler already", "choose another kick signal")
    checked(sigaction(signum, &ours, NULL), "sigaction")
