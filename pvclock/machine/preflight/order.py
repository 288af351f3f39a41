"""In which order a VM's time has to be set up and restored, and which mistakes still show before it runs.

Source: Documentation/virt/kvm/api.rst; Linux arch/x86/kvm/x86.c and lapic.c.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from pvclock.machine.preflight.facts import GuestFacts, VcpuFacts
from pvclock.machine.preflight.findings import Finding, Severity
from pvclock.quantities import signed64

__all__ = ["ORDER_RULES", "OrderRule", "check_order"]

DEADLINE_TICKS_MAX: Final = (1 << 64) // 10**6
"""KVM multiplies the ticks to a deadline by 10^6 in 64 bits: from here on that wraps (start_sw_tscdeadline())."""


class OrderRule(NamedTuple):
    """`first` before `then`, because of `why`.  code: of the finding that shows the mistake, "" if nothing does."""

    first: str
    then: str
    why: str
    code: str = ""


ORDER_RULES: Final = (
    OrderRule(
        "KVM_SET_CPUID2",
        "KVM_SET_MSRS of the clock's MSRs",
        "KVM refuses MSRs whose feature CPUID does not offer, and ignores IA32_TSC_ADJUST",
        "clock-msr-not-served",
    ),
    OrderRule(
        "KVM_SET_TSC_KHZ",
        "IA32_TSC and the vCPU's TSC offset",
        "the TSC is scaled first, so that the same offset is another TSC afterwards",
    ),
    OrderRule(
        "IA32_TSC",
        "IA32_TSC_DEADLINE",
        "KVM computes the timer from the TSC at that instant",
        "deadline-before-tsc",
    ),
    OrderRule(
        "KVM_SET_LAPIC",
        "IA32_TSC_DEADLINE",
        "KVM drops a deadline while the timer is in another mode, and the guest waits for it for ever",
    ),
    OrderRule(
        "the TSCs of all vCPUs, on one offset",
        "KVM_SET_CLOCK",
        "the clock is set at the master clock's instant, which each TSC that differs takes away",
        "no-master-clock",
    ),
    OrderRule(
        "KVM_SET_CLOCK, or GuestClock.resume()",
        "the first KVM_RUN",
        "a guest that ran before it has seen the new VM's time, and then sees it step",
    ),
    OrderRule(
        "KVM_KVMCLOCK_CTRL, or resume(guest_stopped=True)",
        "the first KVM_RUN after a pause",
        "the flag comes with the page at the next entry; later, the guest's watchdogs have barked",
    ),
)


def check_order(facts: GuestFacts) -> Iterator[Finding]:
    """What shows of mistakes that no other check looks for."""
    for number, vcpu in enumerate(facts.vcpus):
        if vcpu.tsc_deadline and _ticks_to_deadline(vcpu) >= DEADLINE_TICKS_MAX:
            yield Finding(
                "deadline-before-tsc",
                Severity.ERROR,
                f"vCPU {number}'s TSC deadline is {_ticks_to_deadline(vcpu) / vcpu.tsc_hz:.0f} s ahead of its TSC",
                "a timer interrupt that comes early or hours late",
                "set IA32_TSC before IA32_TSC_DEADLINE, and both again now",
                number,
                {"tsc": vcpu.tsc, "tsc_deadline": vcpu.tsc_deadline},
            )


def _ticks_to_deadline(vcpu: VcpuFacts) -> int:
    return signed64(vcpu.tsc_deadline - vcpu.tsc)
