"""What software in the guest sees of a fault, and what to change: on the host, or in the guest until then.

Sources: QEMU's CPU properties and docs/system/i386/hyperv.rst; libvirt's "Time keeping" and "CPU features"; Linux's
kernel-parameters.txt; VirtualBox's manual, 9; xl.cfg(5), tsc_mode; VMware's "Timekeeping".
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "STOPPED_CHANGE",
    "frequency_change",
    "promise_change",
    "sees_apart",
    "sees_drift",
    "sees_step",
    "sync_change",
    "title",
]

TITLES: Final = {
    "tsc": "TSC",
    "monotonic": "CLOCK_MONOTONIC",
    "monotonic_raw": "CLOCK_MONOTONIC_RAW",
    "pvclock": "kvmclock",
    "hyperv": "Hyper-V reference time",
    "pit": "PIT",
    "acpi_pm": "ACPI PM timer",
}

WHO_FAILS: Final = {
    "tsc": "what reads RDTSC itself (profilers, tracers, databases, DPDK), and every clock that Linux makes of it,",
    "monotonic": "std::chrono::steady_clock, Java's nanoTime(), Go's and Rust's monotonic time and Erlang's clock",
    "monotonic_raw": "what reads CLOCK_MONOTONIC_RAW (time daemons, tracers)",
    "pvclock": "every clock that a guest's kernel makes of kvmclock",
    "hyperv": "every clock that a guest's kernel makes of Hyper-V's reference time",
}
CRASHES: Final = " Programs that take that for impossible end themselves: Erlang's runtime and Chromium do."

GUEST_SLOW: Final = (
    "guest, until then: boot with clocksource=hpet or clocksource=acpi_pm: slow, and the same on all CPUs"
)
HOST_TSC: Final = (
    "host: its own TSC must be sound: current_clocksource in /sys/devices/system/clocksource/clocksource0 is tsc, and "
    "dmesg has no `TSC ADJUST` and no `unstable`; do not silence that with tsc=reliable"
)
KVM_SYNC: Final = (
    "QEMU: one frequency for all vCPUs, -cpu host,tsc-frequency=HZ; libvirt: <timer name='tsc' "
    "frequency='HZ'/>; any VMM: after a migration or a restore one TSC offset for all vCPUs"
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
    "itself it is the host's to mend"
)
SYNC: Final = {
    "KVM": (HOST_TSC, KVM_SYNC, GUEST_SLOW),
    "QEMU's TCG": (TCG_SYNC, GUEST_SLOW),
    "Apple's Hypervisor.framework (HVF)": (HVF_SYNC, GUEST_SLOW),
    "VirtualBox": (VIRTUALBOX_SYNC, GUEST_SLOW),
    "VMware": (VMWARE_SYNC, GUEST_SLOW),
    "Xen": (XEN_SYNC, GUEST_SLOW),
    "Hyper-V": (HYPERV_SYNC, GUEST_SLOW),
}
"""By hypervisor, how all CPUs come to have one TSC; the guest's own way out is the last."""

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
GUEST_FREQUENCY: Final = "guest, until then: boot with tsc_early_khz=KHZ, the true one"
STOPPED_CHANGE: Final = (
    "Linux clears it when its lockup watchdog next has something to say; if it is set again after that, the VMM calls "
    "KVM_KVMCLOCK_CTRL without a pause"
)


def title(clock: str) -> str:
    """A clock as software calls it."""
    return TITLES.get(clock, clock)


def sees_apart(clock: str, most: str) -> str:
    """What software sees where two CPUs' readings of a clock differ by `most`, in words."""
    crashes = CRASHES if clock in {"monotonic", "pvclock", "hyperv"} else ""
    return f"{_who(clock)} can see time go back by {most} when a thread moves from one CPU to another.{crashes}"


def sees_step(clock: str, size: str, *, is_back: bool) -> str:
    """What software sees of a step."""
    if is_back:
        return (
            f"{_who(clock)} see time go back by {size}.{CRASHES if clock in {'monotonic', 'pvclock', 'hyperv'} else ''}"
        )
    return f"{_who(clock)} see {size} pass at once: timeouts expire, leases end, watchdogs may fire."


def sees_drift(clock: str) -> str:
    """What software sees of an offset that moves."""
    return (
        f"{_who(clock)} can see time go back when a thread moves between these CPUs, by more the longer the guest runs."
    )


def sync_change(hypervisor: str) -> tuple[str, ...]:
    """How all CPUs come to have one TSC."""
    return SYNC.get(hypervisor, (HOST_TSC, GUEST_SLOW))


def promise_change(hypervisor: str, *, is_stable: bool) -> tuple[str, ...]:
    """How a promise is kept, or taken back."""
    back = (STABLE_CHANGE if is_stable else INVARIANT_CHANGE,) if hypervisor in {"KVM", "QEMU's TCG"} else ()
    return (*sync_change(hypervisor)[:-1], *back, GUEST_SLOW)


def frequency_change(source: str) -> tuple[str, ...]:
    """How a guest is told the TSC's own frequency."""
    if "0x40000010" in source:
        return (TIMING_LEAF_CHANGE, GUEST_FREQUENCY)
    return (CPU_LEAF_CHANGE, GUEST_FREQUENCY) if "CPUID" in source else (PAGE_CHANGE,)


def _who(clock: str) -> str:
    return WHO_FAILS.get(clock, f"what reads {title(clock)}")
