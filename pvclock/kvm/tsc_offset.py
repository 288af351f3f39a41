"""Does this host's KVM do what it says when it sets a guest's TSC offset?

Some hosts take the offset, return success and leave the guest's TSC as it was; a page computed with that offset would
be wrong by it.  So a guest is asked: a throw-away VM reads its TSC once.
"""

from __future__ import annotations

import mmap
from typing import Final

from pvclock._counter import read_tsc
from pvclock.kvm._ioctls import Kvm
from pvclock.kvm.exits import Interrupted

__all__ = ["honours_tsc_offset"]

CODE_GPA: Final = 0x1000
RESULT_GPA: Final = 0x2000
RDTSC_TO_RESULT: Final = bytes.fromhex(
    "0f31"  # rdtsc
    "66a30020"  # mov %eax, 0x2000
    "6689160420"  # mov %edx, 0x2004
    "f4"  # hlt
)
PROBE_OFFSET: Final = 1 << 62


def honours_tsc_offset(kvm: Kvm) -> bool:
    """True if a guest sees the TSC offset that was set; takes a few ms."""
    with mmap.mmap(-1, 4 * mmap.PAGESIZE) as ram:
        ram[CODE_GPA : CODE_GPA + len(RDTSC_TO_RESULT)] = RDTSC_TO_RESULT
        with kvm.create_vm() as vm:
            vm.set_tss_addr(0xFFFBD000)
            vm.set_identity_map_addr(0xFFFBC000)
            vm.set_user_memory_region(0, 0, ram)
            with vm.create_vcpu(0) as vcpu:
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
