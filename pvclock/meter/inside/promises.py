"""What a guest is told about its clocks: the hypervisor by its signature, features by their names, and frequencies."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

from pvclock.meter.inside.record import ProbeRecord

__all__ = ["FrequencyClaim", "Hypervisor", "Promises", "promises"]


class Hypervisor(NamedTuple):
    """One signature: the leaf it stands at, its text, and whose it is, in words."""

    leaf: int
    signature: str
    name: str


class FrequencyClaim(NamedTuple):
    """A frequency of the TSC as `source` (such as "CPUID 0x40000010") tells it: hz, within `grain_hz` either way.

    is_nominal: by its definition it is what the CPU is sold as, not what its TSC does.
    """

    source: str
    hz: Fraction
    grain_hz: Fraction
    is_nominal: bool = False


class Promises(NamedTuple):
    """What CPUID and the pvclock records promise.

    hypervisor: the most telling name, "none" without one.  hypervisors: every signature.  clocks: those offered, in
    words.  kvm_features, hyperv_features: as KVM and the TLFS name them.  has_stable_pages: every pvclock record seen
    has its STABLE flag (None: none was seen).
    """

    hypervisor: str
    hypervisors: tuple[Hypervisor, ...]
    clocks: tuple[str, ...]
    kvm_features: tuple[str, ...]
    hyperv_features: tuple[str, ...]
    invariant_tsc: bool
    constant_tsc: bool
    tsc_deadline: bool
    tsc_adjust: bool
    kvm_stable: bool
    has_stable_pages: bool | None
    frequencies: tuple[FrequencyClaim, ...]


def promises(record: ProbeRecord) -> Promises:
    """Read what the guest was told from a record's CPUID leaves and pages."""
    raise NotImplementedError
