"""Where the TLFS, Linux's KVM and VirtualBox differ, each difference once.

Profile "linux" is what KVM does, and QEMU where that decides.  "document" is as "linux", but hypercalls need an enabled
page, as the TLFS says.  "virtualbox" is VirtualBox's provider (GIMHv), peculiarities included, so that its guests can
be studied.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final, NamedTuple

from pvclock.providers.hyperv.features import MICROSOFT, Feature, Hardware, Privilege, Recommendation
from pvclock.providers.interface import CPUID_BASE

__all__ = ["PROFILES", "Profile"]

ALL_BUT_TSC: Final = Privilege(sum(Privilege) & ~(Privilege.TSC_INVARIANT | Privilege.ACCESS_VP_REGISTERS))
"""A guest that has the TSC-invariant control makes its TSC its clock, out of reach of every clock policy.

Registers are not KVM's to read by hypercall, and all that can be read so here are MSRs, too.
"""


class Profile(NamedTuple):
    """Decisions; the defaults are KVM's."""

    vendor_id: str = MICROSOFT
    last_leaf: int = CPUID_BASE + 0xA
    """The last of the leaves that are always there."""

    privileges: Privilege = ALL_BUT_TSC
    """What is offered by default, of what can be served; also the three below."""
    features: Feature = Feature(sum(Feature))
    recommendations: Recommendation = (
        Recommendation.APIC_BY_MSR | Recommendation.RELAXED_TIMING | Recommendation.DEPRECATE_AUTO_EOI
    )
    hardware: Hardware = Hardware(0)
    microsoft_privileges: Privilege = Privilege(0)
    """What is offered beside these to guests that are told Microsoft's vendor id; also the one below."""
    microsoft_features: Feature = Feature(0)

    tells_limits: bool = True
    """Does leaf 0x40000005 tell how many processors there can be?  Otherwise it is zero."""
    version_needs_os_id: bool = False
    """Is leaf 0x40000002, the hypervisor's version, zero until the guest has written its OS id?"""

    tells_of_guest_os: bool = False
    """Is each OS id that the guest writes an event?"""
    resets_by_bit: bool = False
    """Does any value with bit 0 reset the VM?  Otherwise 1 alone does."""
    hypercalls_need_page: bool = False
    """Are hypercalls served only while the hypercall page is enabled?  Otherwise the OS id is enough."""
    keeps_refused_address: bool = False
    """Does the hypercall MSR keep a refused value, but for its enable bit?  Otherwise it stays as it was."""

    reference_is_raw_tsc: bool = False
    """Is reference time the vCPU's TSC, divided?  Otherwise it is guest time."""

    is_virtualbox: bool = False
    """Are hypercalls, the debugger and saved units as VirtualBox has them?  They differ throughout."""


PROFILES: Final = MappingProxyType(
    {
        "linux": Profile(),
        "document": Profile(hypercalls_need_page=True),
        "virtualbox": Profile(
            vendor_id="VBoxVBoxVBox",
            last_leaf=CPUID_BASE + 6,
            privileges=(
                (Privilege.TIME_REF_COUNT | Privilege.APIC | Privilege.HYPERCALL | Privilege.VP_INDEX)
                | (Privilege.RESET | Privilege.REFERENCE_TSC | Privilege.FREQUENCY | Privilege.EXTENDED_HYPERCALLS)
            ),
            features=Feature.FREQUENCY | Feature.CRASH,
            recommendations=(
                Recommendation.RESET_BY_MSR | Recommendation.RELAXED_TIMING | Recommendation.X2APIC_BY_MSR
            ),
            hardware=Hardware.NESTED_PAGING | Hardware.MSR_BITMAPS,
            microsoft_privileges=Privilege.DEBUGGING,
            microsoft_features=Feature.DEBUG | Feature.DEBUG_MSRS,
            tells_limits=False,
            version_needs_os_id=True,
            tells_of_guest_os=True,
            resets_by_bit=True,
            keeps_refused_address=True,
            reference_is_raw_tsc=True,
            is_virtualbox=True,
        ),
    }
)
