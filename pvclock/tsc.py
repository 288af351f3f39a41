"""One vCPU's time stamp counter: offset, IA32_TSC_ADJUST and hardware ratio, all modulo 2^64.

Source: Intel SDM vol. 3, 18.17.3 "Time-Stamp Counter Adjustment"; Linux kvm_set_msr_common(), MSR_IA32_TSC and
MSR_IA32_TSC_ADJUST.  No counter is read here: host TSC is handed in.
"""

from __future__ import annotations

from pvclock._core import guest_tsc
from pvclock.quantities import U64_MASK, GuestTsc, HostTsc

__all__ = ["VcpuTsc"]


class VcpuTsc:
    """The relation between host TSC and one vCPU's guest TSC.

    `offset` is what the hardware adds (ticks), IA32_TSC_ADJUST included; `adjust` is what the guest reads from MSR
    0x3b.  Guest writes move both, so that TSC - ADJUST is untouched by them; host writes move one alone, so that the
    order in which saved values come back does not matter.
    """

    def __init__(self, offset: int = 0, adjust: int = 0, *, ratio: int = 1 << 48, frac_bits: int = 48) -> None:
        self.offset = offset & U64_MASK
        self.adjust = adjust & U64_MASK
        self.ratio = ratio
        self.frac_bits = frac_bits

    @property
    def base_offset(self) -> int:
        """The offset without the guest's adjust, in ticks modulo 2^64."""
        return (self.offset - self.adjust) & U64_MASK

    def read(self, host_tsc: HostTsc) -> GuestTsc:
        """What RDTSC and RDMSR 0x10 return at `host_tsc`."""
        return GuestTsc(guest_tsc(host_tsc, self.offset, self.ratio, self.frac_bits))

    def guest_write_tsc(self, value: int, host_tsc: HostTsc) -> None:
        """WRMSR 0x10 by the guest: its TSC becomes `value`, and ADJUST moves along."""
        moved = value - self.read(host_tsc)
        self.offset = (self.offset + moved) & U64_MASK
        self.adjust = (self.adjust + moved) & U64_MASK

    def guest_write_adjust(self, value: int) -> None:
        """WRMSR 0x3b by the guest: ADJUST becomes `value`, and its TSC moves along."""
        self.offset = (self.offset + value - self.adjust) & U64_MASK
        self.adjust = value & U64_MASK

    def host_write_tsc(self, value: int, host_tsc: HostTsc) -> None:
        """Restore the TSC: it becomes `value` at `host_tsc`; ADJUST stays."""
        self.offset = (self.offset + value - self.read(host_tsc)) & U64_MASK

    def host_write_adjust(self, value: int) -> None:
        """Restore ADJUST: it becomes `value`; the TSC stays."""
        self.adjust = value & U64_MASK

    def reset(self, host_tsc: HostTsc) -> None:
        """RESET (not INIT, which keeps both): TSC and ADJUST become 0."""
        self.host_write_tsc(0, host_tsc)
        self.adjust = 0

    def copy(self) -> VcpuTsc:
        """Another one in the same state."""
        return VcpuTsc(self.offset, self.adjust, ratio=self.ratio, frac_bits=self.frac_bits)

    def __repr__(self) -> str:
        return f"VcpuTsc(offset={self.offset:#x}, adjust={self.adjust:#x})"
