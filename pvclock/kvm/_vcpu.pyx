"""A vCPU's file descriptor: KVM's vCPU ioctls and kvm_run, one method for each, and no policy.

Errors and close() are as in _fd.pyx.
"""

cimport cython
from libc.errno cimport EAGAIN, EINTR, EINVAL, ENXIO, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memmove, memset
from posix.mman cimport munmap

from pvclock.kvm._fd cimport U32_MASK, U64_MASK, Fd, checked, cpuid_entries, give_cpuid_entries
from pvclock.kvm._kvm_abi cimport *

from pvclock.arguments import data as checked_data
from pvclock.arguments import flag, function, sequence, whole
from pvclock.errors import ConfigError, KvmError, RangeError, StateError, WrongType
from pvclock.kvm import exits
from pvclock.kvm.arguments import members

# Made once: an IntFlag takes longer to make than the rest of the exit.
cdef tuple MSR_EXIT_REASONS = tuple([exits.MsrExitReason(bits) for bits in range(8)])

# The members of these structs, as the dicts that stand for them have them.
cdef kvm_regs NO_REGS
cdef kvm_sregs NO_SREGS
cdef kvm_cpuid_entry2 NO_CPUID_ENTRY
cdef dict REGS = NO_REGS
cdef dict SREGS = NO_SREGS
cdef dict CPUID_ENTRY = NO_CPUID_ENTRY

# Made without the Python function that a NamedTuple's __new__ is, which takes a third of a guest's exit.
cdef object new_tuple = tuple.__new__
cdef object RdmsrExit = exits.RdmsrExit
cdef object WrmsrExit = exits.WrmsrExit
cdef object Mmio = exits.Mmio
cdef object IoOut = exits.IoOut
cdef object IoIn = exits.IoIn
cdef object CoalescedWrite = exits.CoalescedWrite
cdef object INTERRUPTED = exits.Interrupted()

cdef str NO_MEMORY = "the VM has no memory: give it some by Vm.set_user_memory_region()"


cdef bint is_cpuid_entry(object given) except -1:
    """Is it well-formed, with plain ints?  There are 70 of them and more; members() says what any other lacks."""
    if type(given) is not dict or len(<dict>given) != len(CPUID_ENTRY):
        return False
    for name in CPUID_ENTRY:
        value = (<dict>given).get(name)
        if type(value) is not int or not 0 <= value <= U32_MASK:
            return False
    return True


cdef uint64_t as_word(str name, object given) except? 0:
    """A number of 64 bits; whole() says what is wrong with any other, and costs nothing for what is right."""
    if type(given) is int:
        try:
            return given
        except OverflowError:
            pass
    return whole(name, given, 0, U64_MASK)


cdef uint32_t transfer_msrs(
    int fd, unsigned long request, kvm_msrs *msrs, bint skips_unknown, str call
) except? 0xFFFFFFFF:
    """Get or set them: KVM does not fail at the first that it refuses, it says how many it took before that."""
    cdef uint32_t done = checked(ioctl(fd, request, msrs), call)
    while skips_unknown and done < msrs.nmsrs:
        msrs.nmsrs -= 1
        memmove(&msrs.entries[done], &msrs.entries[done + 1], (msrs.nmsrs - done) * sizeof(kvm_msr_entry))
        done = checked(ioctl(fd, request, msrs), call)
    return done


cdef tuple take_writes(kvm_coalesced_mmio_ring *ring):
    """The ring's writes so far, oldest first; they are the kernel's to overwrite from then on."""
    cdef uint32_t first = ring.first
    cdef uint32_t last = load_acquire(&ring.last, ACQUIRE)  # the kernel writes an entry before it counts it
    cdef kvm_coalesced_mmio *entry
    if first == last:
        return ()
    taken = []
    while first != last:
        entry = &ring.coalesced_mmio[first]
        data = entry.data[:min(entry.len, 8)]
        taken.append(new_tuple(CoalescedWrite, (entry.pio != 0, entry.phys_addr, data)))
        first = (first + 1) % COALESCED_MAX
    store_release(&ring.first, first, RELEASE)
    return tuple(taken)


cdef void unmap(kvm_run *page, size_t length) noexcept:
    if page is not NULL:
        munmap(page, length)


@cython.final
cdef class Vcpu(Fd):
    """A virtual CPU; made by Vm.create_vcpu().

    Thread-safety: while one thread is in run(), others may call request_exit() and take_coalesced(); the rest is a
    StateError, because KVM would let it wait for the guest's next exit.
    """

    def __dealloc__(self) -> None:
        unmap(self.run_page, self.run_bytes)

    def close(self) -> None:
        """Unmap kvm_run and close the vCPU; StateError while it runs."""
        self._idle_fd("close")
        unmap(self.run_page, self.run_bytes)
        self.run_page = NULL
        self._serve_write = None
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
        while True:
            self.running = True
            with nogil:
                failure = self._run()
            self.running = False
            if failure or not self._is_served():
                break
        if failure == EINTR:
            self.run_page.immediate_exit = 0
            return INTERRUPTED
        if failure:
            raise KvmError("KVM_RUN", failure, "" if self._mapped else NO_MEMORY)
        return self._exit()

    cdef int _run(self) noexcept nogil:
        """KVM_RUN until it exits; returns 0 or its errno."""
        while ioctl(self.fd, KVM_RUN, 0) != 0:
            # EAGAIN: an application processor took its INIT or SIPI and has not begun yet.
            if errno != EAGAIN:
                return errno
        return 0

    def serve_writes(self, serve: Callable[[int, int, int], bool] | None) -> None:
        """Have run() ask `serve(vcpu_id, index, value)` of each WRMSR exit first, and go on where that returns True.

        It is called on the thread in run(), with the vCPU out of the guest.  None: nobody is asked.
        """
        self._serve_write = None if serve is None else function("serve", serve)

    cdef bint _is_served(self) except -1:
        """Was this exit a WRMSR that serve_writes() answers?"""
        cdef kvm_run *run = self.run_page
        if self._serve_write is None or run.exit_reason != KVM_EXIT_X86_WRMSR:
            return False
        if not self._serve_write(self.vcpu_id, run.msr.index, run.msr.data):
            return False
        run.msr.error = 0
        return True

    def take_coalesced(self) -> tuple[CoalescedWrite, ...]:
        """Take the VM's coalesced writes so far, oldest first: all vCPUs share one ring, which each of them maps.

        One caller at a time gets each write: nothing here gives up the GIL.  Empty on a host without the ring.
        """
        if self.run_page is NULL or self.coalesced_at == 0:
            return ()
        return take_writes(<kvm_coalesced_mmio_ring *>(<uint8_t *>self.run_page + self.coalesced_at))

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
            return new_tuple(RdmsrExit, (run.msr.index, MSR_EXIT_REASONS[run.msr.reason & 7]))
        if reason == KVM_EXIT_X86_WRMSR:
            return new_tuple(WrmsrExit, (run.msr.index, run.msr.data, MSR_EXIT_REASONS[run.msr.reason & 7]))
        if reason == KVM_EXIT_MMIO:
            data = run.mmio.data[:run.mmio.len] if run.mmio.is_write else None
            return new_tuple(Mmio, (run.mmio.phys_addr, run.mmio.len, data))
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
            return new_tuple(IoOut, (run.io.port, run.io.size, data))
        return new_tuple(IoIn, (run.io.port, run.io.size, run.io.count))

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
        answer = as_word("value", value)
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

    def translate(self, linear: int) -> int | None:
        """KVM_TRANSLATE: the guest-physical address of a linear one, by the vCPU's page tables; None if unmapped."""
        cdef kvm_translation translation = kvm_translation(whole("linear", linear, 0, U64_MASK), 0, 0)
        checked(ioctl(self._idle_fd("translate"), KVM_TRANSLATE, &translation), "KVM_TRANSLATE")
        return translation.physical_address if translation.valid else None

    def get_cpuid(self) -> list[dict[str, int]]:
        """KVM_GET_CPUID2: the entries that set_cpuid() gave, with what KVM changes in them by the vCPU's state."""
        return cpuid_entries(self._idle_fd("get_cpuid"), KVM_GET_CPUID2, "KVM_GET_CPUID2")

    def set_cpuid(self, entries: list[dict[str, int]]) -> None:
        """KVM_SET_CPUID2: entries as of Kvm.get_supported_cpuid()."""
        sequence("entries", entries, "a list of entries, as Kvm.get_supported_cpuid() gives them")
        for place, entry in enumerate(entries):
            if not is_cpuid_entry(entry):
                members(f"entries[{place}]", entry, CPUID_ENTRY)
        give_cpuid_entries(self._idle_fd("set_cpuid"), entries)

    def get_msr(self, index: int) -> int:
        """KVM_GET_MSRS of one MSR, past every filter."""
        return self._msr("get_msr", KVM_GET_MSRS, "KVM_GET_MSRS", whole("index", index, 0, U32_MASK), 0)

    def set_msr(self, index: int, value: int) -> None:
        """KVM_SET_MSRS of one MSR, past every filter: a host-initiated write."""
        index, value = whole("index", index, 0, U32_MASK), whole("value", value, 0, U64_MASK)
        self._msr("set_msr", KVM_SET_MSRS, "KVM_SET_MSRS", index, value)

    cdef uint64_t _msr(self, str operation, unsigned long request, str call, uint32_t index, uint64_t value) except? 0:
        cdef uint64_t space[ONE_MSR_WORDS]
        cdef kvm_msrs *msrs = <kvm_msrs *>space
        memset(space, 0, sizeof(space))
        msrs.nmsrs, msrs.entries[0].index, msrs.entries[0].data = 1, index, value
        # KVM does not fail here: it says how many of the MSRs it took.
        if checked(ioctl(self._idle_fd(operation), request, msrs), call) != 1:
            raise KvmError(f"{call} {index:#x}", EINVAL)
        return msrs.entries[0].data

    def get_msrs(self, indices: list[int], *, skips_unknown: bool = False) -> dict[int, int]:
        """KVM_GET_MSRS, past every filter: values by index.  skips_unknown: leave out those that KVM does not have."""
        wanted = dict.fromkeys(sequence("indices", indices, "a list of MSRs' indices"), 0)
        return self._msrs("get_msrs", KVM_GET_MSRS, "KVM_GET_MSRS", wanted, flag("skips_unknown", skips_unknown))

    def set_msrs(self, values: dict[int, int]) -> None:
        """KVM_SET_MSRS, past every filter, in the order of the dict: host-initiated writes.

        KvmError names the first that KVM refuses; those before it are set.
        """
        if not isinstance(values, dict):
            raise WrongType("values", values, "a dict of MSRs' values by their indices")
        self._msrs("set_msrs", KVM_SET_MSRS, "KVM_SET_MSRS", values, False)

    cdef dict _msrs(self, str operation, unsigned long request, str call, dict values, bint skips_unknown):
        cdef kvm_msrs *msrs = <kvm_msrs *>calloc(1, sizeof(kvm_msrs) + len(values) * sizeof(kvm_msr_entry))
        cdef uint32_t done
        if msrs is NULL:
            raise MemoryError
        try:
            msrs.nmsrs = len(values)
            for i, (index, value) in enumerate(values.items()):
                msrs.entries[i].index = whole("index", index, 0, U32_MASK)
                msrs.entries[i].data = whole("value", value, 0, U64_MASK)
            done = transfer_msrs(self._idle_fd(operation), request, msrs, skips_unknown, call)
            if done < msrs.nmsrs:
                raise KvmError(f"{call} {msrs.entries[done].index:#x}", EINVAL)
            return {msrs.entries[i].index: msrs.entries[i].data for i in range(msrs.nmsrs)}
        finally:
            free(msrs)

    def get_mp_state(self) -> int:
        """KVM_GET_MP_STATE: 0 runnable, 1 uninitialised, 3 halted."""
        cdef kvm_mp_state state
        checked(ioctl(self._idle_fd("get_mp_state"), KVM_GET_MP_STATE, &state), "KVM_GET_MP_STATE")
        return state.mp_state

    def set_mp_state(self, mp_state: int) -> None:
        """KVM_SET_MP_STATE."""
        cdef kvm_mp_state state = kvm_mp_state(whole("mp_state", mp_state, 0, U32_MASK))
        checked(ioctl(self._idle_fd("set_mp_state"), KVM_SET_MP_STATE, &state), "KVM_SET_MP_STATE")

    def get_lapic(self) -> bytes:
        """KVM_GET_LAPIC: the local APIC's registers, as struct kvm_lapic_state."""
        return self._get_struct("get_lapic", KVM_GET_LAPIC, "KVM_GET_LAPIC", sizeof(kvm_lapic_state))

    def set_lapic(self, lapic: bytes) -> None:
        """KVM_SET_LAPIC to what get_lapic() gave."""
        self._set_struct("set_lapic", KVM_SET_LAPIC, "KVM_SET_LAPIC", sizeof(kvm_lapic_state), "lapic", lapic)

    def get_xsave(self) -> bytes:
        """KVM_GET_XSAVE: x87, SSE and AVX registers, as struct kvm_xsave."""
        return self._get_struct("get_xsave", KVM_GET_XSAVE, "KVM_GET_XSAVE", sizeof(kvm_xsave))

    def set_xsave(self, xsave: bytes) -> None:
        """KVM_SET_XSAVE to what get_xsave() gave."""
        self._set_struct("set_xsave", KVM_SET_XSAVE, "KVM_SET_XSAVE", sizeof(kvm_xsave), "xsave", xsave)

    def get_xcrs(self) -> bytes:
        """KVM_GET_XCRS: the extended control registers, as struct kvm_xcrs."""
        return self._get_struct("get_xcrs", KVM_GET_XCRS, "KVM_GET_XCRS", sizeof(kvm_xcrs))

    def set_xcrs(self, xcrs: bytes) -> None:
        """KVM_SET_XCRS to what get_xcrs() gave."""
        self._set_struct("set_xcrs", KVM_SET_XCRS, "KVM_SET_XCRS", sizeof(kvm_xcrs), "xcrs", xcrs)

    def get_debugregs(self) -> bytes:
        """KVM_GET_DEBUGREGS: DR0 to DR7, as struct kvm_debugregs."""
        return self._get_struct("get_debugregs", KVM_GET_DEBUGREGS, "KVM_GET_DEBUGREGS", sizeof(kvm_debugregs))

    def set_debugregs(self, debugregs: bytes) -> None:
        """KVM_SET_DEBUGREGS to what get_debugregs() gave."""
        self._set_struct(
            "set_debugregs", KVM_SET_DEBUGREGS, "KVM_SET_DEBUGREGS", sizeof(kvm_debugregs), "debugregs", debugregs
        )

    def get_vcpu_events(self) -> bytes:
        """KVM_GET_VCPU_EVENTS: pending exceptions, interrupts, NMIs and SMIs, as struct kvm_vcpu_events."""
        return self._get_struct("get_vcpu_events", KVM_GET_VCPU_EVENTS, "KVM_GET_VCPU_EVENTS", sizeof(kvm_vcpu_events))

    def set_vcpu_events(self, events: bytes) -> None:
        """KVM_SET_VCPU_EVENTS to what get_vcpu_events() gave."""
        self._set_struct(
            "set_vcpu_events", KVM_SET_VCPU_EVENTS, "KVM_SET_VCPU_EVENTS", sizeof(kvm_vcpu_events), "events", events
        )

    cdef bytes _get_struct(self, str operation, unsigned long request, str call, size_t length):
        cdef uint64_t space[MAX_STRUCT_WORDS]
        memset(space, 0, sizeof(space))
        checked(ioctl(self._idle_fd(operation), request, space), call)
        return (<uint8_t *>space)[:length]

    cdef int _set_struct(
        self, str operation, unsigned long request, str call, size_t length, str parameter, object given
    ) except -1:
        cdef bytes state = checked_data(parameter, given)
        if <size_t>len(state) != length:
            raise ConfigError(f"{parameter} of {len(state)} bytes; KVM's struct has {length}")
        checked(ioctl(self._idle_fd(operation), request, <uint8_t *>state), call)
        return 0

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
        cdef uint64_t value = as_word("offset", offset)
        checked(self._tsc_offset("set_tsc_offset", KVM_SET_DEVICE_ATTR, &value), "KVM_SET_DEVICE_ATTR TSC_OFFSET")

    cdef int _tsc_offset(self, str operation, unsigned long request, uint64_t *offset) except? -1:
        cdef kvm_device_attr attr
        memset(&attr, 0, sizeof(attr))
        attr.group, attr.attr, attr.addr = KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, <uint64_t>offset
        return ioctl(self._idle_fd(operation), request, &attr)
