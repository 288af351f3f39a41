"""The state in which vCPUs and interrupt controllers come out of reset, kept when they are made and put back later.

KVM has no ioctl that resets a vCPU, so its registers are what they were before the first instruction.
"""

from __future__ import annotations

from typing import Final

from pvclock.kvm import Vcpu, Vm
from pvclock.kvm.exits import Interrupted

__all__ = ["PowerOnState"]

PICS_AND_IOAPIC: Final = (0, 1, 2)
"""KVM_IRQCHIP_PIC_MASTER, _PIC_SLAVE, _IOAPIC."""

GUEST_MSRS: Final = (
    *(0x174, 0x175, 0x176),  # SYSENTER_CS, _ESP, _EIP
    *(0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084),  # STAR, LSTAR, CSTAR, SFMASK
    *(0xC0000102, 0xC0000103),  # KERNEL_GS_BASE, TSC_AUX
    *(0x48, 0x122, 0xDA0),  # SPEC_CTRL, TSX_CTRL, XSS
    *(0x140, 0x17A, 0xC0010015),  # MISC_FEATURES_ENABLES (CPUID faulting), MCG_STATUS, HWCR
    *(0x1A0, 0x1D9, 0x277),  # MISC_ENABLE, DEBUGCTL, PAT
    *(0x2FF, 0x250, 0x258, 0x259, *range(0x268, 0x270), *range(0x200, 0x210)),  # MTRRs
    *(0x3B, 0x6E0),  # TSC_ADJUST, which host writes set without the TSC, and TSC_DEADLINE
    *(0x11, 0x12, *range(0x4B564D00, 0x4B564D06)),  # KVM's, where the kernel serves them
)
"""What a guest can write; those that a host's KVM does not have are left out.  IA32_TSC goes on."""


class PowerOnState:
    """Of `vcpus` that have not run yet and of the in-kernel interrupt controllers of `vm`."""

    def __init__(self, vm: Vm, vcpus: list[Vcpu]) -> None:
        self._vm = vm
        self._vcpus = [_VcpuState(vcpu) for vcpu in vcpus]
        self._chips = [vm.get_irqchip(chip) for chip in PICS_AND_IOAPIC]

    def add(self, vcpu: Vcpu) -> None:
        """Of this vCPU, too, which has not run yet either; again without harm."""
        if not any(each.vcpu is vcpu for each in self._vcpus):
            self._vcpus.append(_VcpuState(vcpu))

    def restore(self) -> None:
        """Put it back; for vCPUs without threads."""
        for chip in self._chips:
            self._vm.set_irqchip(chip)
        for each in self._vcpus:
            each.restore()


class _VcpuState:
    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu
        self._regs, self._sregs = vcpu.get_regs(), vcpu.get_sregs()
        self._xsave, self._xcrs, self._debugregs = vcpu.get_xsave(), vcpu.get_xcrs(), vcpu.get_debugregs()
        self._events, self._lapic, self._mp_state = vcpu.get_vcpu_events(), vcpu.get_lapic(), vcpu.get_mp_state()
        self._msrs = vcpu.get_msrs(list(GUEST_MSRS), skips_unknown=True)

    def restore(self) -> None:
        vcpu = self.vcpu
        vcpu.request_exit()
        # The kernel finishes the instruction of the last exit, which would change the new registers.  It may exit again
        # for the rest of one that crosses a page or repeats: there its answer is whatever lies there.
        while type(vcpu.run()) is not Interrupted:
            pass
        vcpu.set_mp_state(self._mp_state)  # before the LAPIC: it drops a SIPI that waits
        vcpu.set_regs(self._regs)
        vcpu.set_xsave(self._xsave)
        vcpu.set_xcrs(self._xcrs)
        vcpu.set_sregs(self._sregs)  # before MSRs and LAPIC: EFER, and the APIC's base and mode
        changed = self._msrs.items() - vcpu.get_msrs(list(self._msrs)).items()
        vcpu.set_msrs(dict(changed))
        vcpu.set_vcpu_events(self._events)
        vcpu.set_debugregs(self._debugregs)
        vcpu.set_lapic(self._lapic)
