"""RDTSC, RDTSCP and RDMSR of the TSC's MSRs, for a VMM that traps or emulates them, and what hardware needs instead.

On KVM none of these reach user space: this is for a VMM that emulates CPUs, or has its own VMCS or VMCB.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Final, NamedTuple

from pvclock.arguments import flag, fraction, instance, whole
from pvclock.errors import MsrFault
from pvclock.quantities import U64_MASK, HostTsc
from pvclock.tsc.vcpu_tsc import MSR_IA32_TSC, MSR_IA32_TSC_ADJUST, MSR_TSC_AUX, VcpuTsc

__all__ = ["TscControls", "TscInstruction", "rdmsr", "rdtsc", "rdtscp", "tsc_controls"]

U32_MASK: Final = (1 << 32) - 1
RDTSC_BYTES: Final = 2  # 0f 31; RDMSR, 0f 32, is as long
RDTSCP_BYTES: Final = 3  # 0f 01 f9


class TscInstruction(NamedTuple):
    """What an emulated RDTSC, RDTSCP or RDMSR leaves in the guest's registers.

    rax, rdx: 64 bits, the upper 32 of them 0, as every 32-bit result is in 64-bit mode.
    """

    rax: int
    rdx: int
    rcx: int | None
    """None: as it was."""
    rip_advance: int
    """Bytes of the instruction; one that has prefixes is longer by those."""


class TscControls(NamedTuple):
    """What the hardware's control structure (VMCS or VMCB) is to hold for a vCPU."""

    offset: int
    """Ticks modulo 2^64."""
    traps_rdtsc: bool
    passthrough: bool
    warning: str
    """Why passthrough was asked for and is not given; else empty."""


def rdtsc(tsc: VcpuTsc, host_tsc: HostTsc) -> TscInstruction:
    """RDTSC at `host_tsc`: EDX:EAX."""
    return _in_halves(instance("tsc", tsc, VcpuTsc).read(host_tsc), RDTSC_BYTES)


def rdtscp(tsc: VcpuTsc, host_tsc: HostTsc) -> TscInstruction:
    """RDTSCP at `host_tsc`: EDX:EAX, and TSC_AUX in ECX."""
    return rdtsc(tsc, host_tsc)._replace(rcx=tsc.aux, rip_advance=RDTSCP_BYTES)


def rdmsr(tsc: VcpuTsc, index: int, host_tsc: HostTsc) -> TscInstruction:
    """RDMSR of 0x10, 0x3b or 0xc0000103 at `host_tsc`: EDX:EAX; MsrFault for any other."""
    if whole("index", index) == MSR_IA32_TSC:
        return rdtsc(tsc, host_tsc)
    if index not in (MSR_IA32_TSC_ADJUST, MSR_TSC_AUX):
        raise MsrFault(index)
    whole("host_tsc", host_tsc)
    instance("tsc", tsc, VcpuTsc)
    return _in_halves(tsc.adjust if index == MSR_IA32_TSC_ADJUST else tsc.aux, RDTSC_BYTES)


def tsc_controls(
    tsc: VcpuTsc,
    host_tsc: HostTsc,
    *,
    passthrough: bool = False,
    dilation: Fraction = Fraction(1),
    scales: bool = False,
) -> TscControls:
    """Offset and RDTSC trap at `host_tsc`; the trap is on where the hardware alone would give another rate.

    passthrough: the guest is to have the host's TSC as it is, without its offset; cancelled, with a warning, if it
    has a rate or a dilation of its own.  dilation: guest time in host time, which only a trap can give.
    scales: the host multiplies by `ratio` in hardware.
    """
    instance("tsc", tsc, VcpuTsc)
    passthrough, scales = flag("passthrough", passthrough), flag("scales", scales)
    warning = ""
    dilation = fraction("dilation", dilation)
    if passthrough and (dilation != 1 or tsc.rate != 1):
        warning = f"TSC passthrough cancelled: the guest's rate is {tsc.rate}, its dilation {dilation}"
    passthrough = passthrough and not warning
    scaled = scales and tsc.is_hardware_scaled and dilation == 1
    traps = not scaled and (tsc.rate != 1 or dilation != 1)
    offset = 0 if passthrough else tsc.offset if scaled else (tsc.read(host_tsc) - host_tsc) & U64_MASK
    return TscControls(offset, traps, passthrough, warning)


def _in_halves(value: int, rip_advance: int) -> TscInstruction:
    return TscInstruction(value & U32_MASK, value >> 32, None, rip_advance)
