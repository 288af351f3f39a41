"""One call for each ioctl, by the name that its errors carry."""

import errno
from collections.abc import Callable

import pytest

from pvclock.errors import KvmError
from pvclock.kvm import Kvm, Vcpu, Vm
from pvclock.kvm._stats import VcpuStats
from tests.kvm.guests import REGISTERS

SEGMENT_FIELDS = ("base", "limit", "selector", "type", "present", "dpl", "db", "s", "l", "g", "avl", "unusable")

BLANK_SREGS = {
    **{name: dict.fromkeys(SEGMENT_FIELDS, 0) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")},
    **{name: {"base": 0, "limit": 0} for name in ("gdt", "idt")},
    **dict.fromkeys(("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base"), 0),
    "interrupt_bitmap": [0] * 4,
}

VCPU_CALLS: dict[str, Callable[[Vcpu], object]] = {
    "KVM_GET_STATS_FD": VcpuStats,
    "KVM_RUN": Vcpu.run,
    "KVM_GET_REGS": Vcpu.get_regs,
    "KVM_SET_REGS": lambda vcpu: vcpu.set_regs(dict.fromkeys(REGISTERS, 0)),
    "KVM_GET_SREGS": Vcpu.get_sregs,
    "KVM_SET_SREGS": lambda vcpu: vcpu.set_sregs(BLANK_SREGS),
    "KVM_GET_CPUID2": Vcpu.get_cpuid,
    "KVM_SET_CPUID2": lambda vcpu: vcpu.set_cpuid([]),
    "KVM_TRANSLATE": lambda vcpu: vcpu.translate(0),
    "KVM_GET_MSRS": lambda vcpu: vcpu.get_msr(0x10),
    "KVM_SET_MSRS": lambda vcpu: vcpu.set_msr(0x10, 0),
    "KVM_GET_MP_STATE": Vcpu.get_mp_state,
    "KVM_SET_MP_STATE": lambda vcpu: vcpu.set_mp_state(0),
    "KVM_GET_LAPIC": Vcpu.get_lapic,
    "KVM_SET_LAPIC": lambda vcpu: vcpu.set_lapic(bytes(1024)),
    "KVM_GET_XSAVE": Vcpu.get_xsave,
    "KVM_SET_XSAVE": lambda vcpu: vcpu.set_xsave(bytes(4096)),
    "KVM_GET_XCRS": Vcpu.get_xcrs,
    "KVM_SET_XCRS": lambda vcpu: vcpu.set_xcrs(bytes(392)),
    "KVM_GET_DEBUGREGS": Vcpu.get_debugregs,
    "KVM_SET_DEBUGREGS": lambda vcpu: vcpu.set_debugregs(bytes(128)),
    "KVM_GET_VCPU_EVENTS": Vcpu.get_vcpu_events,
    "KVM_SET_VCPU_EVENTS": lambda vcpu: vcpu.set_vcpu_events(bytes(64)),
    "KVM_GET_TSC_KHZ": Vcpu.get_tsc_khz,
    "KVM_SET_TSC_KHZ": lambda vcpu: vcpu.set_tsc_khz(10**6),
    "KVM_KVMCLOCK_CTRL": Vcpu.kvmclock_ctrl,
    "KVM_HAS_DEVICE_ATTR": Vcpu.has_tsc_offset,
    "KVM_GET_DEVICE_ATTR": Vcpu.get_tsc_offset,
    "KVM_SET_DEVICE_ATTR": lambda vcpu: vcpu.set_tsc_offset(0),
    "KVM_ENABLE_CAP": lambda vcpu: vcpu.enable_cap(0, 0),
}
VM_CALLS: dict[str, Callable[[Vm], object]] = {
    "KVM_SET_USER_MEMORY_REGION": lambda vm: vm.set_user_memory_region(0, 0, bytearray(1)),
    "KVM_SET_TSS_ADDR": lambda vm: vm.set_tss_addr(0),
    "KVM_SET_IDENTITY_MAP_ADDR": lambda vm: vm.set_identity_map_addr(0),
    "KVM_CREATE_IRQCHIP": Vm.create_irqchip,
    "KVM_GET_IRQCHIP": lambda vm: vm.get_irqchip(0),
    "KVM_SET_IRQCHIP": lambda vm: vm.set_irqchip(bytes(520)),
    "KVM_REGISTER_COALESCED_MMIO": lambda vm: vm.register_coalesced(0xE9, 1, is_port=True),
    "KVM_UNREGISTER_COALESCED_MMIO": lambda vm: vm.unregister_coalesced(0xE9, 1, is_port=True),
    "KVM_IRQ_LINE": lambda vm: vm.set_irq_line(4, is_high=True),
    "KVM_SIGNAL_MSI": lambda vm: vm.signal_msi(0xFEE00000, 0x20),
    "KVM_X86_SET_MSR_FILTER": lambda vm: vm.set_msr_filter([]),
    "KVM_GET_CLOCK": Vm.get_clock,
    "KVM_SET_CLOCK": lambda vm: vm.set_clock(0),
    "KVM_CREATE_VCPU": lambda vm: vm.create_vcpu(0),
    "KVM_CHECK_EXTENSION": lambda vm: vm.check_extension(0),
    "KVM_ENABLE_CAP": lambda vm: vm.enable_cap(0, 0),
}
KVM_CALLS: dict[str, Callable[[Kvm], object]] = {
    "KVM_GET_API_VERSION": Kvm.get_api_version,
    "KVM_GET_SUPPORTED_CPUID": Kvm.get_supported_cpuid,
    "KVM_GET_SUPPORTED_HV_CPUID": Kvm.get_supported_hv_cpuid,
    "KVM_CREATE_VM": Kvm.create_vm,
    "KVM_CHECK_EXTENSION": lambda kvm: kvm.check_extension(0),
}


def refused(call: str, action: Callable[[], object]) -> int:
    """Return the errno of the KvmError that `action` raises, which names `call`."""
    with pytest.raises(KvmError) as caught:
        action()
    assert caught.value.call.partition(" ")[0] == call
    assert errno.errorcode[caught.value.errno or 0] in str(caught.value)
    return caught.value.errno or 0
