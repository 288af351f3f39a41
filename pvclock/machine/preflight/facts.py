"""The facts that the pre-flight judges: of each vCPU, of what serves the clock, and of the host.

collect.py finds them; a VMM may fill them in itself.  Ticks are modulo 2^64.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Final, Literal, NamedTuple

from pvclock.kvm.tsc_offset import TscOffsets
from pvclock.machine.preflight.offer import CLOCK_MSRS, Offer
from pvclock.tsc.vcpu_tsc import MSR_IA32_TSC_ADJUST, VcpuTsc

__all__ = ["ASKED_MSRS", "ClockFacts", "GuestFacts", "HostFacts", "VcpuFacts"]

ASKED_MSRS: Final = (*CLOCK_MSRS, MSR_IA32_TSC_ADJUST)
"""The MSRs of which VcpuFacts says whether they are served."""
TRUSTED_CLOCKSOURCES: Final = ("tsc", "hyperv_clocksource_tsc_page")
"""With one of these the host's KVM has a master clock."""


class VcpuFacts(NamedTuple):
    """One vCPU.

    offer: what its CPUID offers, by read_offer().  served_msrs: those of ASKED_MSRS whose RDMSR does not fault.
    tsc_hz: KVM_GET_TSC_KHZ.  tsc_offset: the host's; None where it is not the VMM's to set.  tsc_adjust: what the guest
    reads.  tsc: RDTSC, about now.  tsc_deadline: IA32_TSC_DEADLINE.  timer_mode: the LAPIC's: 0
    one-shot, 1 periodic, 2 TSC deadline.
    """

    offer: Offer
    served_msrs: frozenset[int]
    tsc_hz: int
    tsc_offset: int | None = 0
    tsc_adjust: int = 0
    tsc: int = 0
    tsc_deadline: int = 0
    timer_mode: int = 0


class ClockFacts(NamedTuple):
    """What serves the guest's clock.

    tsc_offsets: those that the engine computes its pages with, one a vCPU; None of the kernel's clock.  allows_stable:
    does the guest's interface let a page say TSC_STABLE?  rate: guest seconds in a host's second.
    offers_invariant_tsc: is the guest to see that its TSC is invariant, if the host's KVM can show it?
    """

    served_by: Literal["engine", "kernel"]
    tsc_offsets: tuple[int, ...] | None = None
    allows_stable: bool = True
    rate: Fraction = Fraction(1)
    offers_invariant_tsc: bool = False


class HostFacts(NamedTuple):
    """The host.

    tsc_hz: its TSC's frequency as its kernel has it.  tsc_offsets: what becomes of a vCPU's.  scales_tsc: may a vCPU
    have another frequency?  serves_tsc_deadline: has the kernel's LAPIC that mode?  enforces_cpuid: does its KVM serve
    only those MSRs of its own clock that CPUID offers?  serves_hyperv: can it serve Hyper-V's?
    """

    clocksource: str
    tsc_hz: int
    tsc_offsets: TscOffsets = TscOffsets.HONOURED
    scales_tsc: bool = False
    serves_tsc_deadline: bool = True
    enforces_cpuid: bool = True
    serves_hyperv: bool = True

    @property
    def trusts_tsc(self) -> bool:
        """Does its kernel take the TSCs of its CPUs to be in step?"""
        return self.clocksource in TRUSTED_CLOCKSOURCES


class GuestFacts(NamedTuple):
    """A VM before its guest runs.

    has_calibration_timer: is there a PIT, an HPET or an ACPI PM timer, by which a guest can measure its TSC?
    """

    vcpus: tuple[VcpuFacts, ...]
    clock: ClockFacts
    host: HostFacts
    has_calibration_timer: bool = False

    @property
    def offer(self) -> Offer:
        """What the first vCPU's CPUID offers, by which a guest chooses its clock."""
        return self.vcpus[0].offer

    @property
    def offsets_are_known(self) -> bool:
        """Are the vCPUs' TSC offsets the VMM's own, so that they can be compared?"""
        return all(vcpu.tsc_offset is not None for vcpu in self.vcpus)

    @property
    def tscs(self) -> list[VcpuTsc]:
        """The vCPUs' TSCs as the host has them; offsets are 0 where they are not known."""
        return [
            VcpuTsc(vcpu.tsc_offset or 0, vcpu.tsc_adjust, rate=self.tsc_hz(vcpu) / self.host.tsc_hz)
            for vcpu in self.vcpus
        ]

    def tsc_hz(self, vcpu: VcpuFacts) -> Fraction:
        """At which frequency that vCPU's TSC does tick."""
        return Fraction(vcpu.tsc_hz if self.host.scales_tsc else self.host.tsc_hz)
