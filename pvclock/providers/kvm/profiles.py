"""Whose KVM it is: where Linux, its documents and VirtualBox differ, each difference once.

Profile "linux" is what Linux does.  "document" is what its documents promise, where Linux is more lenient.
"virtualbox" is VirtualBox's provider (GIMKvm), its peculiarities included, so that guests of it can be studied.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final, NamedTuple

from pvclock.providers.kvm.features import KvmFeature

__all__ = ["PROFILES", "Profile"]


class Profile(NamedTuple):
    """Decisions; the defaults are Linux's."""

    features: int = sum(KvmFeature)
    """All that may be offered."""
    offers_all: bool = False
    """Is all that can be served of it offered, unless the VMM says otherwise?"""
    stable_by_host: bool = False
    """Is CLOCKSOURCE_STABLE left out of CPUID where the host's TSC is not to be trusted?"""

    time_page_must_be_good: bool = False
    """Does an address that is not 4-byte aligned, or not in memory, fault?  Else it is ignored."""
    wall_clock_must_be_good: bool = False
    """As time_page_must_be_good; 0 is an address like any other then."""
    steal_time_must_be_good: bool = False
    """Does enabling at an address that is not in memory fault?"""

    bad_page_keeps_old: bool = True
    """Is an address across two pages refused, with the old page still in use?  Else only memory counts."""
    stops_all_pages: bool = False
    """When a vCPU disables its page, are all vCPUs' pages left as they are from then on?"""
    keeps_own_version: bool = False
    """Does a page's version go on from the host's own count, 2 a registration, and not from guest memory?"""
    stable_unasked: bool = False
    """May pages say TSC_STABLE though CPUID does not offer it?"""
    wall_clock_is_now: bool = False
    """Is the wall clock the time of day at the write, not at guest time 0?  It is written in one go then, with all
    vCPUs out, and the VMM is told of each."""

    tells_of_faults: bool = False
    """Is the VMM told of accesses of MSRs that are not served?"""
    features_of_newest_only: bool = False
    """Has a guest features unasked only where the newest interface version is configured?  Else STABLE alone."""

    refreshes_pages: bool = True
    """Are pages brought up to date by themselves?  Else they stand as they were registered, and drift."""
    tells_of_pauses: bool = True
    """Is GUEST_STOPPED set after a pause?"""

    page_ready_by_fault: bool = False
    """Is a page-ready event a second page fault with reason 2, as before page-ready interrupts?  Enabling needs
    bit 0 alone then, and bits 3 to 5 are reserved."""

    arguments: tuple[str, ...] = ("rbx", "rcx", "rdx", "rsi")
    """Registers of a hypercall's arguments."""
    hypercalls: frozenset[int] = frozenset({1, 5, 9, 10, 11})
    """Numbers that are served; the others are -KVM_ENOSYS."""
    kick_needs_vcpu: bool = False
    """Is KICK_CPU of an APIC id beyond the VM's vCPUs an error of the VMM?  Else it does nothing."""


PROFILES: Final = MappingProxyType(
    {
        "linux": Profile(),
        "document": Profile(
            time_page_must_be_good=True,
            wall_clock_must_be_good=True,
            steal_time_must_be_good=True,
            bad_page_keeps_old=False,
            page_ready_by_fault=True,
        ),
        "virtualbox": Profile(
            features=KvmFeature.CLOCKSOURCE
            | KvmFeature.CLOCKSOURCE2
            | KvmFeature.PV_UNHALT
            | KvmFeature.CLOCKSOURCE_STABLE,
            offers_all=True,
            stable_by_host=True,
            wall_clock_must_be_good=True,
            bad_page_keeps_old=False,
            stops_all_pages=True,
            keeps_own_version=True,
            stable_unasked=True,
            wall_clock_is_now=True,
            tells_of_faults=True,
            features_of_newest_only=True,
            refreshes_pages=False,
            tells_of_pauses=False,
            arguments=("rbx", "rcx", "rdi", "rsi"),
            hypercalls=frozenset({1, 5}),
            kick_needs_vcpu=True,
        ),
    }
)
