"""Does this host's KVM honour the TSC offset that is set for a guest?

Most hosts do.  Some accept the offset, return success and leave the guest's TSC as it was; a page computed with that
offset would be wrong by it.  So this asks a guest: a throw-away VM reads its TSC once.  And a host that does not trust
its own TSC moves the offset by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing, suppress
from enum import StrEnum
from typing import Final

from pvclock._counter import read_tsc
from pvclock.arguments import instance
from pvclock.errors import KvmError
from pvclock.kvm._system import Kvm
from pvclock.kvm._vcpu import Vcpu
from pvclock.kvm.loaded import FoundOnce
from pvclock.kvm.probe_vm import ProbeVm

__all__ = ["TscOffsets", "probe_tsc_offsets", "share_tsc", "tsc_offsets_here"]

RDTSC_TO_RESULT: Final = bytes.fromhex(
    "0f31"  # rdtsc
    "66a30020"  # mov %eax, PROBE_RESULT
    "6689160420"  # mov %edx, PROBE_RESULT + 4
    "f4"  # hlt
)
PROBE_OFFSET: Final = 1 << 62

MSR_IA32_TSC_ADJUST: Final = 0x3B


class TscOffsets(StrEnum):
    """How a host treats the TSC offset that is set for a vCPU."""

    HONOURED = "a guest sees the offset that is set"
    STEERED = "the host's TSC is unstable: KVM moves guests' offsets, so that their TSCs follow kernel time"
    IGNORED = "TSC offset not honoured by this host"


def probe_tsc_offsets(kvm: Kvm) -> TscOffsets:
    """Set an offset and run a guest that reads its TSC; takes a few ms."""
    instance("kvm", kvm, Kvm, "a Kvm, as open_kvm() returns it")
    with closing(ProbeVm(kvm)) as vm:
        if _is_steered(vm.vcpu):
            return TscOffsets.STEERED
        return TscOffsets.HONOURED if _guest_sees_offset(vm) else TscOffsets.IGNORED


def tsc_offsets_here(kvm: Kvm, vcpu: Vcpu) -> TscOffsets:
    """What probe_tsc_offsets() says, with the throw-away VM only the first time.

    vcpu: any on this host, out of the guest.  A host may stop trusting its TSC at any time, so that is asked each time.
    """
    if _is_steered(vcpu):
        return TscOffsets.STEERED
    return _OFFSETS.get(lambda: probe_tsc_offsets(kvm))


_OFFSETS: Final = FoundOnce[TscOffsets]()


def share_tsc(vcpus: Sequence[Vcpu], late: Vcpu) -> None:
    """Give `late`, which has not run, the TSC and IA32_TSC_ADJUST of the first of `vcpus`, which are out of the guest.

    KVM has put it on the offset of the last TSC that was written to synchronise vCPUs, and a guest's own writes are not
    among those.  KVM's clock compares writes, not offsets: all are written again, so that it finds them in step.
    """
    offset = vcpus[0].get_tsc_offset()
    if _is_steered(vcpus[0]):
        return
    if late.get_tsc_offset() != offset:
        late.set_tsc_offset(offset)
        for vcpu in vcpus:
            vcpu.set_tsc_offset(vcpu.get_tsc_offset())
    with suppress(KvmError):  # a host without that MSR
        late.set_msr(MSR_IA32_TSC_ADJUST, vcpus[0].get_msr(MSR_IA32_TSC_ADJUST))


def _is_steered(vcpu: Vcpu) -> bool:
    """Does KVM move the offset whenever it loads the vCPU, as it does for each call?"""
    return vcpu.get_tsc_offset() != vcpu.get_tsc_offset()


def _guest_sees_offset(vm: ProbeVm) -> bool:
    vm.vcpu.set_tsc_offset(PROBE_OFFSET)
    before = read_tsc()
    vm.run(RDTSC_TO_RESULT)
    after = read_tsc()
    return before <= vm.result(0, 8) - PROBE_OFFSET <= after
