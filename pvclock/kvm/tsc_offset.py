"""What becomes of a guest's TSC offset on this host's KVM?

Most hosts do what they are told.  Some take the offset, return success and leave the guest's TSC as it was; a page
computed with that offset would be wrong by it.  So a guest is asked: a throw-away VM reads its TSC once.  And a host
that does not trust its own TSC moves the offset by itself.
"""

from __future__ import annotations

import mmap
from enum import StrEnum
from typing import Final

from pvclock._counter import read_tsc
from pvclock.kvm._ioctls import Kvm, Vcpu
from pvclock.kvm.exits import Interrupted

__all__ = ["TscOffsets", "probe_tsc_offsets"]

CODE_GPA: Final = 0x1000
RESULT_GPA: Final = 0x2000
RDTSC_TO_RESULT: Final = bytes.fromhex(
    "0f31"  # rdtsc
    "66a30020"  # mov %eax, 0x2000
    "6689160420"  # mov %edx, 0x2004
    "f4"  # hlt
)
PROBE_OFFSET: Final = 1 << 62


class TscOffsets(StrEnum):
    """How a host treats the TSC offset that is set for a vCPU."""

    HONOURED = "a guest sees the offset that is set"
    STEERED = "the host's TSC is unstable: KVM moves guests' offsets, so that their TSCs follow kernel time"
    IGNORED = "TSC offset not honoured by this host"


def probe_tsc_offsets(kvm: Kvm) -> TscOffsets:
    """Try it; takes a few ms."""
    with mmap.mmap(-1, 4 * mmap.PAGESIZE) as ram, kvm.create_vm() as vm:
        vm.set_tss_addr(0xFFFBD000)
        vm.set_identity_map_addr(0xFFFBC000)
        vm.set_user_memory_region(0, 0, ram)
        with vm.create_vcpu(0) as vcpu:
            if vcpu.get_tsc_offset() != vcpu.get_tsc_offset():  # moved whenever KVM loads the vCPU, as for each call
                return TscOffsets.STEERED
            return TscOffsets.HONOURED if _guest_sees_offset(vcpu, ram) else TscOffsets.IGNORED


def _guest_sees_offset(vcpu: Vcpu, ram: mmap.mmap) -> bool:
    ram[CODE_GPA : CODE_GPA + len(RDTSC_TO_RESULT)] = RDTSC_TO_RESULT
    sregs = vcpu.get_sregs()
    sregs["cs"].update(base=0, selector=0)
    vcpu.set_sregs(sregs)
    vcpu.set_regs({**vcpu.get_regs(), "rip": CODE_GPA, "rflags": 2})
    vcpu.set_tsc_offset(PROBE_OFFSET)
    before = read_tsc()
    while isinstance(vcpu.run(), Interrupted):
        pass
    after = read_tsc()
    guest_tsc = int.from_bytes(ram[RESULT_GPA : RESULT_GPA + 8], "little")
    return before <= guest_tsc - PROBE_OFFSET <= after
