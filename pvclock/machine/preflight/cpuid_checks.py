"""Does CPUID offer what is served, and is what is served offered, where guests look for it, on every vCPU alike?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from pvclock.machine.cpuid import HYPERVISOR_LEAVES
from pvclock.machine.preflight.facts import GuestFacts, VcpuFacts
from pvclock.machine.preflight.findings import Finding, Severity
from pvclock.machine.preflight.offer import CLOCK_MSRS, Offer
from pvclock.providers.interface import CPUID_BASE
from pvclock.timekeeping.lapic import TSC_DEADLINE_MODE
from pvclock.tsc.vcpu_tsc import MSR_IA32_TSC_ADJUST

__all__ = ["check_cpuid"]

CLOCK_LEAVES: Final = (0x15, 0x16, 0x80000007, *HYPERVISOR_LEAVES[:0x100])
"""Leaves that say something of clocks and of no single vCPU."""


def check_cpuid(facts: GuestFacts) -> Iterator[Finding]:
    """What is wrong with it, of each vCPU where they differ and else of the first."""
    offer = facts.offer
    yield from _where_guests_look(offer, facts.vcpus[0].served_msrs)
    yield from _clock_msrs(facts.vcpus[0])
    yield from _stable(offer)
    yield from _tsc_adjust(facts.vcpus[0])
    yield from _tsc_deadline(facts)
    yield from _invariant_tsc(facts)
    yield from _differences(facts)


def _where_guests_look(offer: Offer, served_msrs: frozenset[int]) -> Iterator[Finding]:
    if offer.has_hypervisor_leaves and not offer.has_hypervisor_bit:
        yield Finding(
            "hypervisor-bit",
            Severity.ERROR,
            "there are hypervisor leaves, and CPUID.1:ECX[31] is clear",
            "it takes this for a bare machine, and uses none of the clocks that are offered",
            "set the bit, which patch_cpuid() does",
        )
    if not offer.bases and (offer.at(CPUID_BASE + 1).eax or not served_msrs.isdisjoint(CLOCK_MSRS)):
        yield Finding(
            "signature",
            Severity.ERROR,
            "there is a clock interface, and no leaf with its signature",
            "it does not know whose they are, and uses none of the clocks that are offered",
            "put the signature leaf at 0x40000000, or a multiple of 0x100 above it",
        )
    for base in offer.bases.values():
        yield from _maximum(offer, base)


def _maximum(offer: Offer, base: int) -> Iterator[Finding]:
    last = offer.at(base).eax or base + 1  # 0: an old KVM's, which means that
    beyond = [leaf for leaf, registers in offer.leaves.items() if last < leaf < base + 0x100 and any(registers)]
    if beyond:
        yield Finding(
            "maximum-leaf",
            Severity.WARNING,
            f"leaf {max(beyond):#x} is there, and leaf {base:#x} says that the last one is {last:#x}",
            "one that checks reads nothing of it",
            f"set EAX of leaf {base:#x} to {max(beyond):#x}",
            values={"base": base, "maximum": last, "leaves": beyond},
        )


def _clock_msrs(vcpu: VcpuFacts) -> Iterator[Finding]:
    offer = vcpu.offer
    for msr, feature in CLOCK_MSRS.items():
        if offer.offers_msr(msr) and msr not in vcpu.served_msrs:
            yield Finding(
                "clock-msr-not-served",
                Severity.ERROR,
                f"CPUID offers {feature}, and its MSR {msr:#x} is not served",
                "#GP when it sets its clock up: at best it goes on without that clock",
                "take the feature from CPUID, or have the MSR served: the clock's own leaves do both",
                values={"msr": msr},
            )
        elif msr in vcpu.served_msrs and offer.has_interface_of(msr) and not offer.offers_msr(msr):
            yield Finding(
                "clock-msr-not-offered",
                Severity.NOTE,
                f"MSR {msr:#x} is served, and CPUID does not offer its feature {feature}",
                "it does not use it",
                values={"msr": msr},
            )


def _stable(offer: Offer) -> Iterator[Finding]:
    if offer.has_kvmclock and not offer.has_stable:
        yield Finding(
            "stable-not-offered",
            Severity.WARNING,
            "KVM's clock is offered without CLOCKSOURCE_STABLE",
            "it ignores the flag TSC_STABLE of its pages: each reading is compared with the last of all vCPUs, and "
            "clock_gettime() is a system call; a Linux that takes its time from a constant TSC does not care",
            "offer the feature, unless the vCPUs' TSCs cannot agree",
        )


def _tsc_adjust(vcpu: VcpuFacts) -> Iterator[Finding]:
    is_served = MSR_IA32_TSC_ADJUST in vcpu.served_msrs
    if vcpu.offer.has_tsc_adjust and not is_served:
        yield Finding(
            "tsc-adjust-not-served",
            Severity.ERROR,
            "CPUID.7:EBX[1] offers IA32_TSC_ADJUST, and MSR 0x3b is not served",
            "#GP at its first look at it, when a CPU comes up",
            "have it served, or clear the bit",
        )
    elif not vcpu.offer.has_tsc_adjust and vcpu.offer.has_invariant_tsc:
        yield Finding(
            "tsc-adjust-not-offered",
            Severity.NOTE,
            "CPUID.7:EBX[1] is clear: there is no IA32_TSC_ADJUST",
            "Linux compares the TSCs of its CPUs by itself as each comes up, and holds its TSC against another clock "
            "all the time",
        )


def _tsc_deadline(facts: GuestFacts) -> Iterator[Finding]:
    offer, is_served = facts.offer, facts.host.serves_tsc_deadline
    if offer.has_tsc_deadline and not is_served:
        yield Finding(
            "tsc-deadline-not-served",
            Severity.ERROR,
            "CPUID.1:ECX[24] offers the TSC-deadline timer, and the LAPIC has no such mode",
            "its timers never expire: it hangs at boot",
            "clear the bit, or use the kernel's LAPIC",
        )
    if is_served and not offer.has_tsc_deadline:
        yield Finding(
            "tsc-deadline-not-offered",
            Severity.WARNING,
            "the LAPIC has the TSC-deadline mode, and CPUID.1:ECX[24] is clear",
            "it measures the LAPIC timer's frequency at boot, against a timer that it may not have, and its timers "
            "do not go by the clock that it reads",
            "set the bit",
        )
    for number, vcpu in enumerate(facts.vcpus):
        if vcpu.timer_mode == TSC_DEADLINE_MODE and not vcpu.offer.has_tsc_deadline:
            yield Finding(
                "tsc-deadline-mode",
                Severity.ERROR,
                f"vCPU {number}'s LAPIC timer is in TSC-deadline mode, and CPUID.1:ECX[24] is clear",
                "the timer that it set before it was saved never expires",
                "set the bit, as it was where the guest was saved",
                number,
            )


def _invariant_tsc(facts: GuestFacts) -> Iterator[Finding]:
    if facts.clock.offers_invariant_tsc and not facts.offer.has_invariant_tsc:
        yield Finding(
            "invariant-tsc-not-supported",
            Severity.WARNING,
            "an invariant TSC is to be offered, and this host's KVM does not show one",
            "a TSC that is not invariant, so it takes another clock",
            "take a host whose own TSC is invariant; in a VM, have that one show it (QEMU: +invtsc)",
        )


def _differences(facts: GuestFacts) -> Iterator[Finding]:
    first = facts.offer
    for number, vcpu in enumerate(facts.vcpus[1:], start=1):
        differ = [leaf for leaf in CLOCK_LEAVES if vcpu.offer.at(leaf) != first.at(leaf)]
        if differ:
            yield Finding(
                "cpuid-differs",
                Severity.WARNING,
                f"vCPU {number}'s CPUID says something else of clocks than vCPU 0's, in leaf {differ[0]:#x}",
                "it goes by vCPU 0's, or by that of the CPU that looks",
                "give all vCPUs the same leaves",
                number,
                {"leaves": differ},
            )
