"""One vCPU's time stamp counter: rate, offset, IA32_TSC_ADJUST, TSC_AUX, guest reads and writes, TSC deadline.

Offset and ADJUST are modulo 2^64.  Source: Intel SDM vol. 3, 18.17 "Time-Stamp Counter" and 18.17.3 "Time-Stamp Counter
Adjustment"; Linux kvm_set_msr_common() and start_sw_tscdeadline(); Palacios' vmm_time.c.  This module reads no counter:
the caller hands host TSC in.
"""

from __future__ import annotations

from fractions import Fraction
from math import gcd
from typing import Final, Literal

from pvclock import arguments
from pvclock._scale import guest_tsc
from pvclock.arguments import flag, fraction, whole
from pvclock.errors import ConfigError, MsrFault, RangeError
from pvclock.quantities import NS_PER_S, U32_MASK, U64_MASK, GuestTsc, HostTsc, quoted, shown

__all__ = ["MSR_IA32_TSC", "MSR_IA32_TSC_ADJUST", "MSR_TSC_AUX", "VcpuTsc", "tsc_rate"]

MSR_IA32_TSC: Final = 0x10
MSR_IA32_TSC_ADJUST: Final = 0x3B
MSR_TSC_AUX: Final = 0xC0000103

PALACIOS_LEAST_GCD: Final = 1024


def tsc_rate(guest_hz: int, host_hz: int, *, profile: Literal["exact", "palacios"] = "exact") -> Fraction:
    """Guest ticks in a host tick, for frequencies of at least 1 Hz.

    "exact" is the exact quotient.  "palacios" divides both, in whole kHz, by their greatest common divisor or 1024,
    whichever is greater, and drops the remainders: up to 1024 kHz of either frequency.  RangeError for a frequency that
    is too low, ConfigError for another profile.  pvclock.tsc_ratio() gives the hardware's rounded ratio.
    """
    if whole("guest_hz", guest_hz) < 1 or whole("host_hz", host_hz) < 1:
        raise RangeError(f"TSC frequencies are {guest_hz} and {host_hz} Hz; each must be at least 1")
    if arguments.text("profile", profile) == "exact":
        return Fraction(guest_hz, host_hz)
    if profile != "palacios":
        raise ConfigError(f'TSC rate profile {quoted(profile)} is unknown; use "exact" or "palacios"')
    guest_khz, host_khz = guest_hz // 1000, host_hz // 1000
    divisor = max(gcd(guest_khz, host_khz), PALACIOS_LEAST_GCD)
    if min(guest_khz, host_khz) < divisor:
        raise RangeError(f"TSC frequencies are {guest_khz} and {host_khz} kHz; Palacios needs {divisor} of each")
    return Fraction(guest_khz // divisor, host_khz // divisor)


class VcpuTsc:
    """The relation between host TSC and one vCPU's guest TSC.

    `offset` is what the hardware adds (ticks), IA32_TSC_ADJUST included; `adjust` is what the guest reads from MSR
    0x3b.  Guest writes move both, so TSC - ADJUST stays; host writes move one alone, so the order of restoring saved
    values does not matter.  `aux` is TSC_AUX, 32 bits.

    Guest ticks are host ticks times `ratio` / 2^frac_bits (48 on VMX, 32 on SVM), as the hardware scales.  A VMM that
    traps RDTSC gives the exact `rate` instead, guest ticks in a host tick, and leaves `ratio` at 1.
    """

    def __init__(
        self,
        offset: int = 0,
        adjust: int = 0,
        *,
        ratio: int | None = None,
        frac_bits: int = 48,
        rate: Fraction | None = None,
        aux: int = 0,
    ) -> None:
        if whole("frac_bits", frac_bits) not in (32, 48):
            raise ConfigError(f"TSC ratio with {shown(frac_bits)} fraction bits; hardware has 48 (VMX) or 32 (SVM)")
        if ratio is not None:
            whole("ratio", ratio)
        if rate is not None and ratio not in (None, 1 << frac_bits):
            raise ConfigError(f"TSC rate {rate} and hardware ratio {ratio:#x}; give one of them")
        if ratio is not None and not 0 < ratio <= U64_MASK:
            raise RangeError(f"TSC ratio is {ratio:#x}; it must be in [1, 2^64)")
        if rate is not None and fraction("rate", rate) <= 0:
            raise RangeError(f"TSC rate is {rate} guest ticks in a host tick; it must be positive")
        self.offset = whole("offset", offset) & U64_MASK
        self.adjust = whole("adjust", adjust) & U64_MASK
        self.ratio = 1 << frac_bits if ratio is None else ratio
        self.frac_bits = frac_bits
        self.aux = whole("aux", aux, 0, U32_MASK)
        self._exact_rate = None if rate is None else Fraction(rate)

    @property
    def base_offset(self) -> int:
        """The offset without the guest's adjust, in ticks modulo 2^64."""
        return (self.offset - self.adjust) & U64_MASK

    @property
    def rate(self) -> Fraction:
        """Guest ticks in a host tick, exactly."""
        return Fraction(self.ratio, 1 << self.frac_bits) if self._exact_rate is None else self._exact_rate

    @property
    def is_hardware_scaled(self) -> bool:
        """Is the rate given by `ratio`, which hardware applies?  An exact rate needs a trap."""
        return self._exact_rate is None

    def guest_hz(self, host_hz: int) -> Fraction:
        """The guest TSC's exact frequency in Hz, on a host TSC of `host_hz`."""
        return whole("host_hz", host_hz) * self.rate

    # What the guest reads

    def cycles(self, host_tsc: HostTsc) -> int:
        """Guest cycles: host ticks at the guest's rate, without offset; no write moves them, they never decrease."""
        return whole("host_tsc", host_tsc) * self.rate.numerator // self.rate.denominator

    def read(self, host_tsc: HostTsc) -> GuestTsc:
        """What RDTSC and RDMSR 0x10 return at `host_tsc`."""
        if self._exact_rate is None:
            return GuestTsc(guest_tsc(host_tsc, self.offset, self.ratio, self.frac_bits))
        return GuestTsc((self.cycles(host_tsc) + self.offset) & U64_MASK)

    # What guest and host write

    def wrmsr(self, index: int, value: int, host_tsc: HostTsc, *, amd: bool = False) -> None:
        """WRMSR by the guest of 0x10, 0x3b or 0xc0000103, `value` of 64 bits; MsrFault for another MSR.

        amd: see guest_write_aux().
        """
        if amd is not False:  # skip the check in the usual case
            flag("amd", amd)
        if whole("index", index) == MSR_IA32_TSC:
            self.guest_write_tsc(value, host_tsc)
        elif index == MSR_IA32_TSC_ADJUST:
            self.guest_write_adjust(value)
        elif index == MSR_TSC_AUX:
            self.guest_write_aux(value, amd=amd)
        else:
            raise MsrFault(index, value)

    def guest_write_tsc(self, value: int, host_tsc: HostTsc) -> None:
        """WRMSR 0x10 by the guest: its TSC becomes `value`, and ADJUST moves along."""
        moved = whole("value", value) - self.read(host_tsc)
        self.offset = (self.offset + moved) & U64_MASK
        self.adjust = (self.adjust + moved) & U64_MASK

    def guest_write_adjust(self, value: int) -> None:
        """WRMSR 0x3b by the guest: ADJUST becomes `value`, and its TSC moves along."""
        self.offset = (self.offset + whole("value", value) - self.adjust) & U64_MASK
        self.adjust = value & U64_MASK

    def guest_write_aux(self, value: int, *, amd: bool = False) -> None:
        """WRMSR 0xc0000103: MsrFault for more than 32 bits; an AMD guest CPU cuts them off instead.

        Source: Linux __kvm_set_msr(), which takes the vendor from the guest's CPUID.
        """
        is_cut = flag("amd", amd)
        if whole("value", value) > U32_MASK and not is_cut:
            raise MsrFault(MSR_TSC_AUX, value, "TSC_AUX has 32 bits")
        self.aux = value & U32_MASK

    def host_write_tsc(self, value: int, host_tsc: HostTsc) -> None:
        """Restore the TSC: it becomes `value` at `host_tsc`; ADJUST stays."""
        self.offset = (self.offset + whole("value", value) - self.read(host_tsc)) & U64_MASK

    def host_write_adjust(self, value: int) -> None:
        """Restore ADJUST: it becomes `value`; the TSC stays."""
        self.adjust = whole("value", value) & U64_MASK

    def reset(self, host_tsc: HostTsc) -> None:
        """RESET (not INIT, which keeps them): TSC, ADJUST and AUX become 0."""
        self.host_write_tsc(0, host_tsc)
        self.adjust = self.aux = 0

    # The TSC deadline timer

    def ns_until(self, deadline: int, host_tsc: HostTsc, host_hz: int) -> Fraction | None:
        """Exact ns from `host_tsc` until the guest first reads `deadline` (ticks, 64 bits, unsigned) or more.

        0 if already reached; None for deadline 0, which disarms the timer.  host_hz: the host TSC's frequency.
        """
        whole("host_hz", host_hz, 1)
        whole("host_tsc", host_tsc)
        if whole("deadline", deadline) == 0:
            return None
        missing = deadline - self.read(host_tsc)
        reached_at = -(-(self.cycles(host_tsc) + missing) // self.rate)  # the first host tick
        return Fraction(max(reached_at - host_tsc, 0) * NS_PER_S, host_hz)

    def kvm_ns_until(self, deadline: int, host_tsc: HostTsc, virtual_khz: int, *, advance_ns: int = 0) -> int | None:
        """The ns for which Linux's KVM sets its software timer; 0: fire at once, None: disarmed.

        KVM multiplies in unsigned 64 bits, so a deadline more than 2^64 / 10^6 ticks away (2 hours at 2.5 GHz) wraps
        and its interrupt comes early, once.  virtual_khz: KVM_GET_TSC_KHZ.  advance_ns: the host's
        lapic_timer_advance_ns.  Source: start_sw_tscdeadline().
        """
        for name, given in (("deadline", deadline), ("host_tsc", host_tsc), ("virtual_khz", virtual_khz)):
            whole(name, given)
        whole("advance_ns", advance_ns)
        if deadline == 0 or virtual_khz == 0:
            return None
        now = self.read(host_tsc)
        if deadline <= now:
            return 0
        return max(((deadline - now) * 10**6 & U64_MASK) // virtual_khz - advance_ns, 0)

    def copy(self) -> VcpuTsc:
        """A copy in the same state."""
        copied = VcpuTsc.__new__(VcpuTsc)  # skips __init__'s checks: each RDMSR makes a copy
        vars(copied).update(vars(self))
        return copied

    def __repr__(self) -> str:
        return f"VcpuTsc(offset={self.offset:#x}, adjust={self.adjust:#x})"
