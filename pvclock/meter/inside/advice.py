"""What to change on the host for a fault that was found, or in the guest until then.

Sources: QEMU's CPU properties and docs/system/i386/hyperv.rst; libvirt's "Time keeping" and "CPU features"; Linux's
kernel-parameters.txt, Documentation/virt/kvm/x86/timekeeping.rst and arch/x86/kvm/x86.c; VirtualBox's manual, 9;
xl.cfg(5), tsc_mode; VMware's "Timekeeping".
"""

from __future__ import annotations

from typing import Final, NamedTuple

__all__ = ["CALIBRATION_CHANGE", "STOPPED_CHANGE", "STOPPED_CLEARED", "Remedies", "frequency_change"]

HOST_TSC: Final = (
    "host: its own TSC must be sound: current_clocksource in /sys/devices/system/clocksource/clocksource0 is tsc, and "
    "dmesg has no `TSC ADJUST` and no `unstable`; do not silence that with tsc=reliable"
)
KVM_SYNC: Final = (
    "any VMM: one TSC offset for all vCPUs; what makes them differ: a migration or a restore that sets each vCPU's TSC "
    "by itself, a guest or its firmware that writes IA32_TSC on one CPU, a host whose TSCs are not synchronised"
)
TCG_SYNC: Final = "QEMU: -accel tcg,thread=single, or -icount shift=auto: all vCPUs then have one clock"
HVF_SYNC: Final = (
    "VMM (QEMU, UTM, Docker Desktop, Multipass) and macOS: try newer versions, for they have set vCPUs' TSCs apart; or "
    "give the guest one vCPU"
)
VIRTUALBOX_SYNC: Final = (
    "VirtualBox: VBoxManage modifyvm NAME --paravirt-provider=kvm; if the TSCs stay apart: VBoxManage setextradata "
    "NAME VBoxInternal/TM/TSCMode VirtTSCEmulated"
)
VMWARE_SYNC: Final = 'VMware: leave monitor_control.virtual_rdtsc at its default, "TRUE", in the .vmx file'
XEN_SYNC: Final = 'Xen: tsc_mode="always_emulate" in the domain\'s configuration'
HYPERV_SYNC: Final = (
    "QEMU as Hyper-V: -cpu host,hv-time,hv-frequencies; libvirt: <timer name='hypervclock' present='yes'/>; on Hyper-V "
    "itself the host has to be put right"
)
SYNC: Final = {
    "KVM": (HOST_TSC, KVM_SYNC),
    "QEMU's TCG": (TCG_SYNC,),
    "Apple's Hypervisor.framework (HVF)": (HVF_SYNC,),
    "VirtualBox": (VIRTUALBOX_SYNC,),
    "VMware": (VMWARE_SYNC,),
    "Xen": (XEN_SYNC,),
    "Hyper-V": (HYPERV_SYNC,),
}
"""By hypervisor, how all CPUs come to have one TSC."""

STABLE_CHANGE: Final = (
    "QEMU: take the promise back, -cpu host,kvmclock-stable-bit=off: Linux then keeps all CPUs in order by itself, at "
    "the price of a shared variable; libvirt can only leave kvmclock out: <timer name='kvmclock' present='no'/>"
)
INVARIANT_CHANGE: Final = (
    "QEMU: do not promise what is not kept: -cpu host,invtsc=off; libvirt: <feature policy='disable' name='invtsc'/>"
)
TIMING_LEAF_CHANGE: Final = (
    "QEMU: -cpu host,vmware-cpuid-freq=off, or tsc-frequency=HZ with the true one; libvirt: <timer name='tsc' "
    "frequency='HZ'/>"
)
CPU_LEAF_CHANGE: Final = "VMM: hide leaves 0x15 and 0x16, or fill them in for the guest's own TSC where that is scaled"
PAGE_CHANGE: Final = "host: compare its own tsc clock with another one; QEMU: tsc-frequency=HZ with the true one"
CALIBRATION_CHANGE: Final = (
    "guest: take tsc_early_khz= off its command line; let it ask the hypervisor or CPUID instead of a PIT or an HPET "
    "that is held up (a newer kernel, or kvmclock)"
)
GUEST_FREQUENCY: Final = "guest, until then: boot with tsc_early_khz=KHZ, the true one"
STOPPED_CLEARED: Final = "Linux clears it when its lockup watchdog next looks"
STOPPED_CHANGE: Final = (
    f"{STOPPED_CLEARED}; if it is set again after that, the VMM calls KVM_KVMCLOCK_CTRL without a pause"
)

EVENTS: Final = "a pause and resume, a migration, a snapshot or restore"
KVM_STEP: Final = (
    f"host: what was done to the VM at that moment: {EVENTS}, each of which sets its clock (KVM_SET_CLOCK); the host's "
    "suspend; or a refresh of KVM's master clock (the host left clocksource tsc, or a vCPU's TSC was written)"
)
VMM_STEP: Final = f"host: what was done to the VM at that moment: {EVENTS}, or the host's suspend"
HOST_RATE: Final = (
    "host: what its NTP did at that moment (chronyc tracking; journalctl -u chrony): devices that a host emulates go "
    "by its own clock, which NTP steers"
)
KVM_RATE: Final = (
    "host: whether KVM took up or lost its master clock then (the host left clocksource tsc, or a vCPU's TSC was "
    "written), or a migration brought another host, whose TSC has another rate"
)
BY_KVM: Final = frozenset({"KVM"})
BY_QEMU: Final = frozenset({"KVM", "QEMU's TCG"})
SLOW_CLOCKS: Final = ("hpet", "acpi_pm")


class Remedies(NamedTuple):
    """What can be changed under that hypervisor; clocksources: those that the guest's kernel has, if it is known."""

    hypervisor: str
    clocksources: tuple[str, ...] = ()

    def for_offset(self) -> tuple[str, ...]:
        """How all CPUs come to have one TSC."""
        return (*SYNC.get(self.hypervisor, (HOST_TSC,)), *self._in_the_guest())

    def for_promise(self, *, is_stable: bool) -> tuple[str, ...]:
        """How a promise is kept, or taken back."""
        back = (STABLE_CHANGE if is_stable else INVARIANT_CHANGE,) if self.hypervisor in BY_QEMU else ()
        return (*SYNC.get(self.hypervisor, (HOST_TSC,)), *back, *self._in_the_guest())

    def for_step(self) -> tuple[str, ...]:
        """What makes a clock step."""
        return (KVM_STEP if self.hypervisor in BY_KVM else VMM_STEP,)

    def for_rate(self) -> tuple[str, ...]:
        """What makes a clock change its rate."""
        return (HOST_RATE, KVM_RATE) if self.hypervisor in BY_KVM else (HOST_RATE,)

    def _in_the_guest(self) -> tuple[str, ...]:
        """A clock that all CPUs share, if its kernel has one."""
        shared = [name for name in SLOW_CLOCKS if name in self.clocksources]
        words = " or ".join(f"clocksource={name}" for name in shared)
        return (f"guest, until then: boot with {words}: slow, and the same on all CPUs",) if shared else ()


def frequency_change(source: str) -> tuple[str, ...]:
    """How a guest is told the TSC's own frequency."""
    if "0x40000010" in source:
        return (TIMING_LEAF_CHANGE, GUEST_FREQUENCY)
    return (CPU_LEAF_CHANGE, GUEST_FREQUENCY) if "CPUID" in source else (PAGE_CHANGE,)
