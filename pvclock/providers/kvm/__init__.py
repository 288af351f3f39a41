"""KVM's paravirtual clock: signature and feature leaves, system-time and wall-clock MSRs.

Behaves as Linux's in-kernel kvmclock: kvm_write_system_time(), kvm_write_wall_clock(), kvm_set_msr_common().  Source:
Documentation/virt/kvm/x86/{cpuid,msr}.rst.  Steal time is not served yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntFlag
from typing import Final

from pvclock.errors import ConfigError, MsrFault
from pvclock.providers.interface import (
    ClockServices,
    CpuidLeaf,
    HypercallRegisters,
    HypercallResult,
    MsrValue,
    Status,
)
from pvclock.quantities import Gpa

__all__ = [
    "CPUID_FEATURES",
    "CPUID_SIGNATURE",
    "SERVED_BY_KERNEL",
    "SERVED_HERE",
    "KvmFeature",
    "KvmProvider",
    "kvm_cpuid_leaves",
]

CPUID_SIGNATURE: Final = 0x40000000
CPUID_FEATURES: Final = 0x40000001

MSR_KVM_WALL_CLOCK: Final = 0x11
MSR_KVM_SYSTEM_TIME: Final = 0x12
MSR_KVM_WALL_CLOCK_NEW: Final = 0x4B564D00
MSR_KVM_SYSTEM_TIME_NEW: Final = 0x4B564D01

SYSTEM_TIME_ENABLED: Final = 1
PAGE_BYTES: Final = 4096
TIME_INFO_BYTES: Final = 32


class KvmFeature(IntFlag):
    """Bits of CPUID 0x40000001 EAX that an engine of ours can offer (KVM_FEATURE_* of Linux)."""

    CLOCKSOURCE = 1 << 0
    NOP_IO_DELAY = 1 << 1
    CLOCKSOURCE2 = 1 << 3
    PV_UNHALT = 1 << 7
    POLL_CONTROL = 1 << 12
    CLOCKSOURCE_STABLE = 1 << 24


SERVED_HERE: Final = (
    KvmFeature.CLOCKSOURCE | KvmFeature.NOP_IO_DELAY | KvmFeature.CLOCKSOURCE2 | KvmFeature.CLOCKSOURCE_STABLE
)
SERVED_BY_KERNEL: Final = KvmFeature.PV_UNHALT | KvmFeature.POLL_CONTROL
"""What the kernel's irqchip serves to a guest whose clock is the engine's."""

FEATURE_OF_MSR: Final[Mapping[int, KvmFeature]] = {
    MSR_KVM_WALL_CLOCK: KvmFeature.CLOCKSOURCE,
    MSR_KVM_SYSTEM_TIME: KvmFeature.CLOCKSOURCE,
    MSR_KVM_WALL_CLOCK_NEW: KvmFeature.CLOCKSOURCE2,
    MSR_KVM_SYSTEM_TIME_NEW: KvmFeature.CLOCKSOURCE2,
}


def kvm_cpuid_leaves(features: int) -> dict[int, CpuidLeaf]:
    """The hypervisor leaves of a KVM that offers `features`."""
    return {
        CPUID_SIGNATURE: CpuidLeaf(CPUID_FEATURES, 0x4B4D564B, 0x564B4D56, 0x4D),
        CPUID_FEATURES: CpuidLeaf(eax=int(features)),
    }


class KvmProvider:
    """The KVM clock of one VM.

    features: what CPUID offers, None for all that can be served, here or by the host kernel.
    enforce_cpuid: an MSR whose feature is not offered faults; False is Linux without KVM_CAP_ENFORCE_PV_FEATURE_CPUID.
    """

    name = "KVM"
    number = 3
    version = 1

    def __init__(
        self,
        clock: ClockServices,
        vcpus: int,
        *,
        features: int | None = None,
        enforce_cpuid: bool = True,
        profile: str = "linux",
    ) -> None:
        served = int(SERVED_HERE | clock.kernel_features)
        self.features = KvmFeature(served if features is None else features)
        if int(self.features) & ~served:  # ints: ~ of an IntFlag has only the bits that have names
            refused = KvmFeature(int(self.features) & ~served)
            raise ConfigError(f"features {refused!r} cannot be served here; choose from {KvmFeature(served)!r}")
        self._served_msrs = {
            msr for msr, feature in FEATURE_OF_MSR.items() if not enforce_cpuid or feature in self.features
        }
        self._enforce_cpuid = enforce_cpuid
        self._offers_stable = KvmFeature.CLOCKSOURCE_STABLE in self.features
        self.clock = clock
        self._system_time = [0] * vcpus
        self._wall_clock = 0
        self._boot_vcpu_runs_old_kvmclock = False

    @property
    def cpuid_leaves(self) -> Mapping[int, CpuidLeaf]:
        """Signature "KVMKVMKVM" and the feature word."""
        return kvm_cpuid_leaves(self.features)

    @property
    def allows_stable(self) -> bool:
        """Only if offered, and not to a boot vCPU with the old MSRs: those readers expect frequent timestamps."""
        return self._offers_stable and not self._boot_vcpu_runs_old_kvmclock

    def read_msr(self, vcpu: int, index: int) -> int:
        """The value last written, whatever became of it; old and new numbers share it."""
        if index not in self._served_msrs:
            raise MsrFault(index)
        if index in (MSR_KVM_WALL_CLOCK, MSR_KVM_WALL_CLOCK_NEW):
            return self._wall_clock
        return self._system_time[vcpu]

    def write_msr(self, vcpu: int, index: int, value: int) -> None:
        """No value faults: an address that is no good is ignored."""
        if index not in self._served_msrs:
            raise MsrFault(index, value)
        if index in (MSR_KVM_WALL_CLOCK, MSR_KVM_WALL_CLOCK_NEW):
            self._write_wall_clock(value)
        else:
            self._write_system_time(vcpu, value, old_msr=index == MSR_KVM_SYSTEM_TIME)

    def hypercall(self, vcpu: int, registers: HypercallRegisters) -> HypercallResult:
        """VAPIC_POLL_IRQ does nothing; there are no others yet."""
        mask = 2**64 - 1 if registers.long_mode else 2**32 - 1
        if registers.cpl:
            return HypercallResult(Status.ACCESS_DENIED, -1 & mask)
        if registers.rax & mask == 1:
            return HypercallResult(Status.SUCCESS, 0)
        return HypercallResult(Status.NOT_SUPPORTED, -1000 & mask)

    def reset(self) -> None:
        """The VM is reset: no MSR was written, and no page is kept."""
        self._wall_clock, self._boot_vcpu_runs_old_kvmclock = 0, False
        for vcpu in range(len(self._system_time)):
            self._system_time[vcpu] = 0
            self.clock.place_time_page(vcpu, None)

    @property
    def config(self) -> Mapping[str, int | bool | str]:
        """The options that make another one like it."""
        return {"features": int(self.features), "enforce_cpuid": self._enforce_cpuid}

    def save(self) -> Mapping[str, MsrValue]:
        """What the guest wrote last, and by which number its boot vCPU did."""
        return {
            "system_time": tuple(self._system_time),
            "wall_clock": self._wall_clock,
            "boot_vcpu_runs_old_kvmclock": self._boot_vcpu_runs_old_kvmclock,
        }

    def load(self, msrs: Mapping[str, object]) -> None:
        """Take what save() gave; pages are the clock's to place again."""
        match msrs:
            case {"system_time": tuple(system_time), "wall_clock": int(wall), "boot_vcpu_runs_old_kvmclock": bool(old)}:
                if len(system_time) == len(self._system_time) and len(msrs) == len(self.save()):
                    self._system_time = list(system_time)
                    self._wall_clock, self._boot_vcpu_runs_old_kvmclock = wall, old
                    return
        raise ConfigError(f"MSRs of provider 'KVM' for {len(self._system_time)} vCPUs were expected, not {dict(msrs)}")

    def _write_wall_clock(self, value: int) -> None:
        # No enable bit and no mask: the value is the address.
        self._wall_clock = value
        if value:
            self.clock.write_wall_clock(Gpa(value))

    def _write_system_time(self, vcpu: int, value: int, *, old_msr: bool) -> None:
        if vcpu == 0:
            self._boot_vcpu_runs_old_kvmclock = old_msr
        self._system_time[vcpu] = value
        gpa = Gpa(value & ~SYSTEM_TIME_ENABLED)
        if not value & SYSTEM_TIME_ENABLED:
            self.clock.place_time_page(vcpu, None)
        elif gpa % PAGE_BYTES + TIME_INFO_BYTES <= PAGE_BYTES:
            self.clock.place_time_page(vcpu, gpa)
        else:
            # Linux refuses a page-crossing address before it looks at the old one, which stays in use.
            self.clock.refresh(vcpu)
