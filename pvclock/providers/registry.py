"""The providers that a guest can have, by name, and their ids.  The one place that lists their classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pvclock.providers.hyperv import HyperVProvider
from pvclock.providers.interface import CPUID_BASE, Provider
from pvclock.providers.kvm import KvmProvider
from pvclock.providers.minimal import MinimalProvider
from pvclock.providers.none import NoneProvider
from pvclock.providers.side_by_side import Pair, Side

__all__ = ["PROVIDERS", "PROVIDER_NUMBERS"]

HYPERV_BESIDE_KVM: Final = Pair(
    name="HyperV+KVM",
    number=0x203,
    first=Side(HyperVProvider),
    second=Side(KvmProvider, fixed={"cpuid_base": CPUID_BASE + 0x100, "timing_leaf": False, "apic_bus_hz": None}),
)
"""What QEMU's guests see with any of its "hv-" properties: KVM's leaves stand right behind Hyper-V's."""

PROVIDERS: Final[Mapping[str, type[Provider] | Pair]] = {
    each.name: each for each in (NoneProvider, MinimalProvider, HyperVProvider, KvmProvider, HYPERV_BESIDE_KVM)
}

PROVIDER_NUMBERS: Final[Mapping[str, int]] = {"None": 0, "Minimal": 1, "HyperV": 2, "KVM": 3, "HyperV+KVM": 0x203}
"""The ids, which saved units hold: VirtualBox's, and one far from these for what VirtualBox does not have."""
