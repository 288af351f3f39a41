"""Emulation of RDTSC, RDTSCP and RDMSR of the TSC's MSRs, and the hardware controls that replace it.

For a VMM that emulates CPUs or owns a VMCS or VMCB; on KVM none of these instructions reach user space.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Final, NamedTuple

from pvclock.arguments import flag, fraction, instance, whole
from pvclock.errors import MsrFault
from pvclock.quantities import U32_MASK, U64_MASK, HostTsc
from pvclock.tsc.vcpu_tsc import MSR_IA32_TSC, MSR_IA32_TSC_ADJUST, MSR_TSC_AUX, VcpuTsc

__all__ = ["TscControls", "TscInstruction", "rdmsr", "rdtsc", "rdtscp", "tsc_controls"]

RDTSC_BYTES: Final = 2  # 0f 31; RDMSR, 0f 32, is as long
RDTSCP_BYTES: Final = 3  # 0f 01 f9


class TscInstruction(NamedTuple):
    """The guest registers after an emulated RDTSC, RDTSCP or RDMSR.

    rax, rdx: 64 bits; the upper 32 are 0, as after any 32-bit result in 64-bit mode.
    """

    rax: int
    rdx: int
    rcx: int | None
    """None: unchanged."""
    rip_advance: int
    """Length of the instruction in bytes, without prefixes."""


class TscControls(NamedTuple):
    """A vCPU's TSC settings for the hardware's control structure (VMCS or VMCB)."""

    offset: int
    """Ticks modulo 2^64."""
    traps_rdtsc: bool
    passthrough: bool
    warning: str
    """Why a requested passthrough is refused; else empty."""


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
    """Offset and RDTSC trap for a vCPU at `host_tsc`; trap if the hardware alone would give another rate.

    passthrough: show the guest the host's TSC, without its offset; refused, with a warning, if the guest has its own
    rate or dilation.  dilation: guest seconds in a host second; needs a trap.  scales: the host multiplies by `ratio`
    in hardware.
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
