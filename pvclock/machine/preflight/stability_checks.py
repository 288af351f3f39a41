"""Will the pages of KVM's clock say TSC_STABLE, so that all CPUs of a guest can read one of them, without a clamp?

Source: Linux arch/x86/kvm/x86.c, pvclock_update_vm_gtod_copy(), for the master clock of the kernel's own kvmclock.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from pvclock.machine.preflight.facts import GuestFacts
from pvclock.machine.preflight.findings import Finding, Severity
from pvclock.tsc.agreement import agreement

__all__ = ["check_stability", "obstacles_to_stable"]

WITHOUT: Final = (
    "pages without TSC_STABLE: each reading is compared with the last of all vCPUs, and clock_gettime() is a system "
    "call"
)


def check_stability(facts: GuestFacts) -> Iterator[Finding]:
    """What to expect of them; nothing where KVM's clock is not offered."""
    if not facts.offer.has_kvmclock:
        return
    obstacles = obstacles_to_stable(facts)
    is_kernels = facts.clock.served_by == "kernel"
    values = {"obstacles": obstacles}
    if obstacles:
        yield Finding(
            "no-master-clock" if is_kernels else "not-stable",
            Severity.WARNING,
            ("KVM gives this VM no master clock: " if is_kernels else "the engine's pages are not TSC_STABLE: ")
            + "; ".join(obstacles),
            WITHOUT,
            "see what is said of each of these",
            values=values,
        )
    else:
        yield Finding(
            "master-clock" if is_kernels else "stable",
            Severity.NOTE,
            "KVM gives this VM a master clock" if is_kernels else "the engine's pages say TSC_STABLE",
            "any CPU's time from one page, in user space"
            + ("; it steps whenever KVM makes that anew" if is_kernels else ""),
            values=values,
        )


def obstacles_to_stable(facts: GuestFacts) -> list[str]:
    """Why the flag will not be set; none if it will."""
    compared = agreement(facts.tscs)
    found = []
    if not facts.host.trusts_tsc:
        found.append(f"the host's clocksource is {facts.host.clocksource}, not tsc")
    if not compared.rates_agree:
        found.append("the vCPUs' TSCs have different frequencies")
    if facts.clock.served_by == "kernel" or facts.clock.tsc_offsets is None:
        if not compared.offsets_agree:
            found.append("the vCPUs' TSC offsets differ")
        if facts.offer.has_old_kvmclock_only:
            found.append("the boot vCPU will use MSRs 0x11 and 0x12")
    elif len(set(facts.clock.tsc_offsets)) > 1:
        found.append("the vCPUs' TSC offsets differ")
    if not facts.clock.allows_stable:
        found.append("the guest's interface does not allow it")
    return found
