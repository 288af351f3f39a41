"""Do the vCPUs' TSCs agree, does the host honour their offsets, and does the clock know them?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from pvclock.errors import RangeError
from pvclock.kvm.tsc_offset import TscOffsets
from pvclock.machine.preflight.facts import GuestFacts
from pvclock.machine.preflight.findings import Finding, Severity
from pvclock.quantities import NS_PER_S, signed64
from pvclock.tsc.agreement import OffsetWrite, VcpuComparison, agreement, repair_plan

__all__ = ["check_tscs", "repair_writes"]

REPAIRS: Final = {
    "engine": "put all vCPUs on one offset: GuestClock.repair_tsc()",
    "kernel": "put all vCPUs on one offset, and write it to each, for KVM counts the writes: Vcpu.set_tsc_offset()",
}


def check_tscs(facts: GuestFacts) -> Iterator[Finding]:
    """What is wrong with them."""
    yield from _not_honoured(facts)
    compared = agreement(facts.tscs)
    if not compared.rates_agree:
        yield Finding(
            "tsc-rates-differ",
            Severity.ERROR,
            "the vCPUs' TSCs have different frequencies",
            "clocks that drift apart between its CPUs, and a time that goes back when a task moves",
            "give all vCPUs one frequency",
            values={"tsc_hz": [vcpu.tsc_hz for vcpu in facts.vcpus]},
        )
    for vcpu in compared.vcpus:
        yield from _apart(vcpu, facts)
    yield from _unknown_to_the_clock(facts)


def repair_writes(facts: GuestFacts) -> list[OffsetWrite]:
    """The writes that make the TSCs agree; none where they do, and where no offset can."""
    compared = agreement(facts.tscs)
    if compared.offsets_agree or not compared.rates_agree:
        return []
    try:
        return repair_plan(facts.tscs, every_vcpu=facts.clock.served_by == "kernel")
    except RangeError:  # 2^63 ticks apart, of which none is ahead
        return []


def _not_honoured(facts: GuestFacts) -> Iterator[Finding]:
    offsets = facts.host.tsc_offsets
    if offsets is TscOffsets.HONOURED:
        return
    lives_by_tsc = facts.offer.has_invariant_tsc
    steered = offsets is TscOffsets.STEERED
    yield Finding(
        "tsc-offset-steered" if steered else "tsc-offset-not-honoured",
        Severity.WARNING if lives_by_tsc else Severity.NOTE,
        str(offsets),
        "TSCs that KVM moves forward by some us at each entry, each by itself"
        if steered
        else "the host's TSC: it does not begin at 0, and cannot go on where it was after a restore",
        "offer no invariant TSC here, or take a VMX or SVM host on clocksource tsc; so is `pvclock lab`"
        if lives_by_tsc
        else "",
    )


def _apart(vcpu: VcpuComparison, facts: GuestFacts) -> Iterator[Finding]:
    by_tsc = facts.offer.has_invariant_tsc
    if vcpu.offset_ahead_ticks:
        ahead_ns = vcpu.offset_ahead_ticks * NS_PER_S // facts.vcpus[0].tsc_hz
        yield Finding(
            "tsc-disagreement",
            Severity.ERROR if by_tsc else Severity.WARNING,
            f"vCPU {vcpu.vcpu}'s TSC is {abs(ahead_ns) / 1e6:.6f} ms {_way(ahead_ns)} vCPU 0's",
            "time that jumps by that when a task changes its CPU: an invariant TSC is promised, and Linux need not look"
            if by_tsc
            else "it marks its TSC as unstable if it finds that; pages go without TSC_STABLE",
            REPAIRS[facts.clock.served_by],
            vcpu.vcpu,
            {
                "ahead_ticks": vcpu.offset_ahead_ticks,
                "ahead_ns": ahead_ns,
                "repair": [write._asdict() for write in repair_writes(facts)],
            },
        )
    if vcpu.adjust_ahead_ticks:
        yield Finding(
            "tsc-adjust-disagreement",
            Severity.WARNING,
            f"vCPU {vcpu.vcpu}'s IA32_TSC_ADJUST is {vcpu.adjust_ahead_ticks} ticks {_way(vcpu.adjust_ahead_ticks)} "
            "vCPU 0's",
            'Linux says "TSC ADJUST differs", and writes it, which moves that TSC',
            'set it alike on all vCPUs; GuestClock.repair_tsc(adjust="carry") moves both',
            vcpu.vcpu,
            {"ahead_ticks": vcpu.adjust_ahead_ticks},
        )


def _unknown_to_the_clock(facts: GuestFacts) -> Iterator[Finding]:
    for number, (vcpu, known) in enumerate(zip(facts.vcpus, facts.clock.tsc_offsets or (), strict=False)):
        if vcpu.tsc_offset is None or vcpu.tsc_offset == known:
            continue
        ahead_ns = signed64(vcpu.tsc_offset - known) * NS_PER_S // vcpu.tsc_hz
        yield Finding(
            "tsc-offset-unknown",
            Severity.ERROR,
            f"vCPU {number}'s TSC is {abs(ahead_ns) / 1e6:.6f} ms {_way(ahead_ns)} what its clock computes pages with",
            "a time that is off by that on this vCPU, under a flag that says that it is not",
            f"set it by GuestClock.host_write_msr(), or back: Vcpu.set_tsc_offset({known:#x})",
            number,
            {"offset": vcpu.tsc_offset, "clock_offset": known, "ahead_ns": ahead_ns},
        )


def _way(ahead: int) -> str:
    return "ahead of" if ahead > 0 else "behind"
