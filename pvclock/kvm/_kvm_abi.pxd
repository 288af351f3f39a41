# SPDX-License-Identifier: Apache-2.0 OR MIT
"""C declarations of <linux/kvm.h> and <asm/kvm.h>: numbers and layouts come from the system's headers."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from *:
    """
    #include <linux/kvm.h>
    #ifndef KVM_VCPU_TSC_CTRL /* since Linux 5.16 */
    #define KVM_VCPU_TSC_CTRL 0
    #define KVM_VCPU_TSC_OFFSET 0
    #endif
    #ifndef KVM_CAP_VM_TSC_CONTROL /* since Linux 5.18 */
    #define KVM_CAP_VM_TSC_CONTROL 214
    #endif
    #ifndef KVM_GET_STATS_FD /* since Linux 5.14 */
    #define KVM_GET_STATS_FD _IO(KVMIO, 0xce)
    #endif
    enum { MAX_STRUCT_WORDS = sizeof(struct kvm_xsave) / 8 };
    enum { COALESCED_MAX = (4096 - sizeof(struct kvm_coalesced_mmio_ring)) / sizeof(struct kvm_coalesced_mmio) };
    enum { ONE_MSR_WORDS = (sizeof(struct kvm_msrs) + sizeof(struct kvm_msr_entry)) / 8 };
    """
    cdef enum:
        ONE_MSR_WORDS
        MAX_STRUCT_WORDS  # kvm_xsave is the largest of those that are bytes here
        COALESCED_MAX  # entries of the ring, of which one stays empty

    const unsigned long KVM_GET_API_VERSION, KVM_CREATE_VM, KVM_CHECK_EXTENSION, KVM_GET_VCPU_MMAP_SIZE
    const unsigned long KVM_GET_SUPPORTED_CPUID, KVM_GET_SUPPORTED_HV_CPUID
    const unsigned long KVM_CREATE_VCPU, KVM_SET_USER_MEMORY_REGION, KVM_SET_TSS_ADDR, KVM_SET_IDENTITY_MAP_ADDR
    const unsigned long KVM_CREATE_IRQCHIP, KVM_ENABLE_CAP, KVM_X86_SET_MSR_FILTER, KVM_GET_CLOCK, KVM_SET_CLOCK
    const unsigned long KVM_RUN, KVM_GET_REGS, KVM_SET_REGS, KVM_GET_SREGS, KVM_SET_SREGS, KVM_SET_CPUID2
    const unsigned long KVM_GET_CPUID2
    const unsigned long KVM_GET_MSRS, KVM_SET_MSRS, KVM_GET_TSC_KHZ, KVM_SET_TSC_KHZ, KVM_KVMCLOCK_CTRL
    const unsigned long KVM_GET_MP_STATE, KVM_SET_MP_STATE, KVM_HAS_DEVICE_ATTR, KVM_GET_DEVICE_ATTR
    const unsigned long KVM_SET_DEVICE_ATTR, KVM_REGISTER_COALESCED_MMIO, KVM_UNREGISTER_COALESCED_MMIO
    const unsigned long KVM_GET_LAPIC, KVM_SET_LAPIC, KVM_GET_XSAVE, KVM_SET_XSAVE, KVM_GET_XCRS, KVM_SET_XCRS
    const unsigned long KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS, KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS
    const unsigned long KVM_GET_STATS_FD
    const unsigned long KVM_GET_IRQCHIP, KVM_SET_IRQCHIP, KVM_SIGNAL_MSI, KVM_IRQ_LINE, KVM_TRANSLATE

    const int KVM_CAP_IRQCHIP, KVM_CAP_USER_MEMORY, KVM_CAP_SET_TSS_ADDR, KVM_CAP_NR_VCPUS, KVM_CAP_ADJUST_CLOCK
    const int KVM_CAP_TSC_CONTROL, KVM_CAP_GET_TSC_KHZ, KVM_CAP_TSC_DEADLINE_TIMER, KVM_CAP_KVMCLOCK_CTRL
    const int KVM_CAP_HYPERV_TIME, KVM_CAP_VCPU_ATTRIBUTES, KVM_CAP_IMMEDIATE_EXIT, KVM_CAP_STEAL_TIME
    const int KVM_CAP_X86_USER_SPACE_MSR, KVM_CAP_X86_MSR_FILTER, KVM_CAP_ENFORCE_PV_FEATURE_CPUID
    const int KVM_CAP_VM_TSC_CONTROL, KVM_CAP_MAX_VCPUS, KVM_CAP_COALESCED_MMIO, KVM_CAP_COALESCED_PIO
    const int KVM_CAP_HYPERV_SYNIC, KVM_CAP_HYPERV_ENFORCE_CPUID, KVM_CAP_SYS_HYPERV_CPUID, KVM_CAP_SIGNAL_MSI

    const uint32_t KVM_VCPU_TSC_CTRL
    const uint64_t KVM_VCPU_TSC_OFFSET
    const uint32_t KVM_MSR_FILTER_READ, KVM_MSR_FILTER_WRITE, KVM_MSR_FILTER_MAX_RANGES
    const uint32_t KVM_MSR_FILTER_DEFAULT_ALLOW

    const uint32_t KVM_EXIT_UNKNOWN, KVM_EXIT_IO, KVM_EXIT_HLT, KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN
    const uint32_t KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_SYSTEM_EVENT
    const uint32_t KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR
    const uint8_t KVM_EXIT_IO_OUT

    cdef struct kvm_cpuid_entry2:
        uint32_t function, index, flags, eax, ebx, ecx, edx

    cdef struct kvm_cpuid2:
        uint32_t nent
        kvm_cpuid_entry2 entries[0]

    cdef struct kvm_userspace_memory_region:
        uint32_t slot, flags
        uint64_t guest_phys_addr, memory_size, userspace_addr

    cdef struct kvm_enable_cap:
        uint32_t cap, flags
        uint64_t args[4]

    cdef struct kvm_msr_filter_range:
        uint32_t flags, nmsrs, base
        uint8_t *bitmap

    cdef struct kvm_msr_filter:
        uint32_t flags
        kvm_msr_filter_range ranges[16]

    cdef struct kvm_clock_data:
        uint64_t clock
        uint32_t flags
        uint64_t realtime, host_tsc

    cdef struct kvm_msr_entry:
        uint32_t index
        uint64_t data

    cdef struct kvm_msrs:
        uint32_t nmsrs
        kvm_msr_entry entries[0]

    cdef struct kvm_mp_state:
        uint32_t mp_state

    cdef struct kvm_translation:
        uint64_t linear_address, physical_address
        uint8_t valid

    cdef struct kvm_device_attr:
        uint32_t flags, group
        uint64_t attr, addr

    cdef struct kvm_coalesced_mmio_zone:
        uint64_t addr
        uint32_t size, pio

    cdef struct kvm_coalesced_mmio:
        uint64_t phys_addr
        uint32_t len, pio
        uint8_t data[8]

    cdef struct kvm_coalesced_mmio_ring:
        uint32_t first, last
        kvm_coalesced_mmio coalesced_mmio[0]

    cdef struct kvm_irqchip:
        uint32_t chip_id

    cdef struct kvm_irq_level:
        uint32_t irq, level

    cdef struct kvm_msi:
        uint32_t address_lo, address_hi, data

    # Copied as bytes: only the kernel reads their members.
    cdef struct kvm_lapic_state:
        pass

    cdef struct kvm_xsave:
        pass

    cdef struct kvm_xcrs:
        pass

    cdef struct kvm_debugregs:
        pass

    cdef struct kvm_vcpu_events:
        pass

    cdef struct kvm_regs:
        uint64_t rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags

    cdef struct kvm_segment:
        uint64_t base
        uint32_t limit
        uint16_t selector
        uint8_t type, present, dpl, db, s, l, g, avl, unusable

    cdef struct kvm_dtable:
        uint64_t base
        uint16_t limit

    cdef struct kvm_sregs:
        kvm_segment cs, ds, es, fs, gs, ss, tr, ldt
        kvm_dtable gdt, idt
        uint64_t cr0, cr2, cr3, cr4, cr8, efer, apic_base
        unsigned long long interrupt_bitmap[4]

    # kvm_run's union is anonymous; its members are reached by name all the same.
    cdef struct kvm_run_io "":
        uint8_t direction, size
        uint16_t port
        uint32_t count
        uint64_t data_offset

    cdef struct kvm_run_mmio "":
        uint64_t phys_addr
        uint8_t data[8]
        uint32_t len
        uint8_t is_write

    cdef struct kvm_run_msr "":
        uint8_t error
        uint32_t reason, index
        uint64_t data

    cdef struct kvm_run_fail_entry "":
        uint64_t hardware_entry_failure_reason

    cdef struct kvm_run_internal "":
        uint32_t suberror, ndata
        uint64_t data[16]

    cdef struct kvm_run_system_event "":
        uint32_t type

    cdef struct kvm_run_hw "":
        uint64_t hardware_exit_reason

    cdef struct kvm_run:
        uint8_t immediate_exit
        uint32_t exit_reason
        kvm_run_io io
        kvm_run_mmio mmio
        kvm_run_msr msr
        kvm_run_fail_entry fail_entry
        kvm_run_internal internal
        kvm_run_system_event system_event
        kvm_run_hw hw


cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)


cdef extern from * nogil:
    const int ACQUIRE "__ATOMIC_ACQUIRE"
    const int RELEASE "__ATOMIC_RELEASE"
    uint32_t load_acquire "__atomic_load_n"(uint32_t *word, int order)
    void store_release "__atomic_store_n"(uint32_t *word, uint32_t value, int order)
