"""Where Linux's KVM, its documents and VirtualBox differ, each difference once.

Profile "linux" is what Linux does.  "document" is what its documents promise, where Linux is more lenient.
"virtualbox" is VirtualBox's provider (GIMKvm), peculiarities included, so that its guests can be studied.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final, NamedTuple

from pvclock.providers.kvm.features import KvmFeature

__all__ = ["PROFILES", "Profile"]


class Profile(NamedTuple):
    """Decisions; the defaults are Linux's."""

    features: int = sum(KvmFeature)
    """Features that may be offered."""
    offers_all: bool = False
    """Are all of them that can be served offered by default?"""
    offers_timing_leaf: bool = True
    """Is leaf 0x40000010 offered unasked where a guest's clock keeps its TSC's rate?"""
    stable_by_host: bool = False
    """Is CLOCKSOURCE_STABLE left out of CPUID if the host's TSC is not reliable?"""

    time_page_must_be_good: bool = False
    """Does an address that is not 4-byte aligned, or not in memory, fault?  Otherwise it is ignored."""
    wall_clock_must_be_good: bool = False
    """As time_page_must_be_good; 0 is then an address like any other."""
    steal_time_must_be_good: bool = False
    """Does enabling at an address that is not in memory fault?"""

    bad_page_keeps_old: bool = True
    """Is an address across two pages refused, with the old page still in use?  Otherwise memory is all it needs."""
    stops_all_pages: bool = False
    """When a vCPU disables its page, are all vCPUs' pages left as they are from then on?"""
    owns_pages: bool = False
    """Does each vCPU's page have a line of its own, through ns 0 at TSC 0, with version and flags that the host keeps?
    It is written at a registration and at a load only."""
    stable_unasked: bool = False
    """May pages say TSC_STABLE although CPUID does not offer it?"""
    wall_clock_is_now: bool = False
    """Is the wall clock the time of day at the write, not at guest time 0?  It is then written with all vCPUs out of
    the guest, and each write is an event."""

    tells_of_faults: bool = False
    """Are accesses to MSRs that are not served events?"""
    features_of_newest_only: bool = False
    """Does only the newest interface version offer features by default?  Other versions offer STABLE alone then."""
    keeps_unit_features: bool = False
    """Is a VirtualBox unit of a VM with other features loaded, and its features saved again, though CPUID stays?"""

    refreshes_pages: bool = True
    """Are pages re-anchored regularly?  Otherwise they stay as they were registered, and drift."""
    tells_of_pauses: bool = True
    """Is GUEST_STOPPED set after a pause?"""

    page_ready_by_fault: bool = False
    """Is a page-ready event a second page fault with reason 2, as before page-ready interrupts?  Enabling then needs
    bit 0 alone, and bits 3 to 5 are reserved."""

    arguments: tuple[str, ...] = ("rbx", "rcx", "rdx", "rsi")
    """Registers of a hypercall's arguments."""
    hypercalls: frozenset[int] = frozenset({1, 5, 9, 10, 11})
    """Numbers that are served; the others return -KVM_ENOSYS."""
    kick_needs_vcpu: bool = False
    """Does KICK_CPU of an APIC id beyond the VM's vCPUs fail in the VMM?  Otherwise it does nothing."""


PROFILES: Final = MappingProxyType(
    {
        "linux": Profile(),
        "document": Profile(
            offers_timing_leaf=False,
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
            offers_timing_leaf=False,
            stable_by_host=True,
            wall_clock_must_be_good=True,
            bad_page_keeps_old=False,
            stops_all_pages=True,
            owns_pages=True,
            stable_unasked=True,
            wall_clock_is_now=True,
            tells_of_faults=True,
            features_of_newest_only=True,
            keeps_unit_features=True,
            refreshes_pages=False,
            tells_of_pauses=False,
            arguments=("rbx", "rcx", "rdi", "rsi"),
            hypercalls=frozenset({1, 5}),
            kick_needs_vcpu=True,
        ),
    }
)
