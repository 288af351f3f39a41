"""What a paravirtual clock interface is to the clock, and what the clock is to it.

A provider is one guest-visible surface: CPUID leaves and MSRs.  It knows no other provider, no memory and no host
clock; it asks the clock, through `ClockServices`, for what its guest asked of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol, TypeAlias

from pvclock.quantities import Gpa

__all__ = ["ClockServices", "CpuidLeaf", "MsrValue", "Provider"]


MsrValue: TypeAlias = int | bool | str | tuple[int, ...] | None


class CpuidLeaf(NamedTuple):
    """The four registers that CPUID returns, 32 bits each."""

    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0


class ClockServices(Protocol):
    """What a provider may ask of its clock.  Nothing here faults: bad addresses are ignored, as Linux does."""

    @property
    def kernel_features(self) -> int:
        """KVM feature bits that the host kernel serves beside the engine."""

    def place_time_page(self, vcpu: int, gpa: Gpa | None) -> None:
        """Keep vCPU's pvclock page at `gpa` (None: nowhere) from now on, and publish."""

    def refresh(self, vcpu: int | None = None) -> None:
        """Publish all pages; `vcpu`'s own, which is out of the guest, with its flags."""

    def write_wall_clock(self, gpa: Gpa) -> None:
        """Write the time of day of guest time 0 into the wall-clock record at `gpa`, once."""


class Provider(Protocol):
    """One guest-visible clock interface."""

    name: str
    version: int
    """Of what save() gives; a provider reads all that were ever written."""
    clock: ClockServices

    @property
    def config(self) -> Mapping[str, int | bool | str]:
        """The options that make another one like it."""

    @property
    def cpuid_leaves(self) -> Mapping[int, CpuidLeaf]:
        """The hypervisor CPUID leaves that it offers."""

    @property
    def allows_stable(self) -> bool:
        """May pages say TSC_STABLE if the TSCs are?"""

    def read_msr(self, vcpu: int, index: int) -> int:
        """RDMSR by the guest: the 64-bit value, or MsrFault."""

    def write_msr(self, vcpu: int, index: int, value: int) -> None:
        """WRMSR by the guest; MsrFault is #GP."""

    def save(self) -> Mapping[str, MsrValue]:
        """What the guest wrote, by name."""

    def load(self, msrs: Mapping[str, object]) -> None:
        """Take what save() gave, without doing anything again; ConfigError, and nothing taken, if it is not that."""
