"""Collects the pre-flight's facts, by ioctls, from vCPUs that do not run; nothing in the VM changes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

from pvclock.arguments import flag, instance
from pvclock.clock.guest_clock import GuestClock
from pvclock.errors import ConfigError, MsrFault
from pvclock.host.backend import Backend
from pvclock.host.linux import host_clocksource
from pvclock.kvm import Kvm, KvmBackend, SteeredTscBackend, TscOffsets, Vcpu, open_kvm, probe_tsc_offsets
from pvclock.kvm.arguments import vcpus_of
from pvclock.machine.cpuid import INVARIANT_TSC
from pvclock.machine.preflight.facts import ASKED_MSRS, ClockFacts, GuestFacts, HostFacts, VcpuFacts
from pvclock.machine.preflight.offer import REFERENCE_TSC_MSR, Offer, read_offer
from pvclock.msr_ranges import MsrRange
from pvclock.providers.interface import CpuidLeaf
from pvclock.quantities import U64_MASK, HostTsc
from pvclock.timekeeping.lapic import timer_mode
from pvclock.timekeeping.travel import MSR_IA32_TSC_DEADLINE
from pvclock.tsc.vcpu_tsc import MSR_IA32_TSC, MSR_IA32_TSC_ADJUST

__all__ = ["guest_facts", "host_facts"]


def guest_facts(vcpus: Sequence[Vcpu], clock: GuestClock | None, *, has_calibration_timer: bool = False) -> GuestFacts:
    """The facts of a VM whose vCPUs, by number, do not run.  clock: the engine's; None where the kernel serves it.

    Takes a ms, or some 100 ms if the clock's backend does not know what this host does with TSC offsets: then
    throw-away VMs are asked.
    """
    flag("has_calibration_timer", has_calibration_timer)
    if clock is not None and instance("clock", clock, GuestClock).vcpus_present != len(vcpus_of(vcpus)):
        raise ConfigError(f"a clock of {clock.vcpus_present} vCPUs, and {len(vcpus)} vCPUs; both are the VM's")
    host = host_facts(None if clock is None else clock.backend)
    served = _clock_facts(clock, len(vcpus_of(vcpus)))
    offsets = served.tsc_offsets or [None] * len(vcpus)
    own = tuple(_vcpu_facts(vcpu, clock, host, offset) for vcpu, offset in zip(vcpus, offsets, strict=True))
    return GuestFacts(own, served, host, has_calibration_timer)


def host_facts(backend: Backend | None = None) -> HostFacts:
    """The facts of this host.  backend: of a clock on its vCPUs, which may know some."""
    with closing(open_kvm()) as kvm:
        tsc_hz, tsc_offsets = _known_to(backend) or (_default_tsc_hz(kvm), probe_tsc_offsets(kvm))
        return HostFacts(
            clocksource=host_clocksource(),
            tsc_hz=tsc_hz,
            tsc_offsets=tsc_offsets,
            scales_tsc=bool(kvm.check_extension("KVM_CAP_TSC_CONTROL")),
            serves_tsc_deadline=bool(kvm.check_extension("KVM_CAP_TSC_DEADLINE_TIMER")),
            enforces_cpuid=bool(kvm.check_extension("KVM_CAP_ENFORCE_PV_FEATURE_CPUID")),
            serves_hyperv=bool(kvm.check_extension("KVM_CAP_HYPERV_TIME")),
        )


def _known_to(backend: Backend | None) -> tuple[int, TscOffsets] | None:
    """The TSC's frequency and what becomes of offsets, as the backend found when it was made."""
    if isinstance(backend, SteeredTscBackend):
        return backend.tsc_hz, TscOffsets.STEERED
    if isinstance(backend, KvmBackend):
        return backend.tsc_hz, TscOffsets.IGNORED if backend.tsc_offset(0) is None else TscOffsets.HONOURED
    return None


def _default_tsc_hz(kvm: Kvm) -> int:
    with closing(kvm.create_vm()) as vm, closing(vm.create_vcpu(0)) as vcpu:
        return vcpu.get_tsc_khz() * 1000


def _vcpu_facts(vcpu: Vcpu, clock: GuestClock | None, host: HostFacts, clock_offset: int | None) -> VcpuFacts:
    number, offer = vcpu.vcpu_id, read_offer(vcpu.get_cpuid())
    offset = vcpu.get_tsc_offset() if host.tsc_offsets is TscOffsets.HONOURED else None
    tsc = vcpu.get_msr(MSR_IA32_TSC)
    if clock is not None and clock.is_paused:  # the host gets the offset when it goes on
        offset = clock_offset if offset is not None else None
        tsc = clock.guest_tsc(number, HostTsc(0))
    return VcpuFacts(
        offer=offer,
        served_msrs=frozenset(msr for msr in ASKED_MSRS if _is_served(number, clock, msr, offer, host)),
        tsc_hz=vcpu.get_tsc_khz() * 1000,
        tsc_offset=offset,
        tsc_adjust=vcpu.get_msr(MSR_IA32_TSC_ADJUST) if clock is None else clock.tsc(number).adjust,
        tsc=tsc,
        tsc_deadline=vcpu.get_msr(MSR_IA32_TSC_DEADLINE),
        timer_mode=timer_mode(vcpu.get_lapic()),
    )


def _is_served(vcpu: int, clock: GuestClock | None, msr: int, offer: Offer, host: HostFacts) -> bool:
    """Does a guest's RDMSR of it not fault?  The engine answers for what exits to it, the kernel for the rest."""
    if clock is None or not any(_exits(msr, each) for each in clock.msr_ranges):
        return _kernel_serves(msr, offer, host)
    try:
        clock.read_msr(vcpu, msr)
    except MsrFault:
        return False
    return True


def _kernel_serves(msr: int, offer: Offer, host: HostFacts) -> bool:
    """By its rules: to user space KVM_GET_MSRS gives zeros also where a guest's RDMSR faults (Linux 6.13)."""
    if msr == MSR_IA32_TSC_ADJUST:
        return True
    if msr == REFERENCE_TSC_MSR:
        return host.serves_hyperv and offer.offers_msr(msr)
    return offer.offers_msr(msr) or not host.enforces_cpuid


def _exits(msr: int, msrs: MsrRange) -> bool:
    return msrs.reads and msr not in msrs.kept and 0 <= msr - msrs.base < msrs.length


def _clock_facts(clock: GuestClock | None, vcpus: int) -> ClockFacts:
    if clock is None:
        return ClockFacts("kernel")
    now = HostTsc(clock.backend.counter.read())  # one for all: a TSC that is stopped has another offset at each instant
    offsets = tuple((clock.guest_tsc(vcpu, now) - now) & U64_MASK for vcpu in range(vcpus))
    shown = clock.patch_cpuid(0x80000007, 0, CpuidLeaf(edx=INVARIANT_TSC)).edx
    return ClockFacts("engine", offsets, clock.interface.provider.allows_stable, clock.dilation, shown != 0)
