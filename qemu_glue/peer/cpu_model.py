"""QEMU's -cpu argument that offers a guest exactly the paravirtual features that pvclock offers.

Source: QEMU target/i386/cpu.c, feature words FEAT_KVM and FEAT_8000_0007_EDX.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from pvclock import ConfigError

__all__ = ["FEATURE_BITS", "cpu_property"]

FEATURE_BITS: Final = {
    "kvmclock": 1 << 0 | 1 << 3,  # QEMU has one name for the old and the new MSRs
    "kvm-nopiodelay": 1 << 1,
    "kvm-asyncpf": 1 << 4,
    "kvm-steal-time": 1 << 5,
    "kvm-pv-eoi": 1 << 6,
    "kvm-pv-unhalt": 1 << 7,
    "kvm-pv-tlb-flush": 1 << 9,
    "kvm-asyncpf-vmexit": 1 << 10,  # not in QEMU 7.2
    "kvm-pv-ipi": 1 << 11,
    "kvm-poll-control": 1 << 12,
    "kvm-pv-sched-yield": 1 << 13,
    "kvm-asyncpf-int": 1 << 14,
    "kvm-msi-ext-dest-id": 1 << 15,
    "kvmclock-stable-bit": 1 << 24,
}


def cpu_property(
    features: int, model: str = "host", *, invariant_tsc: bool = False, known: Collection[str] = FEATURE_BITS.keys()
) -> str:
    """The value of -cpu that offers exactly `features` (CPUID 0x40000001 EAX).

    known: the CPU flags that this QEMU has names for; it offers none of the others.

    ConfigError for a bit without a name, or for one of the two clock bits without the other.
    """
    names = {name: bits for name, bits in FEATURE_BITS.items() if name in known}
    unnamed = features & ~sum(names.values())
    if unnamed:
        raise ConfigError(f"feature bits {unnamed:#x} have no QEMU name")
    if features & FEATURE_BITS["kvmclock"] not in (0, FEATURE_BITS["kvmclock"]):
        raise ConfigError("QEMU offers the old and the new clock MSRs (bits 0 and 3) together or not at all")
    flags = [f"{'+' if features & bits else '-'}{name}" for name, bits in names.items()]
    flags.append(f"{'+' if invariant_tsc else '-'}invtsc")
    return ",".join([model, *flags])
