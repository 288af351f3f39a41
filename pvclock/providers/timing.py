"""VMware's timing-information leaf: TSC and APIC bus in kHz, so that guests need not calibrate.

Source: https://lwn.net/Articles/301888/; QEMU's `vmware-cpuid-freq`; VirtualBox's provider "Minimal".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pvclock.errors import ConfigError
from pvclock.providers.interface import CPUID_BASE, CpuidLeaf

__all__ = ["APIC_BUS_HZ", "CPUID_TIMING", "can_say", "timing_leaf", "with_timing_leaf"]

CPUID_TIMING: Final = 0x40000010
KHZ_MAX: Final = 2**32 - 1

APIC_BUS_HZ: Final = 10**9
"""QEMU's and KVM's: a tick of the APIC timer is 1 ns."""


def timing_leaf(tsc_hz: int, apic_bus_hz: int) -> CpuidLeaf:
    """EAX and EBX in kHz, rounded; ConfigError for a frequency that does not fit into 32 bits."""
    return CpuidLeaf(eax=_khz("TSC", tsc_hz), ebx=_khz("apic_bus_hz", apic_bus_hz))


def can_say(hz: int) -> bool:
    """Has the leaf room for that frequency?"""
    return _rounded_khz(hz) <= KHZ_MAX


def with_timing_leaf(leaves: Mapping[int, CpuidLeaf], timing: CpuidLeaf) -> dict[int, CpuidLeaf]:
    """`leaves`, which begin at CPUID_BASE if there are any, with leaf 0x40000010 and zeros up to it.

    EAX of leaf CPUID_BASE becomes 0x40000010, the last leaf.
    """
    base = leaves.get(CPUID_BASE, CpuidLeaf())._replace(eax=CPUID_TIMING)
    zeros = {leaf: CpuidLeaf() for leaf in range(CPUID_BASE, CPUID_TIMING)}
    return {**zeros, **leaves, CPUID_BASE: base, CPUID_TIMING: timing}


def _khz(what: str, hz: int) -> int:
    if not can_say(hz):
        raise ConfigError(f"{what} is {hz} Hz; leaf {CPUID_TIMING:#x} holds up to {KHZ_MAX} kHz")
    return _rounded_khz(hz)


def _rounded_khz(hz: int) -> int:
    return (hz + 500) // 1000
